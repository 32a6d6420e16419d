"""The sliding window: one affine block's inverse by the longest converged prefix.

The result is exact at tolerance 0, whatever the start values; above it, every accepted token's
residual is its certificate. Knows an `Inverter`, and how many tokens a row and a frame have. Knows
nothing of streams, seeds or orders.

Source: `docs/design.md`, "Sampling".

Shapes: B batch, L tokens of the window, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flow.inverse import Inverter, Steps

GUESS_MAX = 1e3
"""Guesses stay within this: far beyond any latent, far below what overflows a norm."""


@dataclass(frozen=True)
class SlidingWindow:
    """The shape of a sliding window of tokens.

    >>> window = SlidingWindow(size=64, cold=20, columns=8, period=64)
    >>> window.reach(0), window.reach(64)
    (20, 64)
    """

    size: int
    """Tokens of the window."""
    cold: int
    """Tokens of the window while the first frame is made, where start values are poor."""
    columns: int
    """Tokens in a row of a frame."""
    period: int
    """Tokens in a frame."""
    carry: tuple[float, float, float] = (0.05, 0.1, 0.05)
    """Share of a token's change that is expected to reach three of the tokens after it.

    They are the next token, the one a row on, and the one before that.
    Passing it on at once is one step of Newton's method with a crude Jacobian, I - A; it saves
    about 5% of all iterations. It moves guesses only, so any numbers here give an exact result.
    """

    def reach(self, low: int) -> int:
        """Tokens of a window that begins at token `low`.

        They are no more than a frame, so that mu and sigma of the frame before are final where they
        are looked up.
        """
        return min(self.cold if low < self.period else self.size, self.period)

    def carry_matrix(self, like: Tensor) -> Tensor:
        """(I - A)^-1 [size, size], lower triangular with ones on the diagonal."""
        return _carry_matrix(self, like.dtype, like.device)


@lru_cache(maxsize=32)
def _carry_matrix(window: SlidingWindow, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = min(max(window.size, window.cold), window.period)
    matrix = torch.eye(size, dtype=dtype)
    for offset, share in zip((1, window.columns, window.columns - 1), window.carry, strict=True):
        if 0 < offset < size:
            matrix.diagonal(-offset).sub_(share)
    return torch.linalg.inv(matrix).tril().to(device)


def slide(
    inverter: Inverter,
    z_BLC: Tensor,
    first: int,
    until: int,
    window: SlidingWindow,
    tolerance: float,
) -> Steps:
    """Solve tokens solved .. until - 1: a schedule for `Inverter.solve`.

    One iteration computes F = mu + sigma z of every token in the window from the tokens s as they
    stand. Let k be the length of the longest prefix in which each token's root mean square of (s -
    F)/sigma is at most `tolerance`. Tokens 1 .. k are accepted *as they stand*, and token k + 1 as
    F. So all that an accepted token was computed from is accepted and unchanged since: its keys and
    values are those of the final tokens, and (s - F)/sigma *is* its certificate, exactly 0 for
    token k + 1. What comes after k + 1, however wild, has no part in the decision. At tolerance 0 a
    prefix is accepted only where nothing changed. The rest moves to F and a little beyond
    (`SlidingWindow.carry`), which only changes guesses.

    A token that enters the window starts at mu + sigma z, with mu and sigma of its place in the
    frame before or, in the first frame, of its neighbours.

    How far the prefix reaches stays on the device for `Inverter.look_every` iterations, during
    which the window stands still.

    Args:
        inverter: the block and its tokens; `inverter.solved` of them are final.
        z_BLC: noise of tokens first, first + 1, ...; where it goes on past `until`, so does the
            window as far as it reaches, and the next call finds its guesses there.
        first: the token that z_BLC begins at.
        until: one after the last token to solve.
        window: shape of the window.
        tolerance: largest root mean square of an accepted token's residual.

    Returns:
        the number of iterations.
    """
    end = first + z_BLC.shape[1]
    yield from inverter.refresh()
    inverter.expect(max(window.size, window.cold))
    carry = window.carry_matrix(inverter.tokens_BLC)
    iterations = 0
    while inverter.solved < until:
        low = inverter.solved
        high = min(low + window.reach(low), end)
        if inverter.guessed < high:
            _guess(inverter, max(inverter.guessed, low), high, z_BLC, first, window)
        z = z_BLC[:, low - first : high - first]
        settle = _settle if inverter.look_every == 1 else _settle_unseen
        prefix: Tensor | int = 0
        for _ in range(min(inverter.look_every, high - low)):
            yield low, high
            prefix = settle(inverter, low, high, z, carry, tolerance)
            iterations += 1
        inverter.solved = inverter.fresh = min(low + int(prefix) + 1, high)
    return iterations


def _compare(
    inverter: Inverter, low: int, high: int, z_BLC: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(F [B, L, C] of the window's tokens, F minus the tokens, which tokens [L] are near F).

    Near counts only where it holds in every sequence of the batch.
    """
    mu, sigma = inverter.mu_BLC[:, low:high], inverter.sigma_BLC[:, low:high]
    new = torch.addcmul(mu, sigma, z_BLC)
    change = new - inverter.tokens_BLC[:, low:high]
    residual_BL = torch.linalg.vector_norm(change / sigma, dim=-1)
    # NaN compares false, so nothing at or after one is accepted as it stands.
    near_BL = residual_BL <= tolerance * change.shape[-1] ** 0.5
    return new, change, near_BL.all(0)


