"""How steady a video is in time: flicker, and error along the optical flow.

Flicker is what a pixel does against its neighbours in time: its distance from the median of itself,
the frame before and the frame after. An edge that passes makes a pixel go one way and adds nothing;
what goes up and down again does. The optical flow is scikit-image's iterative Lucas-Kanade on
brightness. Both figures are of a video by itself, so they stand beside those of real clips. Knows
pixels. Knows nothing of models or files.

Shapes: N clips, T frames, H, W pixels; frames uint8 [N, T, H, W, 3], flow [2, H, W] as (rows,
columns).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from media.frames import Frames

PAIRS = 8
"""Pairs of neighbouring frames that are measured in a clip, spread evenly over it."""

Field = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steadiness:
    """Of one set of clips; grey levels of 255.

    Attributes:
        flicker: mean |f(t) - median of f(t-1), f(t), f(t+1)|; nan for clips of two frames.
        warp_error: root mean square of f(t) - f(t+1) taken back along the optical flow, over pixels
            that are in both frames.
        pairs: pairs of frames along whose flow was measured.
    """

    flicker: float
    warp_error: float
    pairs: int


def steadiness(
    frames_NTHWC: Frames, progress: Callable[[int, int], None] = lambda done, total: None
) -> Steadiness:
    """Flicker and flow-warp error of clips of at least two frames."""
    count, length = frames_NTHWC.shape[:2]
    times = np.unique(np.linspace(0, length - 2, min(PAIRS, length - 1)).round().astype(int))
    errors = visible = 0.0
    for done, clip in enumerate(frames_NTHWC):
        for t in times:
            first, second = (frame.astype(np.float64) for frame in clip[t : t + 2])
            forward, back = optical_flow(first, second), optical_flow(second, first)
            in_both = seen_in_both(forward, back)
            squared = ((first - warped(second, forward)) ** 2).mean(axis=-1)
            errors += float(squared[in_both].sum())
            visible += float(in_both.sum())
        progress(done + 1, count)
    return Steadiness(
        flicker=flicker(frames_NTHWC),
        warp_error=float(np.sqrt(errors / visible)) if visible else float("nan"),
        pairs=count * len(times),
    )


def flicker(frames_NTHWC: Frames) -> float:
    """Mean distance of a pixel from the median of itself and its neighbours in time; grey levels.

    >>> ramp = np.arange(0, 50, 10, dtype=np.uint8)
    >>> frames = np.broadcast_to(ramp[None, :, None, None, None], (1, 5, 4, 4, 3))
    >>> flicker(frames), flicker(frames[:, [0, 2, 1, 3, 2]])
    (0.0, 10.0)
    """
    if frames_NTHWC.shape[1] < 3:
        return float("nan")
    before, here, after = (frames_NTHWC[:, i : frames_NTHWC.shape[1] - 2 + i] for i in range(3))
    low, high = np.minimum(before, after), np.maximum(before, after)
    median = np.clip(here, low, high)
    # Unsigned: the larger minus the smaller, never the other way round.
    return float((np.maximum(here, median) - np.minimum(here, median)).mean())


def optical_flow(first_HWC: Field, second_HWC: Field) -> Field:
    """Where each pixel of the first frame is in the second: shifts in pixels, [2, H, W]."""
    from skimage.registration import optical_flow_ilk

    first, second = (frame.mean(axis=-1) / 255 for frame in (first_HWC, second_HWC))
    return np.asarray(optical_flow_ilk(first, second, radius=5, num_warp=5), dtype=np.float64)


def warped(frame_HWC: Field, flow: Field) -> Field:
    """A frame taken back along a flow: at each pixel, what the flow says it has become."""
    from scipy.ndimage import map_coordinates

    rows, columns = np.mgrid[0 : frame_HWC.shape[0], 0 : frame_HWC.shape[1]]
    at = np.stack([rows + flow[0], columns + flow[1]])
    planes = [
        map_coordinates(frame_HWC[..., c], at, order=1, mode="nearest")
        for c in range(frame_HWC.shape[-1])
    ]
    return np.stack(planes, axis=-1)


def seen_in_both(forward: Field, back: Field) -> npt.NDArray[np.bool_]:
    """Pixels [H, W] that a walk forward and back brings home, and that stay in the picture.

    |w + w'|² < 0.01 (|w|² + |w'|²) + 0.5, w' taken at where w leads. Source: Sundaram et al. 2010,
    as Lai et al. 2018 use it for the warp error.
    """
    there = warped(np.moveaxis(back, 0, -1), forward)
    home = np.moveaxis(there, -1, 0)
    height, width = forward.shape[1:]
    rows, columns = np.mgrid[0:height, 0:width]
    inside = (rows + forward[0] >= 0) & (rows + forward[0] <= height - 1)
    inside &= (columns + forward[1] >= 0) & (columns + forward[1] <= width - 1)
    gap = ((forward + home) ** 2).sum(axis=0)
    return np.asarray(inside & (gap < 0.01 * ((forward**2 + home**2).sum(axis=0)) + 0.5))
