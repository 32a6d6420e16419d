"""`flowreel inspect`: a dataset's figures as tables, and as a page with pictures.

Draws what `data_prep.latents.inspection` measured; measures nothing itself. Every picture is in the
page, so that it opens without a server. Knows nothing of training or Ray.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.latents.inspection import (
    Channels,
    Inspection,
    Picture,
    dropped_pictures,
    inspect_dataset,
    kept_pictures,
)
from data_prep.latents.records import read_info_values
from data_prep.storage.location import Location, is_uri
from flow.codec_factors import CodecError
from flowreel.files import write_whole
from media.frames import Frames
from pipeline.console import Reporter, size
from pipeline.recipes import SHIPPED_CODECS
from pipeline.tables import say_shard_problems, unjudged_lines

_THUMBNAIL_SIDE = 192
_BINS = 12


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: its label, count, and height in 0..1."""

    label: str
    count: int
    height: float


def inspect(
    root: Location, page: Path | None, codec: str | None, pictures: int, reporter: Reporter
) -> Path:
    """Print the tables and write the page; returns the page's path.

    Args:
        root: the dataset, a folder or a URI.
        page: the page to write; by default `inspect.html` in the dataset, or here for a store.
        codec: folder or hub id of the codec that made the latents; by default the one of those
            that ship here that did.
        pictures: thumbnails of kept clips, and as many of clips that were not kept.

    Raises:
        LatentDatasetError: no dataset, a damaged one, or latents of another codec.
        CodecError: the codec cannot be loaded.
    """
    inspection = inspect_dataset(root)
    print_tables(inspection, reporter)
    shown: list[Picture] = []
    if pictures and inspection.counts.get("kept"):
        from flow.codec import VideoCodec

        source = codec or shipped_codec(read_info_values(root)["codec_digest"])
        shown = kept_pictures(root, VideoCodec.load(source), pictures)
    dropped = dropped_pictures(root, pictures) if pictures else []
    page = page or (Path("inspect.html") if is_uri(root) else Path(root, "inspect.html"))
    write_whole(page, render(inspection, shown, dropped))
    reporter.outcome(f"page  {page}")
    reporter.document({**figures(inspection), "page": page})
    return page


def figures(inspection: Inspection) -> dict[str, Any]:
    """What the tables print, as plain values for `--json`."""
    channels = inspection.channels
    return {
        "root": inspection.root,
        "shards": inspection.shards,
        "truncated_shards": inspection.truncated,
        "unreadable_shards": inspection.unreadable,
        "shard_problems": inspection.shard_problems,
        "unjudged_by_field": inspection.unjudged,
        "samples": inspection.total,
        "samples_by_status": inspection.counts,
        "samples_by_reason": [
            {"status": status, "reason": reason, "samples": count}
            for (status, reason), count in inspection.reasons.items()
        ],
        "near_duplicates_masked": inspection.duplicates,
        "buckets": [
            {
                "bucket": str(bucket.bucket),
                "clips": bucket.clips,
                "seconds": bucket.seconds,
                "bytes": bucket.size_bytes,
            }
            for bucket in inspection.buckets
        ],
        "caption_words": {
            kind: dict(zip(("least", "median", "p95", "most"), _quantiles(words), strict=True))
            for kind, words in inspection.caption_words.items()
            if words
        },
        "channels": None
        if channels is None
        else {
            "records": channels.records,
            "mean": channels.mean,
            "std": channels.std,
            "shift": channels.shift,
            "scale": channels.scale,
        },
        "bytes": inspection.size_bytes,
    }


def _quantiles(words: list[int]) -> list[float]:
    return [float(np.quantile(words, q)) for q in (0.0, 0.5, 0.95, 1.0)]


def shipped_codec(digest: str) -> Path:
    """The codec that ships here and has this digest. Raises CodecError where none has."""
    from flow.codec import codec_digest

    for folder in SHIPPED_CODECS.values():
        if codec_digest(folder) == digest:
            return folder
    raise CodecError(
        f"the latents are of codec {digest}, which does not ship here; say where it is with --codec"
    )


