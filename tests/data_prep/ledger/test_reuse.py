"""After a change of settings or shard: the bytes as from scratch, and no more work than needed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_prep.captions.config import CaptionConfig
from data_prep.captions.measured import MeasuredCaptioner
from data_prep.config import FilterConfig, PrepareConfig
from data_prep.ledger.manifest import read_manifest, write_manifest
from data_prep.storage.store import open_folder
from flow.codec import VideoCodec, build_vae, save_codec
from media.read import VideoReader
from tests.data_prep.in_process import digests, prepare_locally
from tests.tiny_codec import CODEC

Change = Callable[[PrepareConfig], PrepareConfig]


class Work(NamedTuple):
    """How many videos were decoded, clips captioned and clips encoded."""

    decoded: int
    captioned: int
    encoded: int


NOTHING = Work(decoded=0, captioned=0, encoded=0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the decoder, the captioner and the encoder since it was last cleared."""
    counts: Counter[str] = Counter()

    def count(name: str, owner: type, method: str) -> None:
        original = getattr(owner, method)

        def call(self: Any, *args: Any, **named: Any) -> Any:
            counts[name] += 1
            return original(self, *args, **named)

        monkeypatch.setattr(owner, method, call)

    count("decoded", VideoReader, "read")
    count("captioned", MeasuredCaptioner, "caption")
    count("encoded", VideoCodec, "encode")
    return counts


def filters(**changes: Any) -> Change:
    return lambda config: config.model_copy(
        update={"filters": config.filters.model_copy(update=changes)}
    )


def settings(**changes: Any) -> Change:
    return lambda config: config.model_copy(update=changes)


def buckets(**changes: Any) -> Change:
    return lambda config: config.model_copy(
        update={"bucket": config.bucket.model_copy(update=changes)}
    )


@pytest.fixture
def scored(world: list[str], tmp_path: Path) -> str:
    """A shard of four clips with matching scores 0.1 to 0.4."""
    return write_scored(tmp_path / "scored.tar", world[0], [0.1, 0.2, 0.3, 0.4])


