"""Rotary positions on three axes (row, column, time), as DESIGN section 3 fixes them.

Knows angles and how to turn vectors by them. Does not know attention, orders or caches.

Shapes: L places, B batch, H heads, D head_dim (a place's D/2 angles: rows, columns, time).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.config import TIME_FREQUENCIES

BASE = 10000.0


@dataclass(frozen=True, eq=False)
class Rope:
    """Turns of L places. An opaque object on purpose: mixed-precision hooks that cast every tensor
    argument of a layer must leave these fp32 numbers alone.

    cos_LA, sin_LA: [L, D/2] in fp32 (fp64 for fp64 models).
    """

    cos_LA: Tensor
    sin_LA: Tensor
    turn_LA: Tensor  # cos + i·sin, complex

    def __len__(self) -> int:
        return self.cos_LA.shape[0]

    def slice(self, start: int, stop: int) -> Rope:
        """Places start..stop-1, without a copy."""
        return Rope(self.cos_LA[start:stop], self.sin_LA[start:stop], self.turn_LA[start:stop])

    def rotate(self, x_BLNHD: Tensor) -> Tensor:
        """Turn adjacent pairs (e0, e1) -> (e0 cos - e1 sin, e0 sin + e1 cos); any middle axes.

        Axis 1 is the place, the last the head dimension; shape and dtype are kept, arithmetic is fp32 or wider.
        One complex product does it five times faster than four real ones on a CPU; half precision
        and the compiler take the real path, which they fuse.
        """
        places = (slice(None), *(None,) * (x_BLNHD.dim() - 3))
        pairs = x_BLNHD.unflatten(-1, (-1, 2))
        if pairs.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
            turned = torch.view_as_complex(pairs) * self.turn_LA[places]
            return torch.view_as_real(turned).flatten(-2).to(x_BLNHD.dtype)
        cos, sin = self.cos_LA[places], self.sin_LA[places]
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return turned.flatten(-2).to(x_BLNHD.dtype)


def build_rope(
    *,
    head_dim: int,
    pos_len: float,
    grid: tuple[int, int],
    num_frames: int,
    text_len: int = 0,
    first_frame: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Rope:
    """Turns for `text_len` text places followed by `num_frames` frames of `grid` = (rows, columns) tokens.

    Row and column of a token sit at index / sqrt(rows·columns) · pos_len, its time is the frame index
    (from `first_frame`); text token j sits at row 0, column 0, time j / text_len · pos_len.
    fp32 angles are rounded just as in the released models' tables: where a block's sigma is small, exact angles
    would move z by more than all other rounding together.
    """
    rows, columns = grid
    wide = torch.promote_types(dtype, torch.float32)

    def steps(count: int, first: int = 0) -> Tensor:
        """Made on the CPU, so that all devices turn alike."""
        return torch.arange(first, first + count, dtype=wide, device="cpu")

    root = math.sqrt(rows * columns)
    spatial = head_dim // 2 - TIME_FREQUENCIES
    space_freq = 1.0 / BASE ** (2 * steps(spatial // 2) / spatial)
    time_freq = 1.0 / BASE ** (steps(TIME_FREQUENCIES) / TIME_FREQUENCIES)

    frame, row, column = torch.meshgrid(
        steps(num_frames, first_frame),
        steps(rows) / root * pos_len,
        steps(columns) / root * pos_len,
        indexing="ij",
    )
    text_time = steps(text_len) / max(text_len, 1) * pos_len
    nowhere = torch.zeros_like(text_time)
    angle_LA = torch.cat(
        [
            torch.cat([nowhere, row.flatten()])[:, None] * space_freq,
            torch.cat([nowhere, column.flatten()])[:, None] * space_freq,
            torch.cat([text_time, frame.flatten()])[:, None] * time_freq,
        ],
        dim=1,
    )
    cos, sin = angle_LA.cos().to(device), angle_LA.sin().to(device)
    return Rope(cos, sin, torch.complex(cos, sin))


class RopeCache:
    """The few tables a model keeps using, by their arguments; holds no parameters."""

    def __init__(self, head_dim: int, pos_len: float, size: int = 16) -> None:
        self._fixed = {"head_dim": head_dim, "pos_len": pos_len}
        self._size = size
        self._tables: dict[tuple[object, ...], Rope] = {}

    def get(
        self,
        grid: tuple[int, int],
        num_frames: int,
        text_len: int,
        like: Tensor,
        first_frame: int = 0,
    ) -> Rope:
        """The table for these places on the device of `like`, fp64 where `like` is, else fp32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (grid, num_frames, text_len, first_frame, like.device, dtype)
        rope = self._tables.get(key)
        if rope is None:
            # A table first met while sampling must still serve a training step later.
            with torch.inference_mode(False):
                rope = build_rope(
                    **self._fixed,  # type: ignore[arg-type]
                    grid=grid,
                    num_frames=num_frames,
                    text_len=text_len,
                    first_frame=first_frame,
                    device=like.device,
                    dtype=dtype,
                )
            if len(self._tables) >= self._size:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = rope
        return rope
