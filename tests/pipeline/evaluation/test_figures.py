"""Each family of figures on inputs whose figures are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data_prep.world.judge import judge
from data_prep.world.scene import SceneKinds
from flow.codec_factors import WAN_FACTORS
from flow.likelihood import noise_floor
from pipeline.evaluation import scenes
from pipeline.evaluation.codec_quality import codec_quality, ssim
from pipeline.evaluation.distances import frechet, sliced_wasserstein
from pipeline.evaluation.drift import drift, frames_for, look
from pipeline.evaluation.features import MissingPackageError, image_features, image_network, need
from pipeline.evaluation.physics import bounces, permanence
from pipeline.evaluation.prompt_following import Share, chances, shares
from pipeline.evaluation.steadiness import flicker, optical_flow, steadiness, warped
from serving.requests import ModelFacts

FACTS = ModelFacts("world", 17, 64, 64, 8.0, WAN_FACTORS)
KINDS = SceneKinds()


@dataclass(frozen=True)
class Said:
    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None
    camera: str | None = None


def clips(count: int, *, frames: int = 17, first: int = scenes.HELD_OUT_SEED) -> np.ndarray:
    chosen = scenes.held_out_scenes(count, 0, KINDS, first=first)
    return scenes.rendered(chosen, FACTS, num_frames=frames)


# Prompt following.


def test_an_attribute_counts_where_the_prompt_names_it() -> None:
    asked = [Said(colour="red", shape="ring"), Said(colour="blue"), Said(colour="green")]
    read = [Said(colour="red", shape="circle"), Said(colour="red"), Said()]
    found = shares(asked, read)
    assert found == {"colour": Share(1, 1, 3), "shape": Share(0, 0, 1)}
    assert chances(asked) == {"colour": 1 / 3, "shape": 1.0}


@pytest.mark.parametrize("right", [0, 1, 17, 32])
def test_wilsons_ends_are_where_the_normal_test_just_accepts(right: int) -> None:
    share = Share(right, 0, 32)
    for end in (share.low, share.high):
        off = abs(share.value - end)
        assert off == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 32), abs=1e-9)
    assert 0 <= share.low <= share.value <= share.high <= 1


def test_an_interval_holds_its_share_whatever_the_rounding() -> None:
    for count in range(1, 400):
        for right in (0, count // 2, count):
            share = Share(right, 0, count)
            assert 0 <= share.low <= share.value <= share.high <= 1


# Distances.


def test_frechet_of_gaussians_is_its_closed_form_and_symmetric() -> None:
    """Of commuting covariances it is |m - m'|² + |s - s'|²."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((400, 3))
    # Whitened, so that a sample's covariance is exactly the one it is scaled to.
    unit = (unit - unit.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(unit.T))).T
    a, b = unit * [1.0, 2.0, 3.0], unit[::-1] * [2.0, 2.0, 1.0] + [0.0, 5.0, 0.0]
    assert frechet(a, b) == pytest.approx(25 + 1 + 0 + 4)
    assert frechet(b, a) == pytest.approx(frechet(a, b))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_that_of_the_matrix_square_root() -> None:
    """The same by scipy's root of the product, of covariances that do not commute."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)) for _ in range(2))
    s, t = np.cov(a.T), np.cov(b.T)
    gap = a.mean(0) - b.mean(0)
    by_root = gap @ gap + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet(a, b) == pytest.approx(float(by_root))


def test_frechet_takes_fewer_vectors_than_dimensions() -> None:
    """It is then that of the few dimensions that the vectors span."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 6, 3))
    turn, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    wide = [np.pad(sample, ((0, 0), (0, 37))) @ turn for sample in (a, b)]
    assert frechet(*wide) == pytest.approx(frechet(a, b))


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_dimensions() -> None:
    a = np.random.default_rng(2).standard_normal((50, 16))
    shift = np.full(16, 0.5)
    found = sliced_wasserstein(a, a + shift, projections=20_000)
    assert found == pytest.approx(np.linalg.norm(shift) / 4, rel=0.03)
    assert found == sliced_wasserstein(a, a + shift, projections=20_000)
    with pytest.raises(ValueError, match="samples of 50 and 49 vectors"):
        sliced_wasserstein(a, a[1:])


