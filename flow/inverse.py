"""Solving s_i = mu_i(s_<i) + sigma_i(s_<i) z_i for one affine block: token by token or by Jacobi sweeps of blocks
(`flow.sliding` has the third schedule).

Knows one block, its key-value cache and guidance. Does not know frames, orders, streams or seeds: tokens
come in the block's own order, and a caller says which stretch of them to solve.

A schedule is a generator: it yields the stretch of places that it wants evaluated next, and finds mu and sigma filled in
when it goes on. So one pass may serve one inverter (`Inverter.solve`) or many (`flow.stream_batch`).

The system is triangular: after k sweeps of a stretch its first k tokens are exactly right, whatever the start
values, so sweep k leaves them out. A place is *fresh* when its keys and values were computed from the final
value of its token; `Inverter` never lets a later stretch read a place that is not.

Shapes: B batch, L tokens of the longest sequence, C numbers per token, J text tokens, E text width. Place 0
holds sos and place i token i, so that place i says mu and sigma of token i + 1.
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

Steps = Generator[tuple[int, int], None, int]
"""Yields (start, stop): the places to evaluate next. Returns the number of iterations."""


class Inverter:
    """One block being inverted for B sequences at once, its cache allocated once.

    block: AffineBlock; rope: turns of J + L places; text_BJE: what it reads, None for none; null_BJE: the null
    text, given exactly when `guidance` > 0: the pair then runs as one batch of two.
    tokens_BLC, mu_BLC, sigma_BLC hold what has been solved, what it was last computed from. Schedules read and write
    them, `solved` and `fresh` (how many first tokens are final, how many first places are fresh), and `guessed` and
    `evaluated` (how many have a value, final or not; how many have mu and sigma).
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

    def _run(self, h_BLW: Tensor, place: int) -> Tensor:
        """Hidden states of places (text included) place .. through all layers, written to the caches."""
        rope = self.rope.slice(place, place + h_BLW.shape[1])
        for layer, cache in zip(self.block.layers, self.caches, strict=True):
            h_BLW = layer.extend(h_BLW, rope, cache, place)  # type: ignore[operator]
        return h_BLW

    def _affine(self, h_BLW: Tensor) -> tuple[Tensor, Tensor]:
        mu, sigma = self.block.affine(h_BLW)
        return guide_pair(mu, sigma, self.guidance) if self.pair else (mu, sigma)

    def embed(self, start: int, stop: int) -> Tensor:
        """What the layers read at places start .. stop - 1 [B or 2 B, L, W]."""
        s_BLC = self._inputs[:, start:stop]
        return self.block.embed(torch.cat([s_BLC, s_BLC]) if self.pair else s_BLC)

    @torch.no_grad()
    def restart(self, known_BLC: Tensor | None = None) -> None:
        """Forget everything and read the text and the known first tokens in one parallel pass."""
        known = 0 if known_BLC is None else known_BLC.shape[1]
        if known_BLC is not None and known:
            self.tokens_BLC[:, :known] = known_BLC
        h_BLW = None if self.text is None else self.block.embed_text(self.text)
        if known:
            tokens = self.embed(0, known)
            h_BLW = tokens if h_BLW is None else torch.cat([h_BLW, tokens], dim=1)
        if h_BLW is not None:
            h_BLW = self._run(h_BLW, 0)
            self.work.prefilled += h_BLW.shape[1]
        if known and h_BLW is not None:
            mu, sigma = self._affine(h_BLW[:, self.text_len :])
            self.mu_BLC[:, :known], self.sigma_BLC[:, :known] = mu, sigma
        self.solved = self.fresh = self.guessed = self.evaluated = known

    @torch.no_grad()
    def evaluate(self, start: int, stop: int) -> None:
        """One pass over places start .. stop - 1: mu and sigma of tokens start + 1 .. stop (1-based)."""
        place = self.text_len + start
        if self._packed is not None and stop - start <= self._packed.rows:
            mu, sigma = self._packed.predict(self._inputs[:, start:stop], self.rope, place)
        else:
            mu, sigma = self.block.affine(self._run(self.embed(start, stop), place))
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
        """Take packed weights for passes of at most `rows` places, where this build of torch has them; 0: never."""
        self._may_pack = rows > 0 and can_pack(self.block)
        self._packed = PackedBlock(self.block, self.caches, rows) if self._may_pack else None

    def expect(self, rows: int) -> None:
        """Many passes of at most `rows` places will follow: packs weights where nobody has decided that yet."""
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
        """Make every solved place fresh, so that what follows depends on the solved tokens alone."""
        if self.fresh < self.solved:
            yield self.fresh, self.solved
            self.fresh = self.solved
        return 0

    def sequential(self, z_BLC: Tensor) -> Steps:
        """Solve the next L tokens one by one: the reference every other schedule is held to."""
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

        Stops when, in every sequence, the squared change of a sweep is at most `tolerance` times the squared
        tokens of the stretch, or after L sweeps, when all is exact. The stop flag is read every `look_every` sweeps; more
        sweeps only make the result better.
        """
        first, count = self.solved, z_BLC.shape[1]
        stop = first + count
        self.tokens_BLC[:, first:stop] = start_BLC
        stretch = self.tokens_BLC[:, first:stop]
        sweeps = 0
        while sweeps < count:
            done = first + sweeps
            # Settled tokens leave the sweep; at tolerance 0 they stay, so that all sweeps round alike.
            low = done if tolerance > 0 else first
            # The first sweep also repairs what the stretch before left unfresh: no pass of its own.
            yield min(self.fresh, low), stop
            self.fresh = max(self.fresh, done + 1)
            active = self.tokens_BLC[:, low:stop]
            new = self.mu_BLC[:, low:stop] + self.sigma_BLC[:, low:stop] * z_BLC[:, low - first :]
            change = (new - active).square().sum(dim=(1, 2))
            active.copy_(new)
            sweeps += 1
            if sweeps % self.look_every == 0 or sweeps == count:
                size = stretch.square().sum(dim=(1, 2))
                still, settled = _read_flags(change, size, tolerance)
                if still:
                    self.fresh = stop
                if settled:
                    break
        self.solved = stop
        return sweeps


def _read_flags(change_B: Tensor, size_B: Tensor, tolerance: float) -> tuple[bool, bool]:
    """(nothing changed at all, every sequence within tolerance); NaN is neither. One host read."""
    flags = torch.stack([(change_B == 0).all(), (change_B <= tolerance * size_B).all()])
    still, settled = flags.tolist()
    return bool(still), bool(settled)


def invert_block(
    block: AffineBlock,
    z_BLC: Tensor,
    rope: Rope,
    *,
    tolerance: float = 0.0,
    sequential: bool = False,
    work: Work | None = None,
) -> Tensor:
    """Whole sequences through the inverse of a block that reads no text -> tokens [B, L, C].

    Jacobi starts at z itself, sweeps the whole length, and is exact at tolerance 0. What it took is added to `work`.
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
