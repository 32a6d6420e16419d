"""What frames are: uint8 arrays of RGB pixels. Knows nothing of how they are read or written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""Frames [T, H, W, 3] of a clip, or one frame [H, W, 3]: red, green, blue, each 0 to 255."""
