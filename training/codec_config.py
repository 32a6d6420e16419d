"""How a codec is trained, and its size: every setting with its unit.

Stands apart from `codec_training.py` so that `flowreel train-codec` can check its settings before
torch is imported. Knows nothing of torch, weights or Ray.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flow.codec_factors import WAN_FACTORS


class CodecConfig(BaseModel):
    """The size of the codec and how it is trained.

    >>> CodecConfig(z_dim=8).vae_config()["scale_factor_spatial"]
    16
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    z_dim: int = Field(default=24, ge=1, description="latent channels")
    encoder_width: int = Field(
        default=24, ge=4, description="channels of the encoder's first level"
    )
    decoder_width: int = Field(
        default=28, ge=4, description="channels of the decoder's first level"
    )
    clip_frames: tuple[int, ...] = Field(
        default=(9, 17, 33),
        description="frames per training clip, 4k+1 each, taken in turn: trained on one length "
        "only, a causal codec drifts on every longer video",
    )
    eval_frames: int = Field(default=17, ge=1, description="frames per held-out clip, 4k+1")
    image_steps: int = Field(
        default=900, ge=0, description="optimizer steps on single frames, before those on clips"
    )
    steps: int = Field(default=3600, ge=1, description="optimizer steps on clips")
    image_batch_size: int = Field(default=12, ge=1, description="frames per step on single frames")
    frames_per_step: int = Field(default=34, ge=1, description="frames per step on clips, at most")
    muon_learning_rate: float = Field(
        default=0.02, gt=0, description="peak for inner convolutions (Muon)"
    )
    learning_rate: float = Field(
        default=2e-3, gt=0, description="peak for all other weights (AdamW)"
    )
    warmup_steps: int = Field(default=50, ge=0, description="steps of linear warm-up")
    kl_weight: float = Field(
        default=1e-4, ge=0, description="weight of KL (nats per latent element) beside MSE"
    )
    recolour: float = Field(
        default=0.2, ge=0, le=1, description="share of clips whose colour axes are mixed at random"
    )
    seed: int = Field(default=0, description="seed of weights and scenes")
    eval_clips: int = Field(default=32, ge=1, description="held-out clips that PSNR is measured on")

    def vae_config(self) -> dict[str, Any]:
        """Wan2.2's architecture (residual, its factors in space and time) at this size.

        Patches of 4 and two halvings instead of patches of 2 and three: the same factor in space,
        without the stage that costs most.
        """
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": self.encoder_width,
            "decoder_base_dim": self.decoder_width,
            "z_dim": self.z_dim,
            "dim_mult": [1, 2, 2],
            "num_res_blocks": 1,
            "attn_scales": [],
            "temperal_downsample": [True, True],
            "dropout": 0.0,
            "is_residual": True,
            "in_channels": 48,
            "out_channels": 48,
            "patch_size": 4,
            "scale_factor_temporal": WAN_FACTORS.time,
            "scale_factor_spatial": WAN_FACTORS.space,
            "latents_mean": [0.0] * self.z_dim,
            "latents_std": [1.0] * self.z_dim,
        }
