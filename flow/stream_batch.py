"""Several videos through the deep block together: each pass serves every stream that is waiting for one.

Streams may be at different frames, lengths, texts and schedules, and come and go between passes. Rows of all streams
are one batch in every product; attention is each stream's own, over its own cache. So a stream gets what it would get
alone, up to the rounding of larger products.
Knows streams of one model. Does not know who waits for them.

Shapes: B batch, L places, N places of all streams, W width, C numbers per token, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.attention import TransformerLayer, attend_last
from flow.inverse import Inverter, Steps
from flow.rope import Rope
from flow.sampling import DeepStream

Span = tuple[int, int]
"""(start, stop) of the places that a stream wants evaluated."""


@dataclass
class _Part:
    """One inverter's share of a pass."""

    inverter: Inverter
    start: int
    stop: int
    rows: int

    @property
    def places(self) -> int:
        return self.rows * (self.stop - self.start)

    def split(self, y_1HND: Tensor) -> Tensor:
        """[1, H, rows · L, D] -> [rows, H, L, D]."""
        return y_1HND[0].unflatten(1, (self.rows, -1)).transpose(0, 1)


@torch.inference_mode()
def evaluate_together(inverters: Sequence[Inverter], spans: Sequence[Span]) -> None:
    """`Inverter.evaluate` of each inverter over its span, in one pass; all must invert the same block.

    Raises:
        ValueError: the inverters are of different blocks.
    """
    block = inverters[0].block
    if any(inverter.block is not block for inverter in inverters):
        raise ValueError("streams of different models cannot share a pass; group them by model")
    parts = [
        _Part(inverter, *span, rows=inverter.caches[0].batch)
        for inverter, span in zip(inverters, spans, strict=True)
    ]
    sizes = [part.places for part in parts]
    h_1NW = torch.cat([part.inverter.embed(part.start, part.stop).flatten(0, 1) for part in parts])
    h_1NW = h_1NW.unsqueeze(0)
    rope = _rope_of(parts)
    for index, layer in enumerate(block.layers):
        h_1NW = _extend(layer, index, h_1NW, rope, parts, sizes)  # type: ignore[arg-type]
    mu, sigma = block.affine(h_1NW)
    for part, mu_NC, sigma_NC in zip(parts, mu[0].split(sizes), sigma[0].split(sizes), strict=True):
        shape = (part.rows, -1)
        part.inverter.put(
            part.start, part.stop, mu_NC.unflatten(0, shape), sigma_NC.unflatten(0, shape)
        )


def _rope_of(parts: Sequence[_Part]) -> Rope:
    """The turns of every place of the pass, in its order."""
    turns = []
    for part in parts:
        text = part.inverter.text_len
        turns += [part.inverter.rope.slice(text + part.start, text + part.stop)] * part.rows
    cos, sin, turn = (
        torch.cat([getattr(rope, name) for rope in turns])
        for name in ("cos_LA", "sin_LA", "turn_LA")
    )
    return Rope(cos, sin, turn)


def _extend(
    layer: TransformerLayer,
    index: int,
    h_1NW: Tensor,
    rope: Rope,
    parts: Sequence[_Part],
    sizes: list[int],
) -> Tensor:
    """`TransformerLayer.extend` of every part, each over its own cache."""
    q, k, v = (y.split(sizes, dim=2) for y in layer.attention.project(h_1NW, rope))
    out = []
    for part, *qkv in zip(parts, q, k, v, strict=True):
        q_BHLD, k_BHLD, v_BHLD = map(part.split, qkv)
        cache, place = part.inverter.caches[index], part.inverter.text_len + part.start
        cache.write(place, k_BHLD, v_BHLD)
        stop = part.inverter.text_len + part.stop
        seen = attend_last(q_BHLD, cache.k_BHSD[:, :, :stop], cache.v_BHSD[:, :, :stop])
        out.append(seen.transpose(0, 1).flatten(1, 2))
    h_1NW = h_1NW + layer.attention.merge(torch.cat(out, dim=1).unsqueeze(0))
    return h_1NW + layer.mlp(h_1NW)


class StreamBatch:
    """Streams of one model that share every pass of the deep block.

    >>> batch = StreamBatch()
    >>> batch.advance()
    []
    """

    def __init__(self) -> None:
        self._steps: dict[DeepStream, Steps] = {}
        self._waiting: dict[DeepStream, Span] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, stream: DeepStream) -> None:
        """Begin the stream's next frame; it takes part in the passes until that frame is made."""
        if stream in self._steps:
            raise ValueError(
                "this stream's frame is being made already; wait until `advance` gives it"
            )
        self._steps[stream] = stream.steps()

    def remove(self, stream: DeepStream) -> None:
        """Forget a stream whose frame nobody wants any more."""
        self._steps.pop(stream, None)
        self._waiting.pop(stream, None)

    def advance(self) -> list[tuple[DeepStream, Tensor]]:
        """One pass for all streams; those that thereby completed their frame leave, with tokens u [B, 1, H, W, C]."""
        done = []
        with torch.inference_mode():
            for stream, steps in [*self._steps.items()]:
                if stream in self._waiting:
                    continue
                try:
                    self._waiting[stream] = next(steps)
                except StopIteration:
                    done.append(stream)
            if self._waiting:
                streams = [*self._waiting]
                evaluate_together([s.inverter for s in streams], [*self._waiting.values()])
                self._waiting.clear()
        for stream in done:
            del self._steps[stream]
        return [(stream, stream.emit()) for stream in done]


def next_frames(streams: Sequence[DeepStream]) -> list[Tensor]:
    """The next frame of every stream, in their order; the streams may be at different frames."""
    batch = StreamBatch()
    for stream in streams:
        batch.add(stream)
    frames: dict[DeepStream, Tensor] = {}
    while len(batch):
        frames.update(batch.advance())
    return [frames[stream] for stream in streams]
