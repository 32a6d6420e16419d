"""The encoding stage: frames → moments of the codec's posterior.

Knows nothing of Ray. Torch is imported when a stage is made: this file is imported by the workers
of every stage, and only those that encode should pay for it.
"""

from __future__ import annotations

import numpy as np

from data_prep.config import PrepareConfig
from data_prep.latents.duplicates import perceptual_hash
from data_prep.row import Row, decided, frames_of


class EncodeStage:
    """Frames → posterior mean and log-variance, fp16, one clip at a time.

    One clip a batch and a fixed thread count: batching a clip with others would change a few bits.
    A row that has its latents already, or whose shard needs none, is kept as it is.

    Args:
        config: the settings.
        codec: folder or hub id of the codec.
        skip: names of the shards that need no latents.
        device: torch device of the codec.

    Raises:
        CodecError: the codec cannot be loaded.
    """

    def __init__(
        self, config: PrepareConfig, codec: str, skip: frozenset[str], device: str = "cpu"
    ) -> None:
        import torch

        from flow.codec import VideoCodec

        torch.set_num_threads(config.encoder_threads)
        self.config = config
        self.skip = skip
        self.codec = VideoCodec.load(codec, device=device)

    def process(self, row: Row) -> Row:
        """Fill in the moments and decide `kept`; moments outside fp16 fail the sample."""
        import torch

        if row["shard"] in self.skip or row["mean"] is not None:
            return decided({**row, "frames": None}, "kept", "", "")
        frames_BTHWC = torch.from_numpy(frames_of(row).copy())[None]
        mean_BTCHW, logvar_BTCHW = self.codec.encode(frames_BTHWC)
        mean = mean_BTCHW[0].cpu().numpy().astype("<f2")
        logvar = logvar_BTCHW[0].cpu().numpy().astype("<f2")
        if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
            return decided(row, "failed", "not_finite", "the codec's moments do not fit fp16")
        row = {
            **row,
            "frames": None,
            "mean": mean.tobytes(),
            "logvar": logvar.tobytes() if self.config.keep_logvar else None,
            "latent_shape": list(mean.shape),
            "codec": self.codec.digest,
            "look": perceptual_hash(frames_of(row)),
        }
        return decided(row, "kept", "", "")

    def close(self) -> None:
        """Do nothing: it holds nothing but memory."""
