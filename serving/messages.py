"""What passes between the stages of one video, and what they make of it. All of it survives
pickling.

Knows shapes and bytes; not how any of it is computed or sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flow.certificate import Certificate
from flow.counters import Counters

Frames = npt.NDArray[np.uint8]
Stage = Literal["deep", "decode"]


@dataclass(frozen=True)
class Span:
    """One unit of work, measured where it ran.

    Attributes:
        name: "deep" (one frame of u) or "decode" (one frame of u to RGB; the flush at the end
            counts with the last).
        frame: index of the latent frame.
        pid: process.
        start_s, end_s: Unix seconds.
        request_id: the request it was for.
    """

    name: Stage
    frame: int
    pid: int
    start_s: float
    end_s: float
    request_id: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PackedTensor:
    """An fp32 tensor as plain bytes: what travels between the two stages."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def pack(cls, tensor: Tensor) -> Self:
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        return cls(tuple(array.shape), array.tobytes())

    def unpack(self, device: torch.device | str = "cpu") -> Tensor:
        array = np.frombuffer(self.data, dtype=np.float32).reshape(self.shape)
        return torch.from_numpy(array.copy()).to(device)


@dataclass(frozen=True)
class Opening:
    """What the deep stage says first: the text as the denoiser reads it, [1, L, D]."""

    text: PackedTensor


@dataclass(frozen=True)
class DeepFrame:
    """One frame of u, [1, 1, H, W, C]."""

    index: int
    u: PackedTensor
    span: Span


@dataclass(frozen=True)
class Chunk:
    """RGB frames that became ready together (perhaps none) and the spans of the work behind
    them.
    """

    frames: Frames
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class GeneratedVideo:
    """A finished video: frames uint8 [T, H, W, 3], frames per second, and where the time went."""

    frames: Frames
    fps: float
    spans: tuple[Span, ...]
    counters: Counters | None = None
    """What sampling took, where one process did it all."""
    certificate: Certificate | None = None
    """How exact the deep block's part is, where that was asked for."""


def join(chunks: Sequence[Chunk], fps: float) -> GeneratedVideo:
    """The video that chunks, in order, make up."""
    frames = np.concatenate([chunk.frames for chunk in chunks])
    return GeneratedVideo(frames, fps, tuple(span for chunk in chunks for span in chunk.spans))