def _settle(
    inverter: Inverter, low: int, high: int, z_BLC: Tensor, carry: Tensor, tolerance: float
) -> int:
    """Move the window's tokens after a pass; how many first ones were accepted as they stand."""
    new, change, near_L = _compare(inverter, low, high, z_BLC, tolerance)
    prefix = _prefix_length(near_L.tolist())
    tokens, size = inverter.tokens_BLC[:, low:high], high - low
    tokens[:, prefix : prefix + 1] = new[:, prefix : prefix + 1]
    if prefix + 1 < size:
        rest = tokens[:, prefix + 1 :]
        shares = carry[prefix + 1 : size, prefix:size].expand(len(rest), -1, -1)
        rest.baddbmm_(shares, change[:, prefix:])
        # A masked place still enters a product with weight 0, so a guess must be finite.
        rest.nan_to_num_(nan=0.0).clamp_(-GUESS_MAX, GUESS_MAX)
    return prefix


def _prefix_length(flags: list[bool]) -> int:
    """How many flags are true before the first that is not.

    >>> _prefix_length([True, True, False, True]), _prefix_length([True])
    (2, 1)
    """
    for index, flag in enumerate(flags):
        if not flag:
            return index
    return len(flags)


def _settle_unseen(
    inverter: Inverter, low: int, high: int, z_BLC: Tensor, carry: Tensor, tolerance: float
) -> Tensor:
    """`_settle` where a look at the device costs more than masks: the length stays there."""
    new, change, near_L = _compare(inverter, low, high, z_BLC, tolerance)
    prefix = near_L.long().cumprod(0).sum()
    tokens, size = inverter.tokens_BLC[:, low:high], high - low
    place_L1 = torch.arange(size, device=prefix.device).unsqueeze(1)
    change = change.masked_fill_(place_L1 < prefix, 0.0)
    moved = tokens + carry[:size, :size] @ change
    moved = moved.nan_to_num_(nan=0.0).clamp_(-GUESS_MAX, GUESS_MAX)
    moved = torch.where(place_L1 == prefix, new, moved)
    tokens.copy_(torch.where(place_L1 < prefix, tokens, moved))
    return prefix


def suggest(inverter: Inverter, start_BLC: Tensor) -> None:
    """Give start values of the next tokens, in place of the window's own.

    Any numbers give an exact result; good ones save iterations.
    """
    stop = inverter.solved + start_BLC.shape[1]
    start_BLC = start_BLC.nan_to_num(nan=0.0).clamp(-GUESS_MAX, GUESS_MAX)
    inverter.tokens_BLC[:, inverter.solved : stop] = start_BLC
    inverter.guessed = stop


def _guess(
    inverter: Inverter, low: int, high: int, z_BLC: Tensor, first: int, window: SlidingWindow
) -> None:
    """Set start values of tokens low .. high - 1, at most a frame ahead of the last solved one."""
    z = z_BLC[:, low - first : high - first]
    guess = inverter.tokens_BLC[:, low:high]
    both = inverter.mu_BLC, inverter.sigma_BLC
    cold = min(max(window.period, low), high) - low
    if cold and not inverter.evaluated:
        guess[:, :cold] = z[:, :cold]
    elif cold:
        # In the first frame there is no frame before: the nearest token behind and the nearest
        # above that have been evaluated stand in for it, half each.
        last = inverter.evaluated - 1
        behind = [min(token - 1, last) for token in range(low, low + cold)]
        above = [_last_above(token, window.columns, last) for token in range(low, low + cold)]
        near = torch.tensor([behind, above], device=guess.device)
        mu, sigma = (y[:, near].mean(1) for y in both)
        guess[:, :cold] = mu + sigma * z[:, :cold]
    if low + cold < high:
        before = slice(low + cold - window.period, high - window.period)
        mu, sigma = (y[:, before] for y in both)
        guess[:, cold:] = mu + sigma * z[:, cold:]
    # As in `_settle`: what is not finite would reach the tokens before it through a masked place.
    guess.nan_to_num_(nan=0.0).clamp_(-GUESS_MAX, GUESS_MAX)
    inverter.guessed = high


def _last_above(token: int, columns: int, last: int) -> int:
    """The nearest place whole rows above `token` that is at most `last`; else `last`."""
    rows = max(1, -((last - token) // columns))
    return token - rows * columns if token >= rows * columns else last
