"""A codec as Wan2.2's, but narrow: residual, patches of 2, three halvings, four channels."""

from __future__ import annotations

from typing import Any


def wan_like(width: int, **changes: Any) -> dict[str, Any]:
    """Its configuration for `flow.codec.build_vae`; without statistics latents stay as they are."""
    return {
        "base_dim": width,
        "decoder_base_dim": width,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
    } | changes


CODEC = wan_like(8, latents_mean=[0.1, -0.1, 0.0, 0.2], latents_std=[0.8, 1.0, 1.2, 0.9])
"""With statistics, as the tests of preparing and serving use it."""
