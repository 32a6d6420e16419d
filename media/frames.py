"""The type of decoded frames. The one home of the name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3], or [H, W, 3] of a single picture: RGB."""
