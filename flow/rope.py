"""Rotary positions on three axes: row, column, time.

Knows angles and how to turn vectors by them (`docs/design.md`, "The model exactly", rotary
positions). Knows nothing of attention, orders or key-value caches.

Shapes: B batch, L places, N any middle axes, H heads, D head_dim, A = D/2 angles of a place (those
of rows, columns and time, in this order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.config import TIME_FREQUENCIES

BASE = 10000.0
"""Wavelengths of an axis run from 2π nearly to 2π times this."""


@dataclass(frozen=True, eq=False)
class Rope:
    """Turns of L places, in fp32 (fp64 for fp64 models).

    An opaque object on purpose: mixed-precision hooks that cast every tensor argument of a layer
    must leave these numbers alone.

    >>> rope = build_rope(head_dim=32, pos_len=4.0, grid=(2, 2), num_frames=1)
    >>> x_BLHD = torch.randn(1, 4, 2, 32)
    >>> turned = rope.rotate(x_BLHD)
    >>> torch.allclose(turned.norm(dim=-1), x_BLHD.norm(dim=-1), atol=1e-5)
    True
    """

    cos_LA: Tensor
    sin_LA: Tensor
    turn_LA: Tensor
    """cos + i·sin, complex."""

    def __len__(self) -> int:
        return self.cos_LA.shape[0]

    def slice(self, start: int, stop: int) -> Rope:
        """Places start..stop-1, without a copy."""
        return Rope(self.cos_LA[start:stop], self.sin_LA[start:stop], self.turn_LA[start:stop])

    def rotate(self, x_BLNHD: Tensor) -> Tensor:
        """Turn adjacent pairs: (e0, e1) becomes (e0 cos - e1 sin, e0 sin + e1 cos).

        Axis 1 is the place and the last one the head dimension. Shape and dtype are kept;
        arithmetic is fp32 or wider.
        """
        places = (slice(None), *(None,) * (x_BLNHD.dim() - 3))
        pairs = x_BLNHD.unflatten(-1, (-1, 2))
        # On a CPU one complex product is five times faster than four real ones. Half precision on
        # an accelerator and the compiler take the real path, which they fuse.
        is_wide = pairs.dtype in (torch.float32, torch.float64)
        if (is_wide or pairs.device.type == "cpu") and not torch.compiler.is_compiling():
            wide = pairs.to(self.cos_LA.dtype)
            turned = torch.view_as_complex(wide) * self.turn_LA[places]
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
    """Turns for text places, followed by frames of tokens in raster order.

    Row and column of a token sit at index / sqrt(rows·columns) · pos_len, and its time is the frame
    index. Text token j sits at row 0, column 0, time j / text_len · pos_len. With n = D/2 - 8, rows
    and columns each have the frequencies 10000^(-2k/n), k < n/2; time has 10000^(-k/8), k < 8.

    fp32 angles are rounded just as in the released models' tables: where a block's sigma is small,
    exact angles would move z by more than all other rounding together.

    Args:
        head_dim: D.
        pos_len: what the side of the token grid is scaled to.
        grid: rows and columns of tokens.
        num_frames: frames.
        text_len: text places in front of them.
        first_frame: frame index of the first frame.
        device, dtype: of the turns; at least fp32.
    """
    rows, columns = grid
    wide = torch.promote_types(dtype, torch.float32)

    def steps(count: int, first: int = 0) -> Tensor:
        # On the CPU, so that all devices turn alike.
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
    """The few tables that a model keeps using, by their arguments; it holds no parameters."""

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
        """The turns of these places on the device of `like`; fp64 where `like` is, else fp32."""
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
            # The oldest one makes room: a long run meets many shapes, each only for a while.
            if len(self._tables) >= self._size:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = rope
        return rope
