"""The videos a model learns are those of its dataset; what is stated otherwise is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.latents.dataset import LatentDataset
from flow.codec_factors import SD_FACTORS, WAN_FACTORS
from flow.model_folder import VideoSpec
from tests.training.world import write_dataset
from training.stated_video import StatedVideo, VideoMismatch, video_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Clips of 9 frames, 64x64 pixels, 8 fps; and images."""
    return LatentDataset(write_dataset(tmp_path_factory.mktemp("latents") / "data"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Most clips 48x80, fewer 64x64."""
    folder = tmp_path_factory.mktemp("latents") / "data"
    return LatentDataset(write_dataset(folder, clips=16, more_buckets={(48, 80): 48}))


def refusal(dataset: LatentDataset, stated: StatedVideo) -> str:
    with pytest.raises(VideoMismatch) as caught:
        video_spec(dataset, stated, WAN_FACTORS)
    message = str(caught.value)
    assert "\n" not in message
    assert str(dataset.root) in message
    return message


def test_where_nothing_is_stated_the_dataset_decides(dataset: LatentDataset) -> None:
    assert video_spec(dataset, StatedVideo(), WAN_FACTORS) == VideoSpec(9, 64, 64, 8.0, 16, 4)


def test_what_is_stated_as_it_is_changes_nothing(dataset: LatentDataset) -> None:
    for stated in (
        StatedVideo(9, 64, 64, 8.0),
        StatedVideo(sizes=((64, 64),)),
        StatedVideo(frame_counts=(17, 9)),
    ):
        assert video_spec(dataset, stated, WAN_FACTORS) == VideoSpec(9, 64, 64, 8.0, 16, 4)


@pytest.mark.parametrize(
    ("stated", "parts"),
    [
        (
            StatedVideo(9, 128, 128, 8.0),
            (
                "prepare.bucket states height 128, width 128",
                "9x64x64",
                "--set prepare.bucket.width=64",
            ),
        ),
        (StatedVideo(num_frames=17), ("states num_frames 17", "--set prepare.bucket.num_frames=9")),
        (StatedVideo(fps=16.0), ("states fps 16", "at 8 fps", "--set prepare.bucket.fps=8")),
        (StatedVideo(sizes=((64, 64), (48, 80))), ("states sizes 64x64, 48x80", "sizes=[[64,64]]")),
        (
            StatedVideo(frame_counts=(33, 17)),
            ("states frame_counts 33, 17, but", "--set 'prepare.bucket.frame_counts=[9]'"),
        ),
    ],
)
def test_what_is_stated_otherwise_is_refused_naming_both(
    dataset: LatentDataset, stated: StatedVideo, parts: tuple[str, ...]
) -> None:
    message = refusal(dataset, stated)
    assert all(part in message for part in parts), message
    assert "or prepare them again" in message


def test_only_what_differs_is_named(dataset: LatentDataset) -> None:
    message = refusal(dataset, StatedVideo(9, 64, 128, 8.0))
    assert "states width 128, but" in message
    assert "bucket.height" not in message


def test_of_several_buckets_it_is_the_one_with_most_clips(several: LatentDataset) -> None:
    assert video_spec(several, StatedVideo(), WAN_FACTORS) == VideoSpec(9, 48, 80, 8.0, 16, 4)


def test_of_several_buckets_it_is_the_one_that_is_stated(several: LatentDataset) -> None:
    spec = video_spec(several, StatedVideo(height=64, width=64), WAN_FACTORS)
    assert (spec.height, spec.width) == (64, 64)
    assert "9x48x80, 9x64x64" in refusal(several, StatedVideo(height=32))
    # The way out keeps as much as it can of what is stated.
    message = refusal(several, StatedVideo(17, 64, 64))
    assert "states num_frames 17, but" in message
    assert message.count("--set") == 1
    both = video_spec(several, StatedVideo(sizes=((48, 80), (64, 64))), WAN_FACTORS)
    assert (both.height, both.width) == (48, 80)


def test_a_size_that_was_cut_for_and_has_no_clip_may_be_stated(tmp_path: Path) -> None:
    # Of nine aspects, real clips may have one: the dataset was prepared for all of them.
    dataset = LatentDataset(write_dataset(tmp_path / "data", more_buckets={(48, 80): 0}))
    assert {bucket[1:] for bucket in dataset.buckets} == {(64, 64)}
    stated = StatedVideo(sizes=((48, 80), (64, 64)))
    assert video_spec(dataset, stated, WAN_FACTORS) == VideoSpec(9, 64, 64, 8.0, 16, 4)
    # A model is of what there are clips of.
    assert "states sizes 48x80" in refusal(dataset, StatedVideo(sizes=((48, 80),)))


def test_factors_are_the_codecs(dataset: LatentDataset) -> None:
    assert video_spec(dataset, StatedVideo(), SD_FACTORS).factors == SD_FACTORS


def test_a_model_of_images_makes_single_frames(dataset: LatentDataset, tmp_path: Path) -> None:
    stated = StatedVideo(9, 64, 64, 8.0)
    assert video_spec(dataset, stated, WAN_FACTORS, longest=1).num_frames == 1
    images = LatentDataset(write_dataset(tmp_path / "data", clips=0))
    assert video_spec(images, stated, WAN_FACTORS).num_frames == 1


def test_an_empty_split_is_said(tmp_path: Path) -> None:
    # The one clip's key happens to be held out.
    empty = LatentDataset(write_dataset(tmp_path / "data", clips=1, images=0))
    assert "train split" in refusal(empty, StatedVideo())
