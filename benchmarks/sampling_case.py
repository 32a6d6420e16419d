"""What the sampling benchmark compares: a trained model, its videos, and the samplers.

Knows one folder with `weights.pth`, `config.yaml` and `case.safetensors`. Knows nothing of Ray,
diffusers or figures.

Shapes: B videos, T frames, C channels, h, w latent cells, H, W tokens, J text tokens, E text width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flow.counters import Counters
from flow.flow import DeepShallowFlow
from flow.packed_weights import can_pack
from flow.released_checkpoint import import_released
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream

GUIDANCE = 2.5
TRAINED = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trained_small"
"""The model that is in the repository; its README says where it comes from."""


@dataclass
class Case:
    """The model, and the videos every sampler makes."""

    flow: DeepShallowFlow
    text: Tensor
    """[B, J, E], one text for each video."""
    null: Tensor
    """[B, J, E], the null text."""
    noise: Tensor
    """Prior noise [B, T, C, h, w]."""
    exact: Tensor
    """The deep block's exact inverse u [B, T, H, W, C]."""

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.noise)

    @property
    def tokens(self) -> int:
        """Tokens of one video."""
        return self.exact[0, ..., 0].numel()

    def spec(self, changes: dict[str, Any]) -> SampleSpec:
        """The specification of a video, with the fields that a sampler changes."""
        frames, _, h, w = self.noise.shape[1:]
        return SampleSpec(num_frames=frames, grid=(h, w), guidance=GUIDANCE, **changes)


def load_case(folder: Path) -> Case:
    """Read a folder in the layout of `tests/fixtures/trained_small`."""
    model, _ = import_released(folder / "weights.pth", folder / "config.yaml")
    case = load_file(folder / "case.safetensors")
    return Case(
        model.eval().flow, case["text"], case["text_null"], case["noise"], case["deep_guided"]
    )


@dataclass
class Sampler:
    """A way to sample, and what was measured of it; the dicts are by video."""

    name: str
    changes: dict[str, Any]
    """Fields of `SampleSpec` that differ from the default."""
    packed: bool | None = None
    """True gives Jacobi the packed weights that only the sliding window takes by itself.

    False takes them from the sliding window; None leaves each schedule as it is.
    """
    wall_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of every timed round."""
    cpu_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """CPU seconds of every timed round."""
    videos: dict[int, Tensor] = field(default_factory=dict)
    """The last round's tokens u [1, T, H, W, C]."""
    counters: dict[int, Counters] = field(default_factory=dict)
    """What the last round took."""

    def run(self, case: Case, row: int) -> None:
        """Make one video and keep it; the caller keeps the time."""
        part = slice(row, row + 1)
        stream = DeepStream(
            case.flow,
            case.text[part],
            case.null[part],
            case.spec(self.changes),
            noise=lambda n: case.noise[part, n],
        )
        inverter = stream.inverter
        if self.packed is not None:
            inverter.use_packed(64 if self.packed else 0)
        self.videos[row] = torch.cat(
            [stream.next_frame() for _ in range(stream.spec.num_frames)], 1
        )
        self.counters[row] = stream.counters


def samplers(case: Case) -> list[Sampler]:
    """What is compared: the default, the two it is held against, and others."""
    jacobi = {"schedule": "jacobi", "block_size": 64, "tolerance": 1e-3}
    rows = [
        Sampler(f"default ({SampleSpec.schedule})", {}),
        Sampler("sequential", {"schedule": "sequential"}),
        Sampler("jacobi 64, 1e-3", jacobi),
        Sampler("jacobi 16 then 64, 1e-3", {**jacobi, "block_size": 16}),
        Sampler("sliding, r <= 0.01", {"token_tolerance": 0.01, "cold_token_tolerance": 0.01}),
    ]
    if can_pack(case.flow.deep):
        rows.insert(3, Sampler("jacobi 64, 1e-3, packed weights", jacobi, packed=True))
        rows.append(Sampler("sliding, plain weights", {"schedule": "sliding"}, packed=False))
    return rows
