"""New captions for latents that stand: only captions change, whatever interrupts or fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.captions.captioner import CaptionerUnavailable, CaptionResult
from data_prep.captions.config import CaptionConfig
from data_prep.captions.stage import CaptionStage
from data_prep.clips.decode import DecodeStage
from data_prep.config import PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import LatentDatasetError
from data_prep.ledger.errors import SettingsChanged, SourceGone
from data_prep.sources.samples import write_shard
from media.errors import DecodeTimeout
from media.write import encode_mp4
from tests.data_prep.chat_endpoint import (
    Endpoint,
    completion,
    serving,
)
from tests.data_prep.in_process import (
    caption_locally,
    digests,
    prepare_locally,
)
from tests.data_prep.vlm_models import save_llava


@pytest.fixture(scope="module")
def by_model(config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    model = save_llava(tmp_path_factory.mktemp("vlm"))
    captioner = CaptionConfig(
        backend="vlm", model=str(model), frames=2, max_tokens=6, batch_size=3, dtype="float32"
    )
    return config.model_copy(update={"captioner": captioner})


def by_endpoint(config: PrepareConfig, endpoint: Endpoint, **values: Any) -> PrepareConfig:
    captioner = CaptionConfig(
        backend="http", model="m", endpoint=endpoint.url, backoff_s=0.01, retries=1, **values
    )
    return config.model_copy(update={"captioner": captioner})


def stamps(out: Path, *kinds: str) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for k in kinds for p in (out / k).iterdir()}


def rows(out: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((out / "captions").iterdir())
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


@pytest.mark.parametrize(("windows", "resolutions"), [(1, ()), (2, ()), (1, ("24p", "36p"))])
def test_only_captions_gives_what_a_whole_run_with_that_captioner_gives(
    config: PrepareConfig,
    by_model: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
    windows: int,
    resolutions: tuple[str, ...],
) -> None:
    bucket = config.bucket.model_copy(update={"resolutions": resolutions})
    change = {"windows_per_clip": windows, "bucket": bucket}
    config, by_model = config.model_copy(update=change), by_model.model_copy(update=change)
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_locally(config, world, out, codec_dir)
    prepare_locally(by_model, world, whole, codec_dir)
    before, times = digests(out), stamps(out, "latents", "status")
    report = caption_locally(by_model, None, out)
    assert (report.shards_now, report.total, report.captions_failed) == (3, 11, {})
    after = digests(out)
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"captions", "manifests", "prepare.json", "index.arrow"}
    assert stamps(out, "latents", "status") == times
    assert not any((out / "staging").iterdir())
    for name, digest in digests(whole).items():
        if not name.startswith("manifests"):
            assert after[name] == digest
    dataset = LatentDataset(out, "all")
    texts = {dataset.captions(i) for ids in dataset.buckets.values() for i in ids}
    written = [r for p in (whole / "captions").iterdir() for r in pq.read_table(p).to_pylist()]
    assert texts == {(r["caption"], r["synthetic"]) for r in written}
    assert {r["window"] for r in written} == set(range(windows * max(1, len(resolutions))))


def test_nothing_is_captioned_twice_until_the_captioner_changes(
    config: PrepareConfig,
    by_model: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
) -> None:
    prepare_locally(config, world, tmp_path, codec_dir)
    assert caption_locally(config, None, tmp_path).shards_now == 0
    assert caption_locally(by_model, world, tmp_path).shards_now == 3
    assert caption_locally(by_model, world, tmp_path).shards_now == 0
    assert prepare_locally(by_model, world, tmp_path, codec_dir).shards_now == 0
    # A whole run with another captioner redoes captions too, and back again.
    times = stamps(tmp_path, "latents", "status")
    first = digests(tmp_path)
    assert prepare_locally(config, world, tmp_path, codec_dir).shards_now == 3
    assert caption_locally(by_model, world, tmp_path).shards_now == 3
    assert stamps(tmp_path, "latents", "status") == times
    again = digests(tmp_path)
    assert {n for n in again if again[n] != first[n]} <= {n for n in again if "manifests" in n}


@pytest.mark.parametrize("stop", [1, 3, 6, 12])
def test_interrupted_anywhere_and_run_again_gives_the_same_bytes(
    config: PrepareConfig, by_model: PrepareConfig, world: list[str], codec_dir: Path,
    tmp_path: Path, stop: int,
) -> None:  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        prepare_locally(config, world, out, codec_dir)
    caption_locally(by_model, None, whole)
    caption_locally(by_model, None, broken, shuffle=4, stop_after=stop)
    assert len(LatentDataset(broken, "all")) == 11  # readable at every moment
    staged = sum(1 for _ in broken.glob("staging/*/*/*.arrow"))
    second = caption_locally(by_model, None, broken)
    assert second.samples_now <= 14 - staged
    assert staged or stop != 6
    assert digests(broken) == digests(whole)


def test_a_caption_that_fails_costs_no_latents_and_is_tried_again(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    with serving() as endpoint:
        asked = by_endpoint(config, endpoint)
        prepare_locally(asked, world, whole, codec_dir)
        victims = [body["messages"] for body in endpoint.requests[1:8:3]]
        assert len(victims) == 3

        def behave(e: Endpoint, r: Any, body: dict[str, Any]) -> Any:
            return completion("") if body["messages"] in victims else None

        endpoint.behave = behave
        report = prepare_locally(asked, world, out, codec_dir)
        assert report.counts == {"kept": 11}
        assert report.captions_failed == {"empty_caption": 3}
        assert len(LatentDataset(out, "all")) == 11
        failed = {key for key, row in rows(out).items() if row["caption_error"]}
        assert len(failed) == 3
        assert all(rows(out)[key]["synthetic"] == "" for key in failed)
        assert prepare_locally(asked, world, out, codec_dir).samples_now == 0

        victims.pop()
        endpoint.requests.clear()
        report = caption_locally(asked, None, out)
        assert report.captions_failed == {"empty_caption": 2}
        assert len(endpoint.requests) == 3  # the captions that stand were not asked for again
        victims.clear()
        assert caption_locally(asked, None, out).captions_failed == {}
        assert caption_locally(asked, None, out).shards_now == 0
    finished, expected = digests(out), digests(whole)
    for name in ("captions", "latents", "status"):
        assert {n: d for n, d in finished.items() if n.startswith(name)} == {
            n: d for n, d in expected.items() if n.startswith(name)
        }


def test_an_endpoint_that_is_gone_stops_the_run_which_goes_on_later(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, world, tmp_path, codec_dir)
    before = digests(tmp_path)
    with serving() as endpoint:
        asked = by_endpoint(config, endpoint, give_up_after=3)
        endpoint.behave = lambda e, r, body: completion("")
        with pytest.raises(CaptionerUnavailable, match=r"3 captions in a row.*empty_caption"):
            caption_locally(asked, None, tmp_path)
        after = digests(tmp_path)
        assert {n for n in after if after[n] != before[n]} == {"prepare.json"}
        endpoint.behave = lambda e, r, body: None
        assert caption_locally(asked, None, tmp_path).captions_failed == {}


def test_a_clip_that_breaks_the_captioner_costs_its_own_caption_only(
    by_model: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stage = CaptionStage(by_model)
    real = stage.captioner.caption_all

    def breaks(clips: Sequence[np.ndarray]) -> list[CaptionResult]:
        if any(clip[0, 0, 0, 0] == 7 for clip in clips):
            raise RuntimeError("out of memory at 0x7f00")
        return real(clips)

    monkeypatch.setattr(stage.captioner, "caption_all", breaks)
    clips = [np.full((5, 32, 32, 3), value, dtype=np.uint8) for value in (1, 7, 2)]
    undecided = [
        {
            "status": "",
            "number": n,
            "frames": c.tobytes(),
            "frames_shape": list(c.shape),
            "synthetic": None,
        }
        for n, c in enumerate(clips)
    ]
    decided = {"status": "dropped", "number": 9, "frames": None}
    first, second, *others = stage.process_all([undecided[0], decided, *undecided[1:]])
    assert second == decided
    assert [row["caption_error"] for row in (first, *others)] == [
        None, "internal_error: RuntimeError: out of memory at", None
    ]  # fmt: skip
    assert first["synthetic"] == real([clips[0]])[0].text


def test_sources_that_are_gone_or_changed_are_named_before_anything_is_written(
    config: PrepareConfig,
    by_model: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
) -> None:
    shards = []
    for number, source in enumerate(world):
        path = tmp_path / "in" / f"{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path(source).read_bytes())
        shards.append(path)
    out = tmp_path / "out"
    prepare_locally(config, [str(path) for path in shards], out, codec_dir)
    before = digests(out)
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceGone, match=r"0: cannot open shard.*--shards"):
        caption_locally(by_model, None, out)
    moved = [str(tmp_path / "elsewhere" / path.name) for path in shards]
    os.utime(moved[0], (1, 1))
    with pytest.raises(SourceGone, match=r"0: .*another size or time.*prepare.verify=true"):
        caption_locally(by_model, moved, out)
    assert digests(out) == before
    verify = by_model.model_copy(update={"verify": True})
    assert caption_locally(verify, moved, out).shards_now == 3
    # Of a shard whose content changed, the latents are stale too.
    Path(moved[1]).write_bytes(Path(world[2]).read_bytes())
    with pytest.raises(SourceGone, match=r"1: .*other bytes"):
        caption_locally(verify.model_copy(update={"captioner": CaptionConfig()}), moved, out)


def test_what_cannot_be_captioned_is_refused_or_named(
    config: PrepareConfig,
    by_model: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(LatentDatasetError, match=r"dataset\.json is missing"):
        caption_locally(by_model, None, tmp_path / "none")
    prepare_locally(config, world[:1], tmp_path, codec_dir)
    with pytest.raises(SettingsChanged, match="seed: 0 → 7"):
        caption_locally(by_model.model_copy(update={"seed": 7}), None, tmp_path)
    report = caption_locally(by_model, world, tmp_path)
    assert (report.shards_now, len(report.unprepared_shards)) == (1, 2)


def test_only_kept_clips_are_captioned_and_none_is_lost(
    config: PrepareConfig, by_model: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 64, 3), dtype=np.uint8)
    video = encode_mp4(frames, 16)
    samples = [
        {"__key__": "b", "mp4": video, "txt": "good"},
        {"__key__": "noise", "mp4": b"\7" * 300, "txt": "x"},
        {"__key__": "a", "mp4": video, "txt": "unicode ключ"},
        {"__key__": "dull", "mp4": video, "json": {"matching_score": "[0.1]"}},
    ]
    write_shard(tmp_path / "0.tar", samples)
    out = tmp_path / "out"
    prepare_locally(config, [str(tmp_path / "0.tar")], out, codec_dir)
    report = caption_locally(by_model, None, out)
    assert report.samples_now == 3  # two clips and the closing row
    captions = rows(out)
    assert list(captions) == ["a", "b"]
    assert captions["a"]["caption"] == "unicode ключ"
    assert captions["a"]["captioner"].startswith("vlm:")
    assert captions["a"]["caption_error"] is None


def test_a_clip_that_cannot_be_decoded_this_time_keeps_its_latents(
    config: PrepareConfig, by_model: PrepareConfig, world: list[str], codec_dir: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prepare_locally(config, world[:1], tmp_path, codec_dir)
    process = DecodeStage.process

    def slow(self: DecodeStage, row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == 1:
            raise DecodeTimeout("no frames in 30 s")
        return process(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(DecodeStage, "process", slow)
        report = caption_locally(by_model, None, tmp_path)
    assert report.counts == {"kept": 4}
    assert report.captions_failed == {"decode_timeout": 1}
    assert len(LatentDataset(tmp_path, "all")) == 4
    assert caption_locally(by_model, None, tmp_path).captions_failed == {}
