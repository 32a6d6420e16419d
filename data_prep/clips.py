"""From a video to a clip: which frames, and how each is cut to the bucket.

Pure functions of timestamps, pixels, seed and key; knows nothing of decoders, Ray or files.

    ClipTooShort(ValueError)   too_short: the source ends before the window does
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

Frames = npt.NDArray[np.uint8]


class ClipTooShort(ValueError):
    """The source is shorter than the window."""

    reason = "too_short"


def unit_hash(seed: int, key: str) -> float:
    """A number in [0, 1) from (seed, key) alone.

    >>> unit_hash(0, "a") == unit_hash(0, "a") != unit_hash(1, "a")
    True
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_window(
    pts_s: npt.NDArray[np.float64], num_frames: int, fps: float, *, seed: int, key: str
) -> list[int]:
    """Indices of the frames of one window: `num_frames` of them at `fps`, by real timestamps.

    The window starts at a frame chosen by hash(seed, key); each target time takes the source frame
    nearest to it, so that a source of a lower rate repeats frames and one of a higher rate skips.

    Args:
        pts_s: [N] presentation times, seconds, not falling.
        num_frames: frames wanted.
        fps: target rate, frames per second.
        seed: the run's seed.
        key: the sample's key.

    Raises:
        ClipTooShort: the last target time lies more than half a target step past the last frame.
    """
    span_s = (num_frames - 1) / fps
    room_s = float(pts_s[-1]) - span_s if len(pts_s) else -span_s
    if not len(pts_s) or room_s < -0.5 / fps:
        have_s = float(pts_s[-1]) if len(pts_s) else 0.0
        raise ClipTooShort(
            f"the video's last frame is at {have_s:.3f} s; {num_frames} frames at {fps:g} fps "
            f"need one at {span_s:.3f} s"
        )
    wanted_s = unit_hash(seed, key) * max(0.0, room_s)
    # Starting on a source frame keeps an even step wherever the rates divide.
    start_s = float(pts_s[np.searchsorted(pts_s, wanted_s, side="right") - 1])
    targets_s = start_s + np.arange(num_frames) / fps
    after = np.clip(np.searchsorted(pts_s, targets_s, side="left"), 1, max(1, len(pts_s) - 1))
    if len(pts_s) == 1:
        return [0] * num_frames
    before_is_nearer = targets_s - pts_s[after - 1] <= pts_s[after] - targets_s
    return [int(i) for i in after - before_is_nearer]


def crop_box(
    height: int, width: int, to_height: int, to_width: int
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box with the target's aspect, in pixels.

    >>> crop_box(360, 640, 64, 64)
    (140.0, 0.0, 500.0, 360.0)
    """
    scale = min(height / to_height, width / to_width)
    box_height, box_width = to_height * scale, to_width * scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def fit_frame(frame_HW3: Frames, to_height: int, to_width: int) -> Frames:
    """Centre crop to the target's aspect, then resize: uint8 [to_height, to_width, 3]."""
    height, width = frame_HW3.shape[:2]
    if (height, width) == (to_height, to_width):
        return frame_HW3
    box = crop_box(height, width, to_height, to_width)
    # Pillow widens the bilinear filter when it shrinks, which is the antialiasing.
    picture = Image.fromarray(frame_HW3).resize(
        (to_width, to_height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(picture, dtype=np.uint8)