def test_the_image_network_knows_what_photographs_show() -> None:
    """So its weights are the trained ones, and pictures are prepared as for its training."""
    from skimage import data

    espresso, cats = (967,), (281, 282, 285)
    pictures = (data.coffee()[:, 100:500], espresso), (data.chelsea()[:, :300], cats)
    for square, labels in pictures:
        features = image_features(square[None, None])
        assert features.shape == (1, 1280)
        classifier = image_network()._fc
        assert int(classifier(torch.from_numpy(features)).argmax()) in labels


def test_a_missing_package_is_one_line_that_says_what_to_type() -> None:
    need("numpy")
    with pytest.raises(MissingPackageError, match=r"pip install 'flowreel\[evaluate\]'"):
        need("numpy", "no_such_package")


# The codec's round trip.


def test_a_perfect_round_trip_and_a_known_error() -> None:
    real = clips(2, frames=5)
    same = codec_quality(real, real)
    assert same.psnr_db == math.inf
    assert same.ssim == 1.0
    assert (same.clips, same.frames) == (2, 5)
    off = codec_quality(np.full_like(real, 100), np.full_like(real, 110))
    assert off.psnr_db == pytest.approx(20 * math.log10(255 / 10))
    assert off.psnr_db_by_frame == pytest.approx([off.psnr_db] * 5)
    assert off.psnr_db_change == pytest.approx(0)


def test_psnr_of_a_frame_is_scikit_images() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    real, other = clips(2, frames=3), clips(2, frames=3, first=1)
    found = codec_quality(real, other)
    for t in range(3):
        wanted = peak_signal_noise_ratio(real[:, t], other[:, t], data_range=255)
        assert found.psnr_db_by_frame[t] == pytest.approx(wanted)


def test_quality_that_fades_shows_as_a_change() -> None:
    real = clips(1, frames=8)
    rng = np.random.default_rng(4)
    scale = np.arange(8)[None, :, None, None, None]
    faded = (real + scale * rng.standard_normal(real.shape)).clip(0, 255).round().astype(np.uint8)
    faded[:, 0, 0, 0] ^= 1  # the first frame too has an error, so that its PSNR is finite
    found = codec_quality(real, faded)
    assert found.psnr_db_change < -5
    assert ssim(real, faded)[0, 0] > ssim(real, faded)[0, -1]


# Steadiness.


def test_flicker_is_of_what_goes_up_and_down_and_not_of_what_passes() -> None:
    moving = np.zeros((1, 9, 8, 16, 3), np.uint8)
    for t in range(9):
        moving[:, t, :, : 2 + t] = 200
    assert flicker(moving) == 0
    blinking = np.full((1, 9, 8, 8, 3), 100, np.uint8)
    blinking[:, 1::2] = 110
    assert flicker(blinking) == 10


def test_optical_flow_takes_a_frame_back() -> None:
    rows, columns = np.mgrid[0:48, 0:48]

    def blob(shift: float) -> np.ndarray:
        near = np.exp(-((rows - 24) ** 2 + (columns - 22 - shift) ** 2) / 60)
        return np.repeat(200 * near[..., None], 3, axis=-1)

    first, second = blob(0), blob(2)
    back = warped(second, optical_flow(first, second))
    assert np.abs(back - first).mean() < 0.2 * np.abs(second - first).mean()


def test_real_clips_are_steadier_than_the_same_with_noise() -> None:
    real = clips(1, frames=4)
    rng = np.random.default_rng(5)
    noisy = (real + 8 * rng.standard_normal(real.shape)).clip(0, 255).astype(np.uint8)
    still, shaky = steadiness(real), steadiness(noisy)
    assert shaky.flicker > 3 * still.flicker
    assert shaky.warp_error > still.warp_error
    assert still.pairs == 3


# Drift.


