"""Solving s_i = mu_i(s_<i) + sigma_i(s_<i) z_i for one affine block, sequentially or by Jacobi.

Knows one block, its key-value cache and guidance. Knows nothing of frames, orders, streams or
seeds: tokens come in the block's own order, and a caller says which of them to solve next.
`flow.sliding` has the third schedule.

A schedule is a generator. It yields the places that it wants evaluated next, and finds mu and sigma
filled in when it goes on. So one pass may serve one inverter (`Inverter.solve`) or many
(`flow.stream_batch`).

The system is triangular: after k sweeps the first k tokens are exactly right, whatever the start
values, so sweep k leaves them out. A place is *fresh* when its keys and values were computed from
the final value of its token; `Inverter` never lets a later token read a place that is not.

Source: arXiv 2511.20462, video-aware Jacobi iteration; `docs/design.md`, "Sampling".

Shapes: B batch, L tokens of the longest sequence, C channels, J text tokens, E text width, M model
width. Place 0 holds sos and place i token i, so that place i says mu and sigma of token i + 1.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from flow.attention import LayerCache
from flow.block import AffineBlock
from flow.counters import Work
from flow.guidance import guide_pair
from flow.packed_weights import PackedBlock, can_pack
from flow.rope import Rope

Places = tuple[int, int]
"""(start, stop) of the places to evaluate next: start .. stop - 1."""

Steps = Generator[Places, None, int]
"""A schedule: it yields the places to evaluate next and returns the number of iterations."""


class Inverter:
    """One block being inverted for B sequences at once, its cache allocated once.

    Schedules read and write these:

    - `tokens_BLC`: the tokens, final or not. `mu_BLC`, `sigma_BLC`: what each was last computed
      from.
    - `solved`: how many first tokens are final. `fresh`: how many first places are fresh.
    - `guessed`: how many first tokens have a value, final or not. `evaluated`: how many have mu and
      sigma.

    Args:
        block: the block to invert.
        rope: turns of J + L places.
        batch: B.
        text_BJE: what the block reads; None for none.
        null_BJE: the null text, given exactly when `guidance` > 0; the pair then runs as one batch
            of two.
        guidance: weight w of `flow.guidance`.

    >>> from flow.config import tiny
    >>> from flow.flow import DeepShallowFlow
    >>> flow = DeepShallowFlow(tiny())
    >>> inverter = Inverter(flow.deep, flow.deep_rope((2, 2), 1, None), batch=1)
    >>> inverter.restart()
    >>> z_BLC = torch.randn(1, 4, 4)
    >>> inverter.solve(inverter.sequential(z_BLC)), inverter.solved
    (4, 4)
    >>> torch.allclose(inverter.tokens_BLC, z_BLC, atol=1e-5)  # a fresh block is the identity
    True
    """

    def __init__(
        self,
        block: AffineBlock,
        rope: Rope,
        *,
        batch: int,
        text_BJE: Tensor | None = None,
        null_BJE: Tensor | None = None,
        guidance: float = 0.0,
    ) -> None:
        if guidance > 0 and (text_BJE is None or null_BJE is None):
            raise ValueError(
                f"guidance {guidance} needs both a text and a null text; pass both, or guidance 0"
            )
        self.block, self.rope, self.guidance, self.batch = block, rope, guidance, batch
        self.pair = guidance > 0 and block.proj_txt is not None
        self.text = None
        if text_BJE is not None and block.proj_txt is not None:
            rows = (
                torch.cat([text_BJE, null_BJE]) if self.pair and null_BJE is not None else text_BJE
            )
            self.text = rows.to(block.sos.device)
        self.text_len = 0 if self.text is None else self.text.shape[1]
        self.capacity = len(rope) - self.text_len
        rows_in_batch = 2 * batch if self.pair else batch
        self.caches = [LayerCache(rows_in_batch, layer, len(rope)) for layer in block.layers]  # type: ignore[arg-type]
        self.work = Work()

        wide = torch.promote_types(block.sos.dtype, torch.float32)
        shape = (batch, self.capacity, block.sos.shape[-1])
        self._inputs = torch.zeros(
            (batch, self.capacity + 1, shape[-1]), dtype=wide, device=block.sos.device
        )
        self._inputs[:, :1] = block.sos.detach().to(wide)
        self.tokens_BLC = self._inputs[:, 1:]
        self.mu_BLC = torch.zeros(shape, dtype=wide, device=block.sos.device)
        self.sigma_BLC = torch.ones_like(self.mu_BLC)
        self.solved = self.fresh = self.guessed = self.evaluated = 0
        self.look_every = 1 if block.sos.device.type == "cpu" else 4
        """Iterations between two looks at what has converged: each look waits for the device."""
        self._packed: PackedBlock | None = None
        self._may_pack = True

    def _through_layers(self, h_BLM: Tensor, place: int) -> Tensor:
        """Hidden states of places place .. (text included) after all layers; fills the caches."""
        rope = self.rope.slice(place, place + h_BLM.shape[1])
        for layer, cache in zip(self.block.layers, self.caches, strict=True):
            h_BLM = layer.extend(h_BLM, rope, cache, place)  # type: ignore[operator]
        return h_BLM

    def _affine(self, h_BLM: Tensor) -> tuple[Tensor, Tensor]:
        mu, sigma = self.block.affine(h_BLM)
        return guide_pair(mu, sigma, self.guidance) if self.pair else (mu, sigma)

    def embed(self, start: int, stop: int) -> Tensor:
        """What the layers read at places start .. stop - 1: [B, L, M], or [2 B, L, M] of a pair."""
        s_BLC = self._inputs[:, start:stop]
        return self.block.embed(torch.cat([s_BLC, s_BLC]) if self.pair else s_BLC)

    @torch.no_grad()
    def restart(self, known_BLC: Tensor | None = None) -> None:
        """Forget everything, and read the text and the known first tokens in one parallel pass."""
        known = 0 if known_BLC is None else known_BLC.shape[1]
        if known_BLC is not None and known:
            self.tokens_BLC[:, :known] = known_BLC
        h_BLM = None if self.text is None else self.block.embed_text(self.text)
        if known:
            tokens = self.embed(0, known)
            h_BLM = tokens if h_BLM is None else torch.cat([h_BLM, tokens], dim=1)
        if h_BLM is not None:
            h_BLM = self._through_layers(h_BLM, 0)
            self.work.prefilled += h_BLM.shape[1]
        if known and h_BLM is not None:
            mu, sigma = self._affine(h_BLM[:, self.text_len :])
            self.mu_BLC[:, :known], self.sigma_BLC[:, :known] = mu, sigma
        self.solved = self.fresh = self.guessed = self.evaluated = known

    @torch.no_grad()
    def evaluate(self, start: int, stop: int) -> None:
        """One pass over places start .. stop - 1: mu and sigma of tokens start + 1 .. stop.

        Tokens count from 1 here; theirs are `mu_BLC[:, start:stop]` and `sigma_BLC[:, start:stop]`.
        """
        place = self.text_len + start
        if self._packed is not None and stop - start <= self._packed.rows:
            mu, sigma = self._packed.predict(self._inputs[:, start:stop], self.rope, place)
        else:
            mu, sigma = self.block.affine(self._through_layers(self.embed(start, stop), place))
        self.put(start, stop, mu, sigma)

    def put(self, start: int, stop: int, mu: Tensor, sigma: Tensor) -> None:
        """Take what one pass said of places start .. stop - 1: mu and sigma before guidance."""
        if self.pair:
            mu, sigma = guide_pair(mu, sigma, self.guidance)
        self.mu_BLC[:, start:stop], self.sigma_BLC[:, start:stop] = mu, sigma
        self.evaluated = max(self.evaluated, stop)
        self.work.iterations += 1
        self.work.evaluations += stop - start

    def use_packed(self, rows: int) -> None:
        """Use packed weights for passes of at most `rows` places; with 0, never.

        Without effect where this build of torch does not have them
        (`flow.packed_weights.can_pack`).
        """
        self._may_pack = rows > 0 and can_pack(self.block)
        self._packed = PackedBlock(self.block, self.caches, rows) if self._may_pack else None

    def expect(self, rows: int) -> None:
        """Say that many passes of at most `rows` places will follow.

        Weights are then packed, unless `use_packed` has decided that already.
        """
        if self._packed is None and self._may_pack:
            self.use_packed(rows)

    @torch.inference_mode()
    def solve(self, steps: Steps) -> int:
        """Carry out a schedule alone; returns the number of iterations."""
        while True:
            try:
                start, stop = next(steps)
            except StopIteration as end:
                return int(end.value)
            self.evaluate(start, stop)

    def refresh(self) -> Steps:
        """Make every solved place fresh: what follows then depends on the solved tokens alone."""
        if self.fresh < self.solved:
            yield self.fresh, self.solved
            self.fresh = self.solved
        return 0

    def sequential(self, z_BLC: Tensor) -> Steps:
        """Solve the next L tokens one by one: the reference for every other schedule."""
        yield from self.refresh()
        for i in range(z_BLC.shape[1]):
            place = self.solved
            yield place, place + 1
            token = self.mu_BLC[:, place] + self.sigma_BLC[:, place] * z_BLC[:, i]
            self.tokens_BLC[:, place] = token
            self.solved = self.fresh = place + 1
        return z_BLC.shape[1]

    def jacobi(self, z_BLC: Tensor, start_BLC: Tensor, tolerance: float) -> Steps:
        """Solve the next L tokens together from start values; returns the number of sweeps.

        A sweep is s ← mu(s) + sigma(s) z of all L tokens at once. It stops when, in every sequence,
        the squared change of a sweep is at most `tolerance` times the squared tokens, or after L
        sweeps, when all is exact. The stop flag is read every `look_every` sweeps; more sweeps only
        make the result better.
        """
        first, count = self.solved, z_BLC.shape[1]
        stop = first + count
        self.tokens_BLC[:, first:stop] = start_BLC
        block = self.tokens_BLC[:, first:stop]
        sweeps = 0
        while sweeps < count:
            exact = first + sweeps
            # Exact tokens leave the sweep; at tolerance 0 they stay, so that all sweeps round
            # alike.
            low = exact if tolerance > 0 else first
            # The first sweep also repairs what the block before left unfresh: no pass of its own.
            yield min(self.fresh, low), stop
            self.fresh = max(self.fresh, exact + 1)
            active = self.tokens_BLC[:, low:stop]
            new = self.mu_BLC[:, low:stop] + self.sigma_BLC[:, low:stop] * z_BLC[:, low - first :]
            change = (new - active).square().sum(dim=(1, 2))
            active.copy_(new)
            sweeps += 1
            if sweeps % self.look_every == 0 or sweeps == count:
                size = block.square().sum(dim=(1, 2))
                unchanged, converged = _read_flags(change, size, tolerance)
                if unchanged:
                    # The last pass read the final tokens: nothing is left to repair.
                    self.fresh = stop
                if converged:
                    break
        self.solved = stop
        return sweeps


def _read_flags(change_B: Tensor, size_B: Tensor, tolerance: float) -> tuple[bool, bool]:
    """(nothing changed at all, every sequence within tolerance); NaN is neither.

    Both come in one transfer: each waits for the device.
    """
    flags = torch.stack([(change_B == 0).all(), (change_B <= tolerance * size_B).all()])
    unchanged, converged = flags.tolist()
    return bool(unchanged), bool(converged)


def invert_block(
    block: AffineBlock,
    z_BLC: Tensor,
    rope: Rope,
    *,
    tolerance: float = 0.0,
    sequential: bool = False,
    work: Work | None = None,
) -> Tensor:
    """Tokens [B, L, C] of whole sequences z, through the inverse of a block that reads no text.

    Jacobi starts at z itself, sweeps the whole length, and is exact at tolerance 0. What it took is
    added to `work`.
    """
    inverter = Inverter(block, rope, batch=len(z_BLC))
    inverter.restart()
    z_BLC = z_BLC.to(inverter.mu_BLC.dtype)
    schedule = (
        inverter.sequential(z_BLC) if sequential else inverter.jacobi(z_BLC, z_BLC, tolerance)
    )
    inverter.solve(schedule)
    if work is not None:
        work.add(inverter.work)
    return inverter.tokens_BLC
