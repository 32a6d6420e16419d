"""What passes between the replicas that make one video, and what they make of it.

    DeepBlock ── Opening, then a DeepFrame for each latent frame ──> FrameDecoder
    FrameDecoder ── Chunks of RGB frames ──> Api ── joined to a GeneratedVideo

All of it survives pickling. Knows shapes and bytes; knows nothing of Ray, HTTP or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from flow.certificate import Certificate
from flow.counters import Counters
from media.frames import Frames

DeploymentName = Literal["deep", "decode"]
"""The deployments that compute, DeepBlock and FrameDecoder, by their names in a timeline."""


@dataclass(frozen=True)
class WorkSpan:
    """The span of time that one unit of work took, measured where it ran.

    Attributes:
        name: "deep" (one frame of u) or "decode" (one frame of u to RGB; what is decoded at the end
            of a video counts with the last).
        frame: index of the latent frame.
        pid: process.
        start_s, end_s: Unix seconds.
        request_id: the request it was for.
    """

    name: DeploymentName
    frame: int
    pid: int
    start_s: float
    end_s: float
    request_id: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as `/timeline` sends them."""
        return asdict(self)


@dataclass(frozen=True)
class PackedTensor:
    """An fp32 tensor as plain bytes: what travels between two replicas.

    A frame of u is a few hundred kB, so bytes in a call are fast enough; and plain bytes can be
    compared, kept and sent again after a replica has died.

    >>> packed = PackedTensor.pack(torch.arange(6.0).reshape(2, 3))
    >>> packed.shape, len(packed.data), packed.unpack()[1].tolist()
    ((2, 3), 24, [3.0, 4.0, 5.0])
    """

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def pack(cls, tensor: Tensor) -> Self:
        """The bytes of a tensor of any dtype, on any device, as fp32."""
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        return cls(tuple(array.shape), array.tobytes())

    def unpack(self, device: torch.device | str = "cpu") -> Tensor:
        """The fp32 tensor on a device."""
        array = np.frombuffer(self.data, dtype=np.float32).reshape(self.shape)
        # `frombuffer` gives a read-only view, which torch refuses to share.
        return torch.from_numpy(array.copy()).to(device)


@dataclass(frozen=True)
class Opening:
    """What DeepBlock says first: the text as the denoiser reads it, [1, J, E]."""

    text: PackedTensor


@dataclass(frozen=True)
class DeepFrame:
    """One frame of u, [1, 1, H, W, C]."""

    index: int
    u: PackedTensor
    span: WorkSpan


@dataclass(frozen=True)
class Chunk:
    """RGB frames that became ready together (perhaps none), and the spans of the work behind them.

    `frames` is uint8 [T, height, width, 3].
    """

    frames: Frames
    spans: tuple[WorkSpan, ...]


@dataclass(frozen=True)
class GeneratedVideo:
    """A finished video: frames uint8 [T, height, width, 3], and where the time went."""

    frames: Frames
    fps: float
    spans: tuple[WorkSpan, ...]
    counters: Counters | None = None
    """What sampling took, where one process did it all."""
    certificate: Certificate | None = None
    """How exact the deep block's part is, where that was asked for."""


def join(chunks: Sequence[Chunk], fps: float) -> GeneratedVideo:
    """The video that chunks, in order, make up.

    >>> chunk = Chunk(np.zeros((4, 32, 32, 3), np.uint8), ())
    >>> join([chunk, chunk], fps=8.0).frames.shape
    (8, 32, 32, 3)
    """
    frames = np.concatenate([chunk.frames for chunk in chunks])
    return GeneratedVideo(frames, fps, tuple(span for chunk in chunks for span in chunk.spans))
