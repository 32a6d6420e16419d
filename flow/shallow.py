"""The shallow stack's inverse: intermediate latents u back to latents x, all frames as one batch.

Knows a flow's shallow blocks and how to invert one (`flow.inverse`). Knows nothing of texts, seeds
or streams.

Shapes: B batch, T latent frames, C channels, h, w latent cells, H, W tokens, N tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from flow.block import AffineBlock
from flow.counters import Work
from flow.flow import DeepShallowFlow
from flow.inverse import invert_block
from flow.tokens import block_order, raster_order, unpatchify

SHALLOW_TOLERANCE = 1e-10
"""Default stop of the shallow sweeps: squared change over squared tokens, per frame."""


@torch.no_grad()
def shallow_inverse(
    flow: DeepShallowFlow,
    u_BTHWC: Tensor,
    *,
    tolerance: float = SHALLOW_TOLERANCE,
    sequential: bool = False,
    work: Sequence[Work] | None = None,
) -> Tensor:
    """Latents [B, T, C, h, w] of u; the inverse of `DeepShallowFlow.shallow_forward`.

    Frames do not see each other in the shallow stack, so all of them are one batch, and every one
    meets the tolerance.

    Args:
        tolerance: where the Jacobi sweeps of a block stop; 0 asks for the exact solution.
        sequential: solve token by token instead.
        work: one for each shallow block, to which what it took is added.

    >>> import torch
    >>> from flow.config import tiny
    >>> flow = DeepShallowFlow(tiny()).double()
    >>> x = torch.randn(1, 2, 4, 2, 3, dtype=torch.float64)
    >>> back = shallow_inverse(flow, flow.shallow_forward(x))
    >>> bool((back - x).abs().max() < 1e-6)
    True
    """
    u = u_BTHWC
    batch, grid = u.shape[0], (u.shape[2], u.shape[3])
    # The data met the blocks in order, so the last of them is undone first.
    for index in range(len(flow.shallow) - 1, -1, -1):
        flipped = flow.config.reversed_order(index)
        block = flow.shallow[index]
        assert isinstance(block, AffineBlock)
        s_BNC = invert_block(
            block,
            rearrange(block_order(u, flipped), "b t n c -> (b t) n c"),
            flow.frame_rope(grid),
            tolerance=tolerance,
            sequential=sequential,
            work=None if work is None else work[index],
        )
        u = raster_order(rearrange(s_BNC, "(b t) n c -> b t n c", b=batch), grid, flipped)
    return unpatchify(u, flow.config.patch_size)
