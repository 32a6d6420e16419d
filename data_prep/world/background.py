"""The background of a scene: a still field of long waves that the camera moves over.

A field is a sum of plane waves, and a plane wave over a grid is a product of rows and columns. So
any part of it, at any scale, is one small matrix product, exact at every size, without a picture to
resample. Low contrast, hardly any colour, no wave shorter than 0.3 of the smaller side: a small
codec can draw it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.world.scene import Scene
from data_prep.world.vocabulary import TONES

Floats = npt.NDArray[np.float64]

_CLOUD_WAVES = 32
_LONG_WAVES = 3


@dataclass(frozen=True)
class Background:
    """Brightness as a function of the place in the world. K waves."""

    frequency_K2: Floats
    """Cycles per length, (down, right)."""
    phase_K: Floats
    """Radians."""
    amplitude_K: Floats
    slope_2: Floats
    """Brightness per length."""
    base_C: Floats
    """Mean colour, 0..1."""

    def picture(self, rows_H: Floats, columns_W: Floats) -> Floats:
        """The field at these rows and columns of the world, [H, W, 3] on the scale 0..255."""
        down_HK = 2 * np.pi * np.outer(rows_H, self.frequency_K2[:, 0]) + self.phase_K
        right_KW = 2 * np.pi * np.outer(self.frequency_K2[:, 1], columns_W)
        # cos(a + b) = cos a cos b - sin a sin b
        left = np.concatenate([np.cos(down_HK), np.sin(down_HK)], axis=1)
        right = np.concatenate([np.cos(right_KW), -np.sin(right_KW)])
        field_HW = (left * np.tile(self.amplitude_K, 2)) @ right
        field_HW += self.slope_2[0] * rows_H[:, None] + self.slope_2[1] * columns_W
        picture_HWC = 255 * (field_HW[..., None] + self.base_C)
        return np.clip(picture_HWC, 0, 255, out=picture_HWC)


def background_of(scene: Scene) -> Background:
    """The background of a scene, drawn from its words and its seed."""
    rng = np.random.default_rng([scene.seed, 7])
    moving = scene.camera != "static"
    parts = [_waves(rng, _LONG_WAVES, 0.3, 1.2, 0.02)]
    slope_2 = np.zeros(2)
    if scene.texture == "shaded":
        angle = rng.uniform(0, 2 * np.pi)
        slope_2 = rng.uniform(0.26, 0.32) * np.array([np.sin(angle), np.cos(angle)])
    elif scene.texture == "striped":
        # Under a moving camera the stripes stand across its way, or they would not show it.
        angle = rng.uniform(-0.5, 0.5) if moving else rng.uniform(-np.pi / 2, np.pi / 2)
        stripe = rng.uniform(2.0, 3.0) * np.array([[np.sin(angle), np.cos(angle)]])
        parts.append((stripe, rng.uniform(0, 2 * np.pi, 1), np.array([0.06])))
    elif scene.texture == "cloudy":
        parts.append(_waves(rng, _CLOUD_WAVES, 0.5, 3.2, 0.065 if moving else 0.055))
    frequency_K2, phase_K, amplitude_K = (np.concatenate(p) for p in zip(*parts, strict=True))
    tint_C = rng.uniform(-0.022, 0.022, size=3)
    return Background(frequency_K2, phase_K, amplitude_K, slope_2, TONES[scene.tone] + tint_C)


def _waves(
    rng: np.random.Generator, count: int, longest: float, shortest: float, contrast: float
) -> tuple[Floats, Floats, Floats]:
    """Frequencies, phases, amplitudes: waves in all directions, the longer the stronger.

    Args:
        longest, shortest: cycles per length between which the waves lie.
        contrast: standard deviation of their sum, on the scale 0..1.
    """
    cycles_K = np.exp(rng.uniform(np.log(longest), np.log(shortest), count))
    angle_K = rng.uniform(0, 2 * np.pi, count)
    frequency_K2 = cycles_K[:, None] * np.stack([np.sin(angle_K), np.cos(angle_K)], axis=1)
    amplitude_K = 1 / cycles_K
    amplitude_K *= contrast * np.sqrt(2 / np.sum(amplitude_K**2))
    return frequency_K2, rng.uniform(0, 2 * np.pi, count), amplitude_K
