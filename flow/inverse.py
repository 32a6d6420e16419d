"""Solving s_i = mu_i(s_<i) + sigma_i(s_<i) z_i for one affine block: token by token, by Jacobi sweeps of
blocks, or in a sliding window.

Knows one block, its key-value cache and guidance. Does not know frames, orders, streams or seeds: tokens
come in the block's own order, and a caller says which stretch of them to solve.

The system is triangular: after k sweeps of a stretch its first k tokens are exactly right, whatever the start
values, so sweep k leaves them out. A place is *fresh* when its keys and values were computed from the final
value of its token; `Inverter` never lets a later stretch read a place that is not.

Shapes: B batch, L tokens of the longest sequence, C numbers per token, J text tokens, E text width. Place 0
holds sos and place i token i, so that place i says mu and sigma of token i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flow.attention import LayerCache
from flow.block import AffineBlock
from flow.guidance import guide_pair
from flow.packed import PackedBlock, can_pack
from flow.rope import Rope

GUESS_MAX = 1e3
"""Guesses of a sliding window stay within this: far beyond any latent, far below what overflows a norm."""


@dataclass
class Work:
    """What a solver did. `iterations`: passes through the transformer; `evaluations`: token positions in
    them (a guided pair counts once); `prefilled`: known positions read in to start or restart."""

    iterations: int = 0
    evaluations: int = 0
    prefilled: int = 0

    def copy(self) -> Work:
        return Work(self.iterations, self.evaluations, self.prefilled)

    def since(self, earlier: Work) -> Work:
        """The difference to an earlier copy."""
        return Work(
            self.iterations - earlier.iterations,
            self.evaluations - earlier.evaluations,
            self.prefilled - earlier.prefilled,
        )


@dataclass(frozen=True)
class Window:
    """The shape of a sliding window. `size`: tokens; `cold`: tokens while the first frame is made, where start
    values are poor; `columns`: tokens in a row of a frame.

    `carry`: what share of a token's change is expected to reach the token after it, the one a row on and the one before
    that. Passing it on at once (one step of Newton's method with a crude Jacobian, I - A) saves about 5% of all
    iterations; it moves guesses only, so any numbers here are exact.
    """

    size: int
    cold: int
    columns: int
    carry: tuple[float, float, float] = (0.05, 0.1, 0.05)

    def carry_matrix(self, period: int, like: Tensor) -> Tensor:
        """(I - A)^-1 [size, size], lower triangular with ones on the diagonal."""
        size = min(max(self.size, self.cold), period)
        matrix = torch.eye(size, dtype=like.dtype)
        for offset, share in zip((1, self.columns, self.columns - 1), self.carry, strict=True):
            if 0 < offset < size:
                matrix.diagonal(-offset).sub_(share)
        return torch.linalg.inv(matrix).tril().to(like.device)


class Inverter:
    """One block being inverted for B sequences at once, its cache allocated once.

    block: AffineBlock; rope: turns of J + L places; text_BJE: what it reads, None for none; null_BJE: the null
    text, given exactly when `guidance` > 0: the pair then runs as one batch of two.
    tokens_BLC, mu_BLC, sigma_BLC hold what has been solved, what it was last computed from.
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
        self.solved = 0
        self._fresh = 0
        self._guessed = 0  # tokens that have a value, solved or not: what a window has reached
        self._evaluated = 0  # tokens whose mu and sigma were computed, finally or not
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

    def _embed(self, start: int, stop: int) -> Tensor:
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
            tokens = self._embed(0, known)
            h_BLW = tokens if h_BLW is None else torch.cat([h_BLW, tokens], dim=1)
        if h_BLW is not None:
            h_BLW = self._run(h_BLW, 0)
            self.work.prefilled += h_BLW.shape[1]
        if known and h_BLW is not None:
            mu, sigma = self._affine(h_BLW[:, self.text_len :])
            self.mu_BLC[:, :known], self.sigma_BLC[:, :known] = mu, sigma
        self.solved = self._fresh = self._guessed = self._evaluated = known

    @torch.no_grad()
    def evaluate(self, start: int, stop: int) -> None:
        """One pass over places start .. stop - 1: mu and sigma of tokens start + 1 .. stop (1-based)."""
        place = self.text_len + start
        if self._packed is not None and stop - start <= self._packed.rows:
            mu, sigma = self._packed.predict(self._inputs[:, start:stop], self.rope, place)
        else:
            mu, sigma = self.block.affine(self._run(self._embed(start, stop), place))
        if self.pair:
            mu, sigma = guide_pair(mu, sigma, self.guidance)
        self.mu_BLC[:, start:stop], self.sigma_BLC[:, start:stop] = mu, sigma
        self._evaluated = max(self._evaluated, stop)
        self.work.iterations += 1
        self.work.evaluations += stop - start

    def use_packed(self, rows: int) -> None:
        """Take packed weights for passes of at most `rows` places, where this build of torch has them; 0: never."""
        self._may_pack = rows > 0 and can_pack(self.block)
        self._packed = PackedBlock(self.block, self.caches, rows) if self._may_pack else None

    def refresh(self) -> None:
        """Make every solved place fresh, so that what follows depends on the solved tokens alone."""
        if self._fresh < self.solved:
            self.evaluate(self._fresh, self.solved)
            self._fresh = self.solved

    @torch.no_grad()
    def sequential(self, z_BLC: Tensor) -> None:
        """Solve the next L tokens one by one: the reference every other schedule is held to."""
        self.refresh()
        for i in range(z_BLC.shape[1]):
            place = self.solved
            self.evaluate(place, place + 1)
            token = self.mu_BLC[:, place] + self.sigma_BLC[:, place] * z_BLC[:, i]
            self.tokens_BLC[:, place] = token
            self.solved = self._fresh = place + 1

    @torch.no_grad()
    def jacobi(self, z_BLC: Tensor, start_BLC: Tensor, tolerance: float) -> int:
        """Solve the next L tokens together from start values; returns the number of sweeps.

        Stops when, in every sequence, the squared change of a sweep is at most `tolerance` times the squared
        tokens of the stretch, or after L sweeps, when all is exact. On an accelerator the stop flag is read
        every fourth sweep only; extra sweeps only make the result better.
        """
        first, count = self.solved, z_BLC.shape[1]
        stop = first + count
        self.tokens_BLC[:, first:stop] = start_BLC
        stretch = self.tokens_BLC[:, first:stop]
        look_every = 1 if stretch.device.type == "cpu" else 4
        sweeps = 0
        while sweeps < count:
            done = first + sweeps
            # Settled tokens leave the sweep; at tolerance 0 they stay, so that all sweeps round alike.
            low = done if tolerance > 0 else first
            # The first sweep also repairs what the stretch before left unfresh: no pass of its own.
            self.evaluate(min(self._fresh, low), stop)
            self._fresh = max(self._fresh, done + 1)
            active = self.tokens_BLC[:, low:stop]
            new = self.mu_BLC[:, low:stop] + self.sigma_BLC[:, low:stop] * z_BLC[:, low - first :]
            change = (new - active).square().sum(dim=(1, 2))
            active.copy_(new)
            sweeps += 1
            if sweeps % look_every == 0 or sweeps == count:
                size = stretch.square().sum(dim=(1, 2))
                still, settled = _read_flags(change, size, tolerance)
                if still:
                    self._fresh = stop
                if settled:
                    break
        self.solved = stop
        return sweeps

    @torch.inference_mode()
    def sliding(
        self,
        z_BLC: Tensor,
        first: int,
        until: int,
        *,
        period: int,
        window: Window,
        tolerance: float,
    ) -> int:
        """Solve tokens solved .. until - 1 in a sliding window; returns the number of iterations.

        z_BLC: noise of tokens first, first + 1, ...; the window runs on past `until` as far as it reaches, and the
        next call finds its guesses there. period: tokens per frame, of the block's order; a token entering
        starts at mu + sigma z with mu and sigma of its place in the frame before, or, in the first frame, of its
        neighbours.

        One iteration computes F = mu + sigma z of every token in the window from the tokens s as they stand. With
        k the length of the longest prefix where each token's root mean square of (s - F)/sigma is at most
        `tolerance`, tokens 1 .. k are accepted *as they stand* and token k + 1 as F. So all that an accepted token was
        computed from is accepted and unchanged since: its keys and values are those of the final tokens, and
        (s - F)/sigma *is* its certificate, exactly 0 for token k + 1. What comes after k + 1, however
        wild, has no part in the decision. At tolerance 0 a prefix is accepted only where nothing changed.
        The rest moves to F and a little beyond (`Window.carry`), which only changes guesses.
        """
        end = first + z_BLC.shape[1]
        self.refresh()
        if self._packed is None and self._may_pack:
            self.use_packed(max(window.size, window.cold))
        carry = window.carry_matrix(period, self.tokens_BLC)
        iterations = 0
        while self.solved < until:
            low = self.solved
            # No wider than a frame: mu and sigma of the frame before are then final where they are looked up.
            size = min(window.cold if low < period else window.size, period)
            high = min(low + size, end)
            if self._guessed < high:
                self._guess(max(self._guessed, low), high, z_BLC, first, period, window.columns)
            self.evaluate(low, high)
            sigma = self.sigma_BLC[:, low:high]
            new = self.mu_BLC[:, low:high] + sigma * z_BLC[:, low - first : high - first]
            tokens = self.tokens_BLC[:, low:high]
            change = new - tokens
            residual_BL = (change / sigma).square().mean(-1)
            # One host read. NaN compares false, so nothing at or after one is accepted as it stands.
            near = (residual_BL <= tolerance * tolerance).all(0).tolist()
            kept = near.index(False) if False in near else high - low
            if kept < high - low:
                rest = high - low - kept
                moved = tokens[:, kept + 1 :] + carry[1:rest, :rest] @ change[:, kept:]
                # A masked place still enters a product with weight 0, so a guess must be finite.
                tokens[:, kept + 1 :] = moved.nan_to_num_(nan=0.0).clamp_(-GUESS_MAX, GUESS_MAX)
                tokens[:, kept] = new[:, kept]
            self.solved = self._fresh = min(low + kept + 1, high)
            iterations += 1
        return iterations

    @torch.no_grad()
    def suggest(self, start_BLC: Tensor) -> None:
        """Start values of the next tokens for `sliding`, in place of its own; any numbers give an exact result."""
        stop = self.solved + start_BLC.shape[1]
        start_BLC = start_BLC.nan_to_num(nan=0.0).clamp(-GUESS_MAX, GUESS_MAX)
        self.tokens_BLC[:, self.solved : stop] = start_BLC
        self._guessed = stop

    def _guess(
        self, low: int, high: int, z_BLC: Tensor, first: int, period: int, columns: int
    ) -> None:
        """Start values of tokens low .. high - 1, which are at most a frame ahead of the last solved one."""
        z = z_BLC[:, low - first : high - first]
        guess = self.tokens_BLC[:, low:high]
        cold = min(max(period, low), high) - low
        if cold and not self._evaluated:
            guess[:, :cold] = z[:, :cold]
        elif cold:
            # In the first frame there is no frame before: the nearest token behind and the nearest above that have
            # been evaluated stand in for it, half each.
            last = self._evaluated - 1
            behind = [min(token - 1, last) for token in range(low, low + cold)]
            above = [_last_above(token, columns, last) for token in range(low, low + cold)]
            near = torch.tensor([behind, above], device=guess.device)
            mu, sigma = (y[:, near].mean(1) for y in (self.mu_BLC, self.sigma_BLC))
            guess[:, :cold] = mu + sigma * z[:, :cold]
        if low + cold < high:
            before = slice(low + cold - period, high - period)
            guess[:, cold:] = self.mu_BLC[:, before] + self.sigma_BLC[:, before] * z[:, cold:]
        self._guessed = high


def _last_above(token: int, columns: int, last: int) -> int:
    """The nearest place whole rows above `token` that is at most `last`; `last` where there is none."""
    rows = max(1, -((last - token) // columns))
    return token - rows * columns if token >= rows * columns else last


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
) -> Tensor:
    """Whole sequences through the inverse of a block that reads no text -> tokens [B, L, C].

    Jacobi starts at z itself, sweeps the whole length, and is exact at tolerance 0.
    """
    inverter = Inverter(block, rope, batch=len(z_BLC))
    inverter.restart()
    z_BLC = z_BLC.to(inverter.mu_BLC.dtype)
    if sequential:
        inverter.sequential(z_BLC)
    else:
        inverter.jacobi(z_BLC, z_BLC, tolerance)
    return inverter.tokens_BLC
