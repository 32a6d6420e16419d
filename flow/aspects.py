"""Pixel sizes of the buckets that the released models were trained on."""

from __future__ import annotations

import math

from flowreel.errors import FlowreelError


class SizeError(FlowreelError, ValueError):
    """A size that cannot be made; the message names the value and the rule."""


def bucket_size(target_size: int, aspect_ratio: str, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels of a bucket: the area of a square of side `target_size`, each side rounded to `multiple`.

    Args:
        target_size: 640 is called 480p, 512 is called 384p.
        aspect_ratio: "WIDTH:HEIGHT".
        multiple: pixels per latent cell of the codec.

    >>> bucket_size(640, "16:9", 16)
    (480, 848)
    """
    try:
        across, down = (int(part) for part in aspect_ratio.split(":"))
    except ValueError:
        across = down = 0
    if across < 1 or down < 1:
        raise SizeError(f"aspect ratio {aspect_ratio!r}: must be WIDTH:HEIGHT, such as 16:9")
    if target_size < multiple or multiple < 1:
        raise SizeError(f"target_size {target_size}: must be at least multiple, {multiple}")
    sides = (target_size * math.sqrt(r) for r in (down / across, across / down))
    height, width = (max(1, round(side / multiple)) * multiple for side in sides)
    return height, width