def write_scored(path: Path, source: str, scores: list[float]) -> str:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(source) as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            members.setdefault(stem, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for (stem, files), score in zip(sorted(members.items()), scores, strict=False):
            files["json"] = json.dumps({"matching_score": score}).encode()
            for suffix, data in sorted(files.items()):
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


class Output:
    """An output that is prepared twice, and the same from scratch."""

    def __init__(self, folder: Path, shard: str, calls: Counter[str]) -> None:
        self.folder, self.fresh = folder / "out", folder / "fresh"
        self.shard, self.calls = shard, calls

    def prepare(self, config: PrepareConfig, codec: Path, **how: Any) -> Work:
        """What was made, on top of what stands."""
        self.calls.clear()
        prepare_locally(config, [self.shard], self.folder, codec, redo=True, **how)
        return Work(*(self.calls[name] for name in Work._fields))

    def is_as_from_scratch(self, config: PrepareConfig, codec: Path) -> bool:
        prepare_locally(config, [self.shard], self.fresh, codec)
        return digests(self.folder) == digests(self.fresh)


@pytest.fixture
def output(tmp_path: Path, scored: str, calls: Counter[str]) -> Output:
    return Output(tmp_path, scored, calls)


@pytest.fixture
def base(config: PrepareConfig) -> PrepareConfig:
    filters = FilterConfig(matching_score_above=0.15)
    captioner = CaptionConfig(backend="measured", any_video=True)
    return config.model_copy(update={"filters": filters, "captioner": captioner})


@pytest.mark.parametrize(
    ("change", "work"),
    [
        # Three of four clips pass at 0.15. Of metadata filters only the verdicts are new.
        pytest.param(filters(matching_score_above=0.25), NOTHING, id="stricter metadata"),
        pytest.param(filters(matching_score_above=0.05), Work(1, 1, 1), id="laxer metadata"),
        # Pixels have to be seen again, but what passes is not encoded again.
        pytest.param(filters(static_below=0.01), Work(3, 0, 0), id="pixels, all pass"),
        pytest.param(filters(static_below=255.0), Work(3, 0, 0), id="pixels, none passes"),
        pytest.param(filters(crop_bars=True), Work(3, 0, 0), id="bars, none there"),
        pytest.param(settings(keep_logvar=False), Work(3, 0, 3), id="precision"),
        pytest.param(settings(images=False), Work(3, 0, 0), id="images, none there"),
        pytest.param(settings(seed=1), Work(3, 3, 3), id="other windows"),
        pytest.param(
            buckets(aspects=("1:1", "2:1")), Work(3, 0, 0), id="a bucket that none goes to"
        ),
        pytest.param(buckets(height=48, width=48), Work(3, 3, 3), id="another size"),
        pytest.param(buckets(frame_counts=(5,)), Work(3, 0, 0), id="the same length as a list"),
        # A square of 24p has sides of 32, as before.
        pytest.param(buckets(resolutions=("24p", "36p")), Work(3, 3, 3), id="a resolution more"),
    ],
)
def test_changed_settings_redo_only_what_they_affect(
    base: PrepareConfig, output: Output, codec_dir: Path, change: Change, work: Work
) -> None:
    assert output.prepare(base, codec_dir) == Work(3, 3, 3)
    assert output.prepare(change(base), codec_dir) == work
    assert output.is_as_from_scratch(change(base), codec_dir)


def test_another_codec_keeps_the_captions(
    base: PrepareConfig, output: Output, codec_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "codec"
    save_codec(build_vae(CODEC), other)
    output.prepare(base, codec_dir)
    assert output.prepare(base, other) == Work(decoded=3, captioned=0, encoded=3)
    assert output.is_as_from_scratch(base, other)


def test_a_new_captioner_and_a_new_filter_at_once_keep_the_latents(
    base: PrepareConfig, output: Output, codec_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.prepare(base, codec_dir)
    monkeypatch.setattr(PrepareConfig, "caption_digest", lambda self: "another captioner")

    def caption(self: object, frames: object) -> str:
        output.calls["captioned"] += 1
        return "Other words."

    monkeypatch.setattr("data_prep.captions.measured.MeasuredCaptioner.caption", caption)
    other = filters(matching_score_above=0.25)(base)
    assert output.prepare(other, codec_dir) == Work(decoded=2, captioned=2, encoded=0)
    assert output.is_as_from_scratch(other, codec_dir)


def test_of_a_changed_shard_only_the_changed_samples_are_made(
    base: PrepareConfig, output: Output, world: list[str], codec_dir: Path
) -> None:
    output.prepare(base, codec_dir)
    # One json is corrected, which lets its clip in; another changes, and its clip stays as it is.
    write_scored(Path(output.shard), world[0], [0.9, 0.2, 0.35, 0.4])
    assert output.prepare(base, codec_dir) == Work(decoded=2, captioned=1, encoded=1)
    assert output.is_as_from_scratch(base, codec_dir)


def test_several_windows_are_taken_over_whole(
    base: PrepareConfig, output: Output, codec_dir: Path
) -> None:
    several = settings(windows_per_clip=3)(base)
    assert output.prepare(several, codec_dir).encoded > 3
    other = filters(matching_score_above=0.25)(several)
    assert output.prepare(other, codec_dir) == NOTHING
    assert output.is_as_from_scratch(other, codec_dir)


def test_of_several_resolutions_one_is_left_out_without_encoding_another(
    base: PrepareConfig, output: Output, codec_dir: Path
) -> None:
    several = buckets(resolutions=("24p", "36p"), frame_counts=(17, 5))(base)
    assert output.prepare(several, codec_dir, shuffle=1, stop_after=2).encoded > 0
    assert output.prepare(several, codec_dir).encoded > 0
    assert output.is_as_from_scratch(several, codec_dir)
    shutil.rmtree(output.fresh)
    one = buckets(resolutions=("36p",))(several)
    # Which window a caption is of goes by its frames too.
    assert output.prepare(one, codec_dir) == Work(3, 0, 0)
    assert output.is_as_from_scratch(one, codec_dir)


def test_a_redo_that_is_stopped_goes_on_to_the_same_bytes(
    base: PrepareConfig, output: Output, codec_dir: Path
) -> None:
    other = filters(static_below=0.01)(base)
    output.prepare(base, codec_dir)
    assert output.prepare(other, codec_dir, shuffle=1, stop_after=2).encoded == 0
    assert output.prepare(other, codec_dir).encoded == 0
    assert output.is_as_from_scratch(other, codec_dir)


def test_a_lost_latent_file_is_made_anew(
    base: PrepareConfig, output: Output, codec_dir: Path
) -> None:
    other = filters(static_below=0.01)(base)
    output.prepare(base, codec_dir)
    for path in (output.folder / "latents").iterdir():
        path.unlink()
    assert output.prepare(other, codec_dir) == Work(decoded=3, captioned=3, encoded=3)
    assert output.is_as_from_scratch(other, codec_dir)


def test_a_manifest_of_before_there_were_digests_is_no_help_and_no_harm(
    base: PrepareConfig, output: Output, codec_dir: Path
) -> None:
    other = filters(static_below=0.01)(base)
    output.prepare(base, codec_dir)
    folder = open_folder(output.folder)
    manifest = read_manifest(folder, "scored")
    assert manifest is not None
    write_manifest(folder, replace(manifest, outcome_digest=None, encode_digest=None))
    assert "outcome_digest" not in (output.folder / "manifests" / "scored.json").read_text()
    assert output.prepare(other, codec_dir) == Work(decoded=3, captioned=0, encoded=3)
    assert output.is_as_from_scratch(other, codec_dir)
