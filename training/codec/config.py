"""How a codec is trained, and its size: every setting with its unit.

Stands apart from `codec_training.py` so that `flowreel train-codec` can check its settings before
torch is imported. Knows nothing of torch, weights or Ray.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flow.codec_factors import WAN_FACTORS


class CodecConfig(BaseModel):
    """The size of the codec and how it is trained.

    >>> CodecConfig(z_dim=8).vae_config()["scale_factor_spatial"]
    8
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    z_dim: int = Field(default=16, ge=1, description="latent channels")
    patch_size: Literal[2, 4] = Field(
        default=2,
        description="pixels per side of a cell of the first level; two halvings follow, so that a "
        "latent cell has four times as many",
    )
    encoder_width: int = Field(
        default=24, ge=4, description="channels of the encoder's first level"
    )
    decoder_width: int = Field(
        default=32, ge=4, description="channels of the decoder's first level"
    )
    clip_frames: tuple[int, ...] = Field(
        default=(5, 5, 9, 5, 17, 5, 9, 33),
        description="frames per training clip, 4k+1 each, taken in turn: short ones show more "
        "scenes a step; without long ones a causal codec drifts on every longer video",
    )
    eval_frames: int = Field(default=33, ge=1, description="frames per held-out clip, 4k+1")
    image_steps: int = Field(
        default=600, ge=0, description="optimizer steps on single frames, before those on clips"
    )
    steps: int = Field(default=4600, ge=1, description="optimizer steps on clips")
    image_batch_size: int = Field(default=16, ge=1, description="frames per step on single frames")
    frames_per_step: int = Field(default=66, ge=1, description="frames per step on clips, at most")
    muon_learning_rate: float = Field(
        default=0.02, gt=0, description="peak for inner convolutions (Muon)"
    )
    learning_rate: float = Field(
        default=2e-3, gt=0, description="peak for all other weights (AdamW)"
    )
    warmup_steps: int = Field(default=50, ge=0, description="steps of linear warm-up")
    latent_noise: float = Field(
        default=0.25,
        ge=0,
        description="largest standard deviation of noise added to the latents before they are "
        "decoded, in standard deviations of each channel; drawn for each clip from zero up. A "
        "decoder that has met noise forgives what a flow leaves",
    )
    kl_weight: float = Field(
        default=1e-4, ge=0, description="weight of KL (nats per latent element) beside MSE"
    )
    recolour: float = Field(
        default=0.05, ge=0, le=1, description="share of clips whose colour axes are mixed at random"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="compute dtype of the convolutions; weights are always fp32; auto: bf16 where "
        "the device is quick in it",
    )
    checkpoint_every_steps: int = Field(
        default=200, ge=1, description="steps between checkpoints, from which a killed run goes on"
    )
    seed: int = Field(default=0, description="seed of weights and scenes")
    eval_clips: int = Field(default=32, ge=1, description="held-out clips that PSNR is measured on")

    def vae_config(self) -> dict[str, Any]:
        """Wan2.2's architecture (residual, its factor in time) at this size.

        Patches and two halvings, where Wan2.2 has patches of 2 and three: patches of 2 give 8
        pixels to a latent cell, patches of 4 Wan2.2's 16 without the stage that costs most.
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
            "in_channels": 3 * self.patch_size**2,
            "out_channels": 3 * self.patch_size**2,
            "patch_size": self.patch_size,
            "scale_factor_temporal": WAN_FACTORS.time,
            "scale_factor_spatial": 4 * self.patch_size,
            "latents_mean": [0.0] * self.z_dim,
            "latents_std": [1.0] * self.z_dim,
        }