def test_a_video_that_repeats_does_not_drift_and_one_that_fades_does() -> None:
    clip = clips(1, frames=9)[0]
    same = np.concatenate([clip] * 4)
    how = {"prompt": "a", "fps": 9.0, "window": 9, "every": 4, "sigma": 0.3}
    nats = [0.1] * 9
    found = drift(same, nats, [4.0, 2.0], **how)  # type: ignore[arg-type]
    assert found.worst == pytest.approx(0, abs=0.2)
    assert [round(w.end_s, 1) for w in found.windows] == [1.0, 2.3, 4.0]
    grey = same.mean(axis=-1, keepdims=True).repeat(3, -1)
    faded = np.concatenate([same[:9], (0.5 * same[9:] + 0.5 * grey[9:])]).astype(np.uint8)
    half = drift(faded, nats, [4.0], **how)  # type: ignore[arg-type]
    assert half.windows[-1].colour_ratio == pytest.approx(0.5, abs=0.05)
    assert half.worst > 0.4
    assert half.worst_to_20x is None, "36 frames are four times nine"


def test_twenty_times_the_trained_length_is_looked_at_by_itself() -> None:
    clip = clips(1, frames=5)[0]
    long = np.concatenate([clip] * 24)
    dark = long.copy()
    dark[100:] //= 2
    how = {"prompt": "a", "fps": 5.0, "window": 5, "every": 4, "sigma": 0.3}
    found = drift(dark, [0.1] * 30, [10.0, 23.0], **how)  # type: ignore[arg-type]
    assert [round(w.end_s, 1) for w in found.windows] == [1.0, 10.6, 16.2, 23.4]
    assert found.worst_to_20x == pytest.approx(0, abs=0.3)
    assert found.worst > 0.45


def test_own_nats_are_read_above_the_noise_floor() -> None:
    """The floor itself is 0, twice as far above it is 2, whatever the sign of the loss."""
    floor = noise_floor(0.3)
    nats = [9.0, floor + 0.1, floor + 0.1, floor + 0.2, floor + 0.2]
    frames = np.zeros((17, 8, 8, 3), np.uint8)
    found = drift(
        frames, nats, [17.0], prompt="a", fps=1.0, window=9, every=4, sigma=0.3
    )  # The first frame has none before it: its 9.0 is in no window.
    assert found.windows[0].nats_per_dim == pytest.approx(floor + 0.1)
    assert found.windows[1].excess_nats_ratio == pytest.approx(2.0)


def test_lengths_are_counts_that_the_codec_makes() -> None:
    for seconds in (0.5, 3.0, 30.0):
        count = frames_for(seconds, 16.0, 4)
        assert WAN_FACTORS.takes(count)
        assert count / 16.0 >= seconds


def test_sharpness_falls_with_blur() -> None:
    clip = clips(1, frames=1)[0]
    planes = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    padded = torch.nn.functional.pad(planes, (2, 2, 2, 2), mode="replicate")
    soft = torch.nn.functional.avg_pool2d(padded, 5, stride=1)
    blurred = soft.permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert look(blurred).sharpness < 0.8 * look(clip).sharpness
    assert look(blurred).background == pytest.approx(look(clip).background, abs=2)


# Physics: real clips obey the world's mechanics, as the judge sees them.


def test_real_bounces_keep_momentum() -> None:
    _, real = scenes.one_motion("bounce", 6, 0, KINDS, FACTS)
    found = bounces([judge(clip, fps=FACTS.fps) for clip in real], FACTS.fps)
    assert found.turned == 1
    assert found.momentum_ratio == pytest.approx(1, abs=0.1)
    _, straight = scenes.one_motion("left", 4, 0, KINDS, FACTS)
    assert bounces([judge(clip, fps=FACTS.fps) for clip in straight], FACTS.fps).turned == 0


def test_real_things_come_out_from_behind_a_bar_where_they_should() -> None:
    _, real = scenes.behind_bars(6, 0, KINDS, FACTS)
    found = permanence([judge(clip, fps=FACTS.fps) for clip in real])
    assert (found.hidden, found.came_out) == (1, 1)
    assert found.place_error < 0.08
    # One that stays away is not permanent: from the middle on, the picture has no thing.
    gone = np.concatenate([real[:, :9], real[:, 8:9].repeat(8, 1)], axis=1)
    assert permanence([judge(clip, fps=FACTS.fps) for clip in gone]).came_out == 0
