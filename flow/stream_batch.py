"""Several videos through the deep block together: one pass serves every stream that waits for one.

Streams may be at different frames, lengths, texts and schedules, and may come and go between
passes. The rows of all streams are one batch in every product; attention is each stream's own, over
its own cache. So a stream gets what it would get alone, up to the rounding of larger products.

Knows streams of one model. Knows nothing of requests, queues or who waits for a stream.

Shapes: B batch, L places of one stream, N places of all streams, M model width, C channels, H
heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.attention import TransformerLayer, attend_last
from flow.inverse import Inverter, Places, Steps
from flow.rope import Rope
from flow.sampling import DeepStream


@dataclass
class _Part:
    """One inverter's share of a pass."""

    inverter: Inverter
    start: int
    """First of its places, text not included."""
    stop: int
    """One after the last of them."""
    rows: int
    """Sequences: B, or 2 B of a guided pair."""

    @property
    def num_places(self) -> int:
        """Places of all its sequences."""
        return self.rows * (self.stop - self.start)

    def split(self, y_1HND: Tensor) -> Tensor:
        """[1, H, rows · L, D] as [rows, H, L, D]."""
        return y_1HND[0].unflatten(1, (self.rows, -1)).transpose(0, 1)


@torch.inference_mode()
def evaluate_together(inverters: Sequence[Inverter], places: Sequence[Places]) -> None:
    """`Inverter.evaluate` of each inverter over its places, in one pass.

    Raises:
        ValueError: the inverters are of different blocks.
    """
    block = inverters[0].block
    if any(inverter.block is not block for inverter in inverters):
        raise ValueError("streams of different models cannot share a pass; group them by model")
    parts = [
        _Part(inverter, start, stop, rows=inverter.caches[0].batch)
        for inverter, (start, stop) in zip(inverters, places, strict=True)
    ]
    sizes = [part.num_places for part in parts]
    h_1NM = torch.cat([part.inverter.embed(part.start, part.stop).flatten(0, 1) for part in parts])
    h_1NM = h_1NM.unsqueeze(0)
    rope = _rope_of(parts)
    for index, layer in enumerate(block.layers):
        h_1NM = _extend(layer, index, h_1NM, rope, parts, sizes)  # type: ignore[arg-type]
    mu, sigma = block.affine(h_1NM)
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
    h_1NM: Tensor,
    rope: Rope,
    parts: Sequence[_Part],
    sizes: list[int],
) -> Tensor:
    """`TransformerLayer.extend` of every part, each over its own cache."""
    q, k, v = (y.split(sizes, dim=2) for y in layer.attention.project(h_1NM, rope))
    out = []
    for part, *qkv in zip(parts, q, k, v, strict=True):
        q_BHLD, k_BHLD, v_BHLD = map(part.split, qkv)
        cache, place = part.inverter.caches[index], part.inverter.text_len + part.start
        cache.write(place, k_BHLD, v_BHLD)
        stop = part.inverter.text_len + part.stop
        attended = attend_last(q_BHLD, cache.k_BHSD[:, :, :stop], cache.v_BHSD[:, :, :stop])
        out.append(attended.transpose(0, 1).flatten(1, 2))
    h_1NM = h_1NM + layer.attention.merge(torch.cat(out, dim=1).unsqueeze(0))
    return h_1NM + layer.mlp(h_1NM)


class StreamBatch:
    """Streams of one model that share every pass of the deep block.

    >>> from flow.config import tiny
    >>> from flow.flow import DeepShallowFlow
    >>> from flow.sample_spec import SampleSpec
    >>> flow, spec = DeepShallowFlow(tiny()), SampleSpec(num_frames=1, grid=(2, 2))
    >>> batch = StreamBatch()
    >>> batch.add(DeepStream(flow, None, None, spec))
    >>> while not (frames := batch.advance()):
    ...     pass
    >>> frames[0][1].shape, len(batch)
    (torch.Size([1, 1, 2, 2, 4]), 0)
    """

    def __init__(self) -> None:
        self._steps: dict[DeepStream, Steps] = {}
        self._waiting: dict[DeepStream, Places] = {}

    def __len__(self) -> int:
        """Streams whose frame is being made."""
        return len(self._steps)

    def add(self, stream: DeepStream) -> None:
        """Begin the stream's next frame; it takes part in passes until that frame is made.

        Raises:
            ValueError: its frame has been begun already.
        """
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
        """One pass for all streams; the streams that complete their frame by it, with its tokens u.

        They leave the batch. u is [B, 1, H, W, C] (H, W tokens).
        """
        complete = []
        with torch.inference_mode():
            for stream, steps in [*self._steps.items()]:
                if stream in self._waiting:
                    continue
                try:
                    self._waiting[stream] = next(steps)
                except StopIteration:
                    complete.append(stream)
            if self._waiting:
                streams = [*self._waiting]
                evaluate_together([s.inverter for s in streams], [*self._waiting.values()])
                self._waiting.clear()
        for stream in complete:
            del self._steps[stream]
        return [(stream, stream.emit()) for stream in complete]


def next_frames(streams: Sequence[DeepStream]) -> list[Tensor]:
    """The next frame of every stream, in their order; the streams may be at different frames."""
    batch = StreamBatch()
    for stream in streams:
        batch.add(stream)
    frames: dict[DeepStream, Tensor] = {}
    while len(batch):
        frames.update(batch.advance())
    return [frames[stream] for stream in streams]
