"""Aspect ratios and resolutions by name, and the sizes of buckets made from them. Their one home.

Knows the nine names that the released models were trained with. Knows nothing of codecs or torch.
"""

from __future__ import annotations

import math
import re

from flowreel.errors import FlowreelError

ASPECTS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
"""WIDTH:HEIGHT of the released models' buckets: the words that a prompt may say."""


class SizeError(FlowreelError, ValueError):
    """A size that cannot be made; the message names the value and the rule."""


def ratio_of(aspect: str) -> float:
    """Width over height of a text such as 16:9. Raises SizeError on another form.

    >>> ratio_of("16:9")
    1.7777777777777777
    """
    across, colon, down = aspect.partition(":")
    whole = across.isdecimal() and down.isdecimal() and int(across) and int(down)
    if not (colon and whole):
        raise SizeError(
            f"aspect {aspect!r} is not WIDTH:HEIGHT in whole numbers of at least 1, such as 16:9"
        )
    return int(across) / int(down)


def area_of(resolution: str) -> float:
    """Pixels of a resolution such as 480p: those of a 16:9 picture of so many rows.

    So 480p is the area of a square of side 640, and 384p of one of side 512. Raises SizeError on
    another form.

    >>> area_of("480p") == 640**2, area_of("384p") == 512**2
    (True, True)
    """
    if not re.fullmatch(r"[1-9][0-9]{0,3}p", resolution):
        raise SizeError(f"resolution {resolution!r} is not ROWSp, such as 480p")
    return int(resolution[:-1]) ** 2 * 16 / 9


def nearest_aspect(height: int, width: int) -> str:
    """The named aspect nearest to a picture's, by ratio.

    >>> nearest_aspect(480, 848), nearest_aspect(480, 640)
    ('16:9', '5:4')
    """
    return min(ASPECTS, key=lambda name: abs(math.log(ratio_of(name) * height / width)))


def size_of(ratio: float, area: float, multiple: int) -> tuple[int, int]:
    """(height, width) of a rectangle near this ratio and area, each side rounded to `multiple`.

    >>> size_of(16 / 9, 64 * 64, 16)
    (48, 80)
    """
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    height, width = (max(1, round(side / multiple)) * multiple for side in sides)
    return height, width


def bucket_size(target_size: int, aspect_ratio: str, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels of a bucket of the area of a square of side `target_size`.

    Args:
        target_size: 640 is called 480p, 512 is called 384p.
        aspect_ratio: "WIDTH:HEIGHT".
        multiple: pixels per latent cell of the codec.

    >>> bucket_size(640, "16:9", 16)
    (480, 848)
    """
    if multiple < 1 or target_size < multiple:
        raise SizeError(f"target_size {target_size}: must be at least multiple, {multiple}")
    return size_of(ratio_of(aspect_ratio), target_size**2, multiple)