def print_tables(inspection: Inspection, reporter: Reporter) -> None:
    """Samples, buckets, captions, channels, bytes."""
    rows = [["kept", "", str(inspection.counts.get("kept", 0))]]
    rows += [[status, reason, str(n)] for (status, reason), n in inspection.reasons.items()]
    if inspection.duplicates:
        rows.append(["kept", "of these masked as near-duplicates", str(inspection.duplicates)])
    title = f"{inspection.total} samples of {inspection.shards} shards"
    reporter.table(title, ["status", "reason", "samples"], rows)
    for line in unjudged_lines(inspection.unjudged):
        reporter.outcome(line)
    say_shard_problems(inspection.shard_problems, inspection.shards, reporter)
    rows = [
        [str(b.bucket), str(b.clips), clock(b.seconds) if b.seconds else "–", size(b.size_bytes)]
        for b in inspection.buckets
    ]
    reporter.table("buckets", ["frames x height x width", "clips", "length", "bytes"], rows)
    rows = [
        [
            kind,
            *(f"{quantile:.0f}" for quantile in _quantiles(words)),
            str(words.count(0)),
        ]
        for kind, words in inspection.caption_words.items()
        if words
    ]
    reporter.table("words of a caption", ["", "least", "median", "95%", "most", "empty"], rows)
    if inspection.channels is not None:
        rows = [
            [str(c), f"{inspection.channels.shift[c]:+.2f}", f"{inspection.channels.scale[c]:.2f}"]
            for c in furthest(inspection.channels)[:6]
        ]
        count = inspection.channels.records
        title = f"channels furthest from the codec's own statistics ({count} records)"
        reporter.table(title, ["channel", "(mean - codec's) / codec's std", "std / codec's"], rows)
    rows = [[kind, size(count)] for kind, count in inspection.size_bytes.items() if count]
    reporter.table("bytes on disk", ["", ""], rows)


def furthest(channels: Channels) -> list[int]:
    """Channels by how far mean and standard deviation are from the codec's, the furthest first."""
    with np.errstate(divide="ignore"):
        distance = np.maximum(np.abs(channels.shift), np.abs(np.log(channels.scale)))
    return [int(c) for c in np.argsort(-distance, kind="stable")]


def render(inspection: Inspection, kept: list[Picture], dropped: list[Picture]) -> str:
    """The page as text; every picture is in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "j2"]),
    )
    environment.filters |= {"size": size, "clock": clock}
    fps = inspection.info.fps
    return environment.get_template("inspect.html.j2").render(
        inspection=inspection,
        name=inspection.root.rstrip("/").rpartition("/")[2],
        unjudged=unjudged_lines(inspection.unjudged),
        seconds=sum(b.seconds for b in inspection.buckets),
        latents_bytes=inspection.size_bytes["latents"],
        histograms={kind: histogram(words) for kind, words in inspection.caption_words.items()},
        channels=_channel_marks(inspection.channels) if inspection.channels is not None else [],
        kept=[(picture, thumbnail(picture.frames, fps)) for picture in kept],
        dropped=[(picture, thumbnail(picture.frames, fps)) for picture in dropped],
    )


def histogram(values: list[int]) -> list[Bar]:
    """Up to twelve bars of whole-number bins.

    >>> [(bar.label, bar.count) for bar in histogram([3, 4, 4, 6])]
    [('3', 1), ('4', 2), ('5', 0), ('6', 1)]
    """
    if not values:
        return []
    low, high = min(values), max(values)
    step = -(-(high - low + 1) // _BINS)
    starts = range(low, high + 1, step)
    counts = [sum(start <= v < start + step for v in values) for start in starts]
    labels = [str(s) if step == 1 else f"{s}–{s + step - 1}" for s in starts]
    top = max(counts)
    return [Bar(label, n, n / top) for label, n in zip(labels, counts, strict=True)]


def _channel_marks(channels: Channels) -> list[dict[str, Any]]:
    """Every channel as an interval mean ± std in the codec's units, clipped to ±3."""
    marks = []
    for channel, (shift, scale) in enumerate(zip(channels.shift, channels.scale, strict=True)):
        low, high = (float(np.clip(shift + sign * scale, -3, 3)) for sign in (-1, 1))
        middle = float(np.clip(shift, -3, 3))
        words = f"channel {channel}: mean {shift:+.2f}, std {scale:.2f} in the codec's units"
        marks.append({"low": low, "high": high, "middle": middle, "words": words})
    return marks


def thumbnail(frames: Frames | None, fps: float) -> str:
    """A `data:` URI of a WebP, moving where there are several frames; empty where there is none."""
    if frames is None:
        return ""
    height, width = frames.shape[1:3]
    scale = _THUMBNAIL_SIDE / max(height, width)
    to = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(f).resize(to, Image.Resampling.BICUBIC) for f in frames]
    buffer = io.BytesIO()
    moving = {
        "save_all": True,
        "append_images": pictures[1:],
        "duration": round(1000 / fps),
        "loop": 0,
    }
    pictures[0].save(buffer, "WEBP", quality=72, **(moving if len(pictures) > 1 else {}))
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def clock(seconds: float) -> str:
    """A length of time for people.

    >>> clock(4.25), clock(3725)
    ('4.2 s', '1:02:05')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
