"""`measured` captions moving shapes and no other video, unless it is asked to."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.captions.captioner import CaptionerUnfit
from data_prep.captions.config import CaptionConfig
from data_prep.config import PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.run import plan_caption_run, plan_run, shards_left
from data_prep.sources.samples import write_shard
from pipeline.console import Reporter
from pipeline.tables import say_prepared
from tests.data_prep.bad_media import moving, video
from tests.data_prep.in_process import caption_locally, digests, prepare_locally
from tests.pipeline.command import refused


@pytest.fixture
def planet(tmp_path: Path) -> str:
    """A shard of two videos that are not of the moving-shapes world."""
    clip = video(moving(20))
    samples = [{"__key__": key, "mp4": clip, "txt": f"A planet {key}."} for key in "ab"]
    write_shard(tmp_path / "planet.tar", samples)
    return str(tmp_path / "planet.tar")


def with_captioner(config: PrepareConfig, captioner: CaptionConfig) -> PrepareConfig:
    return config.model_copy(update={"captioner": captioner})


def captions(out: Path) -> dict[str, tuple[str, str]]:
    dataset = LatentDataset(out, "all")
    return {name: dataset.captions(name) for ids in dataset.buckets.values() for name in ids}


def test_by_default_other_video_keeps_its_own_captions_and_no_synthetic_ones(
    config: PrepareConfig,
    planet: str,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    report = prepare_locally(config, [planet, world[0]], out, codec_dir)
    found = captions(out)
    assert found["planet/a/0"] == ("A planet a.", "")
    assert all(synthetic for name, (_, synthetic) in found.items() if "planet" not in name)
    assert report.captions_failed == {"not_moving_shapes": 2}
    say_prepared(report, Reporter())
    text = capsys.readouterr().out
    assert "2 kept clips have no synthetic caption" in text
    assert "training reads their original captions" in text
    assert "tries them again" not in text
    # The same captioner would refuse them again, so it is not asked again.
    assert plan_caption_run(config, None, out).jobs == ()


def test_measured_is_refused_before_anything_is_written(
    config: PrepareConfig, planet: str, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    measured = with_captioner(config, CaptionConfig(backend="measured"))
    for ask in (shards_left, plan_run):
        with pytest.raises(CaptionerUnfit, match=r"planet\.tar \(a\) is other video; choose auto"):
            ask(measured, [planet], tmp_path / "out", str(codec_dir))
    assert not list((tmp_path / "out").glob("*"))
    # Data of both kinds is judged sample by sample.
    report = prepare_locally(measured, [planet, world[0]], tmp_path / "both", codec_dir)
    assert report.captions_failed == {"not_moving_shapes": 2}

    prepare_locally(config, [planet], tmp_path / "auto", codec_dir)
    before = digests(tmp_path / "auto")
    with pytest.raises(CaptionerUnfit, match="other video"):
        caption_locally(measured, None, tmp_path / "auto")
    assert digests(tmp_path / "auto") == before


def test_measured_captions_any_video_where_it_is_asked_to(
    config: PrepareConfig, planet: str, codec_dir: Path, tmp_path: Path
) -> None:
    asked = with_captioner(config, CaptionConfig(backend="measured", any_video=True))
    report = prepare_locally(asked, [planet], tmp_path, codec_dir)
    assert not report.captions_failed
    assert all(synthetic for _, synthetic in captions(tmp_path).values())
    with pytest.raises(ValueError, match=r"any_video is for captioner\.backend 'measured'"):
        CaptionConfig(backend="auto", any_video=True)


def test_none_writes_no_captions_and_a_later_captioner_does(
    config: PrepareConfig, planet: str, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    none = with_captioner(config, CaptionConfig(backend="none", give_up_after=1))
    out = tmp_path / "out"
    report = prepare_locally(none, [planet, world[0]], out, codec_dir)
    assert report.captions_failed == {"no_captioner": report.counts["kept"]}
    assert not any(synthetic for _, synthetic in captions(out).values())
    assert plan_caption_run(none, None, out).jobs == ()
    caption_locally(config, None, out)
    prepare_locally(config, [planet, world[0]], tmp_path / "new", codec_dir)
    assert captions(out) == captions(tmp_path / "new")


def test_what_stands_of_refused_clips_is_reused(
    config: PrepareConfig, planet: str, codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, [planet], tmp_path / "out", codec_dir)
    filters = config.filters.model_copy(update={"matching_score_above": 0.1})
    other = config.model_copy(update={"filters": filters})
    report = prepare_locally(other, [planet], tmp_path / "out", codec_dir, redo=True)
    assert report.counts == {"kept": 2}
    prepare_locally(other, [planet], tmp_path / "new", codec_dir)
    assert digests(tmp_path / "out") == digests(tmp_path / "new")


def test_the_command_refuses_it_in_one_line(planet: str, tmp_path: Path) -> None:
    line = refused(
        *("prepare", "--shards", planet, "--out", str(tmp_path / "out")),
        *("--set", "prepare.captioner.backend=measured"),
    )
    assert "captioner.backend is measured, which writes of moving shapes only" in line
    assert "auto or none" in line
