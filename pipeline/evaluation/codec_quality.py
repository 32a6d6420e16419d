"""What a codec loses: PSNR and SSIM of its round trip, over whole clips and frame by frame.

Knows pixels. Knows nothing of models, captions or files.

Shapes: N clips, T frames, H, W pixels; frames uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flow.codec import VideoCodec
from media.frames import Frames
from training.codec.train import psnr_db

BATCH = 4
"""Clips that are encoded and decoded at once."""


@dataclass(frozen=True)
class CodecQuality:
    """The round trip against the clips themselves: encode, take the posterior's mean, decode.

    Attributes:
        psnr_db: over all pixels together, dB.
        ssim: mean structural similarity of frames, at most 1.
        psnr_db_by_frame, ssim_by_frame: of the frames at one place in time, first to last.
        psnr_db_change: mean of the last quarter of the frames minus that of the first, dB: near 0
            where quality is level over time.
        clips, frames: how many were measured, and how long each was.
    """

    psnr_db: float
    ssim: float
    psnr_db_by_frame: tuple[float, ...]
    ssim_by_frame: tuple[float, ...]
    psnr_db_change: float
    clips: int
    frames: int


@torch.no_grad()
def round_trip(
    codec: VideoCodec,
    frames_NTHWC: Frames,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Frames:
    """The clips as the codec gives them back, uint8 [N, T, H, W, 3]."""
    back = []
    for low in range(0, len(frames_NTHWC), BATCH):
        part = torch.from_numpy(np.ascontiguousarray(frames_NTHWC[low : low + BATCH]))
        mean, logvar = codec.encode(part)
        latents = codec.convention.to_model(mean, logvar, torch.zeros_like(mean))
        back.append(codec.decode(latents).cpu().numpy())
        progress(min(low + BATCH, len(frames_NTHWC)), len(frames_NTHWC))
    return np.concatenate(back)


def codec_quality(real_NTHWC: Frames, back_NTHWC: Frames) -> CodecQuality:
    """PSNR and SSIM of clips after a round trip, against the clips before it."""
    num_frames = real_NTHWC.shape[1]
    by_frame = [_psnr(back_NTHWC[:, t], real_NTHWC[:, t]) for t in range(num_frames)]
    ssim_NT = ssim(real_NTHWC, back_NTHWC)
    quarter = max(1, num_frames // 4)
    return CodecQuality(
        psnr_db=_psnr(back_NTHWC, real_NTHWC),
        ssim=float(ssim_NT.mean()),
        psnr_db_by_frame=tuple(by_frame),
        ssim_by_frame=tuple(float(value) for value in ssim_NT.mean(axis=0)),
        psnr_db_change=float(np.mean(by_frame[-quarter:])) - float(np.mean(by_frame[:quarter])),
        clips=len(real_NTHWC),
        frames=num_frames,
    )


def ssim(one_NTHWC: Frames, other_NTHWC: Frames) -> npt.NDArray[np.float64]:
    """Structural similarity of every frame, [N, T]: Gaussian windows of σ 1.5, mean over colours.

    Source: Wang et al. 2004, as scikit-image computes it.
    """
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            one,
            other,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        for one, other in zip(_frames(one_NTHWC), _frames(other_NTHWC), strict=True)
    ]
    return np.asarray(values, dtype=np.float64).reshape(one_NTHWC.shape[:2])


def _frames(frames_NTHWC: Frames) -> Frames:
    return frames_NTHWC.reshape(-1, *frames_NTHWC.shape[2:])


def _psnr(frames: Frames, reference: Frames) -> float:
    # Copies: a slice of all clips at one time has strides that torch refuses to share.
    pair = (torch.from_numpy(np.ascontiguousarray(each)) for each in (frames, reference))
    return psnr_db(*pair)
