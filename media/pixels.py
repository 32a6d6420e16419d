"""From a decoded picture to RGB as it is meant to be seen: upright, square pixels, standard range.

Knows arrays and numbers of standards; nothing of files or containers.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PQ, HLG = 16, 18
"""Transfer characteristics of HDR video (ITU-T H.273)."""
WHITE_NITS = 203.0
"""Luminance of diffuse white in HDR programmes (ITU-R BT.2408)."""
_HLG_PEAK_NITS = 1000.0
_SHOULDER = 0.8
"""Share of diffuse white up to which tone mapping leaves light alone."""
_PEAK = 1000.0 / WHITE_NITS
"""What is brought down to 1, as a multiple of diffuse white."""
# BT.2020 primaries to BT.709 (ITU-R BT.2087).
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    dtype=np.float32,
)


class Orientation(NamedTuple):
    """How the stored picture becomes the shown one: transposed first, then flipped."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, picture_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The picture as shown; a view."""
        if self.transpose:
            picture_HW3 = picture_HW3.swapaxes(0, 1)
        rows = -1 if self.flip_rows else 1
        columns = -1 if self.flip_columns else 1
        return picture_HW3[::rows, ::columns]

    def __str__(self) -> str:
        return _NAMES[self]


_NAMES = {
    Orientation(): "upright",
    Orientation(True, False, True): "turned right",
    Orientation(False, True, True): "turned half",
    Orientation(True, True, False): "turned left",
    Orientation(False, False, True): "mirrored",
    Orientation(False, True, False): "upside down mirrored",
    Orientation(True, False, False): "transposed",
    Orientation(True, True, True): "transposed, turned half",
}


def orientation_of(display_matrix: bytes | None) -> Orientation:
    """What a container's display matrix (nine 32-bit numbers) says; angles between are left alone.

    The matrix takes the stored (x, y) to (a·x + c·y, b·x + d·y).

    >>> str(orientation_of(struct.pack("<9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)))
    'mirrored'
    """
    if display_matrix is None or len(display_matrix) < 36:
        return Orientation()
    a, b, _, c, d, *_ = (n / 65536 for n in struct.unpack("<9i", display_matrix[:36]))
    if abs(a) > 0.9 and abs(d) > 0.9:
        return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
    if abs(b) > 0.9 and abs(c) > 0.9:
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation()


def tone_mapped(rgb_HW3: npt.NDArray[np.uint16], transfer: int) -> npt.NDArray[np.uint8]:
    """HDR (PQ or HLG, BT.2020) as sRGB, uint8 [H, W, 3].

    Diffuse white becomes white; what is brighter is bent under it by a soft shoulder, in each pixel
    by its brightest channel, so that hues stay.

    Args:
        rgb_HW3: the signal, uint16 of full scale 65535.
        transfer: `PQ` or `HLG`.
    """
    signal = rgb_HW3.astype(np.float32) / np.float32(65535)
    nits = _pq_nits(signal) if transfer == PQ else _hlg_nits(signal)
    light = np.clip((nits / WHITE_NITS) @ _TO_709.T, 0, None)
    brightest = light.max(axis=-1, keepdims=True)
    bent = light * (_bend(brightest) / np.maximum(brightest, 1e-6))
    srgb = np.where(bent <= 0.0031308, 12.92 * bent, 1.055 * bent ** (1 / 2.4) - 0.055)
    return np.rint(np.clip(srgb, 0, 1) * 255).astype(np.uint8)


def _bend(light: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The identity up to the shoulder, then a curve that reaches 1 at the peak, without a kink."""
    room, reach = 1 - _SHOULDER, _PEAK - _SHOULDER
    over = np.clip((light - _SHOULDER) / reach, 0, 1)
    # x -> (1 + k)·x / (1 + k·x) has slope 1 + k at 0; this k makes the two slopes meet.
    k = reach / room - 1
    curved = _SHOULDER + room * (1 + k) * over / (1 + k * over)
    return np.where(light <= _SHOULDER, light, curved).astype(np.float32)


def _pq_nits(signal: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """SMPTE ST 2084: signal to luminance, in candela per square metre."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** np.float32(1 / m2)
    ratio = np.maximum(power - c1, 0) / (c2 - c3 * power)
    return (10000 * ratio ** (1 / m1)).astype(np.float32)


def _hlg_nits(signal: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """ITU-R BT.2100 hybrid log-gamma on a display of 1000 nits, system gamma 1.2."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luma = scene @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
    return (_HLG_PEAK_NITS * luma[..., None] ** 0.2 * scene).astype(np.float32)
