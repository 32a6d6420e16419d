"""Every reason why a sample is not kept, and what would keep it: a setting, or another file.

`tests/data_prep/test_reasons.py` holds the table against every reason that the code gives, and
against the table of `docs/bad_input.md`. Knows nothing of how a sample is judged.
"""

from __future__ import annotations

from typing import NamedTuple

from data_prep.config import PrepareConfig


class Remedy(NamedTuple):
    """What would keep a sample."""

    advice: str
    """For people; a whole clause without a full stop."""
    settings: tuple[str, ...] = ()
    """Keys within a recipe's section `prepare` that decide; none where only the file does."""
    off: str = ""
    """The value of the one setting, as typed, under which the reason never arises."""


def _off(setting: str, off: str, advice: str) -> Remedy:
    return Remedy(advice, (setting,), off)


_ANOTHER_FILE = "the file itself is at fault: fetch it again or make it anew"
_CAPS = ("caps.max_media_bytes", "caps.max_pixels", "caps.decoder_memory_bytes")

REASONS: dict[str, Remedy] = {
    # what the json says
    "low_matching_score": _off("filters.matching_score_above", "null", "take any score"),
    "not_desirable": _off("filters.desirable", "false", "take clips with any mark"),
    "several_shots": _off("filters.one_shot", "false", "take clips with cuts, or cut them apart"),
    "missing_metadata": _off("filters.missing_metadata", "keep", "take samples without metadata"),
    # the source as a whole
    "small_area": _off("filters.min_area_pixels", "0", "take any size"),
    "short_duration": _off("filters.min_duration_s", "0", "take any length"),
    "interlaced": _off("filters.progressive", "false", "take its combs, or deinterlace it first"),
    "low_rate": _off("filters.min_source_fps", "0", "take any rate; frames are then repeated"),
    "gap": _off("filters.max_gap_s", "null", "take windows with a still inside"),
    "image": _off("images", "true", "take images as clips of one frame"),
    "too_small": _off(
        "bucket.max_enlargement", "null", "take pictures enlarged as far as it needs"
    ),
    "too_short": Remedy(
        "ask for fewer frames, or for more of them a second",
        ("bucket.num_frames", "bucket.frame_counts", "bucket.fps"),
    ),
    # the pixels
    "letterbox": _off("filters.max_bar_share", "1", "take any bars"),
    "static_clip": _off("filters.static_below", "null", "take stills"),
    "black_frames": _off("filters.max_black_frames", "null", "take black frames"),
    "white_frames": _off("filters.max_white_frames", "null", "take white frames"),
    # limits
    "video_too_large": Remedy("raise the cap that it is over", _CAPS),
    "image_too_large": Remedy("raise the cap that it is over", _CAPS[:2]),
    "decode_timeout": Remedy("give it longer, or make the video anew", ("deadline_s",)),
    "decoder_died": Remedy("give the decoder more memory, or make the video anew", _CAPS[2:]),
    # the file
    "empty_video": Remedy(_ANOTHER_FILE),
    "unreadable_video": Remedy(_ANOTHER_FILE),
    "unreadable_image": Remedy(_ANOTHER_FILE),
    "size_changes": Remedy("cut the video where its size changes"),
    "names_other_files": Remedy("fetch the video that the file names"),
    # the shard
    "truncated_shard": Remedy("fetch the shard again: it ends too early"),
    "duplicate_key": Remedy("give the sample a key of its own"),
    "no_media": Remedy("put a video or an image of a suffix that is read beside the texts"),
    # what is no sample's fault
    "not_finite": Remedy("choose another codec: this one's moments do not fit fp16"),
    "internal_error": Remedy("report it, with the file: this is a fault of the code"),
}
_DOWNLOADER = Remedy("fetch it again: this is the downloader's own word for what went wrong")


def remedy_of(reason: str) -> Remedy:
    """What would keep a sample of this reason; other words than ours are a downloader's.

    >>> remedy_of("gap").settings, remedy_of("failed_to_download").settings
    (('filters.max_gap_s',), ())
    """
    return REASONS.get(reason, _DOWNLOADER)


def setting_value(config: PrepareConfig, setting: str) -> object:
    """The present value of a setting within `prepare`.

    >>> setting_value(PrepareConfig(), "filters.max_gap_s")
    1.0
    """
    value: object = config
    for name in setting.split("."):
        value = getattr(value, name)
    return value
