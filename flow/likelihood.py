"""How likely a flow finds latents: log-densities by video, frame and token, in bounded memory.

Two names are kept apart everywhere (`docs/design.md`, "The model exactly", loss):

- `nll`, the negative log-likelihood: -log p of a normalised density, ½ ln 2π of every dimension
  included. `log_prob` is its negative, as in `torch.distributions`. Bits per dimension are usually
  quoted of this one.
- `loss`, what training minimises: the same without that constant. For data that carries Gaussian
  noise of standard deviation σ its mean per dimension is at least ½ + ln σ (`noise_floor`).

Knows the flow's blocks and clips of latents. Knows nothing of prompts, codecs or files.

Shapes: K noise draws, B batch, T latent frames, h, w latent cells, H, W tokens, L tokens of a
sequence, C channels, J text tokens, E text width, M model width.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flow.attention import TransformerLayer
from flow.flow import LOG_SQRT_2PI, DeepShallowFlow
from flow.rope import Rope
from flow.sample_spec import ContextWindow
from flow.tokens import frame_sequence
from flowreel.errors import FlowreelError, FlowreelWarning

Per = Literal["video", "frame", "token"]
Unit = Literal["nats", "nats_per_dim", "bits_per_dim"]
_AXES: dict[str, tuple[int, ...]] = {"video": (-3, -2, -1), "frame": (-2, -1), "token": ()}
_UNITS: tuple[Unit, ...] = ("nats", "nats_per_dim", "bits_per_dim")

CHUNK_TOKENS = 2048
"""Tokens in one pass through a layer: enough to fill an accelerator, little beside a long clip."""

FLOOR_ERRORS = 4.0
"""Standard errors under the noise floor at which a mean is taken for a fault and not for chance."""


class LikelihoodError(FlowreelError, ValueError):
    """A likelihood asked for in a way that cannot be; the message names the value and the rule."""


class NoiseFloorWarning(FlowreelWarning):
    """A mean loss that no density can have on data with that much noise."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a flow finds clips, token by token.

        loss = ½ z² - Σ_blocks log|det|,   nll = loss + ½ ln 2π   (of every dimension)

    A frame's value is exactly the conditional log-density of that frame given the frames before it
    (and the text), since no frame moves an earlier one. A token's value is its share of its
    frame's: inside a frame the blocks read in different orders, so it is no conditional density by
    itself.

    >>> clip = Likelihood(torch.zeros(1, 2, 1, 3), token_dim=4)
    >>> clip.loss("frame").tolist(), round(float(clip.nll("video", "bits_per_dim")), 4)
    ([[0.0, 0.0]], 1.3257)
    """

    loss_BTHW: Tensor
    """½z² - Σ log|det| of each token in raster order, summed over its channels: nats, fp64.

    There may be axes before B, such as the draws of `noisy_likelihood`.
    """
    token_dim: int
    """Channels of a token."""

    def loss(self, per: Per = "video", unit: Unit = "nats_per_dim") -> Tensor:
        """Training loss, ½ ln 2π left out: [..., B], [..., B, T] or [..., B, T, H, W]."""
        return self._summed(self.loss_BTHW, per, unit)

    def nll(self, per: Per = "video", unit: Unit = "nats") -> Tensor:
        """Negative log-likelihood, ½ ln 2π of every dimension included; shapes as `loss`."""
        return self._summed(self.loss_BTHW + self.token_dim * LOG_SQRT_2PI, per, unit)

    def log_prob(self, per: Per = "video") -> Tensor:
        """Log-density in nats, ½ ln 2π of every dimension included; shapes as `loss`."""
        return -self.nll(per, "nats")

    def dims(self, per: Per = "video") -> int:
        """Dimensions of one video, frame or token."""
        if per not in _AXES:
            raise LikelihoodError(f"per = {per!r}: must be one of {', '.join(_AXES)}")
        return self.token_dim * math.prod(self.loss_BTHW.shape[axis] for axis in _AXES[per])

    def _summed(self, nats_BTHW: Tensor, per: Per, unit: Unit) -> Tensor:
        if unit not in _UNITS:
            raise LikelihoodError(f"unit = {unit!r}: must be one of {', '.join(_UNITS)}")
        dims = self.dims(per)
        # An empty tuple would mean all axes.
        nats = nats_BTHW.sum(_AXES[per]) if _AXES[per] else nats_BTHW
        scale = {"nats": 1.0, "nats_per_dim": dims, "bits_per_dim": dims * math.log(2)}[unit]
        return nats / scale


class Estimate(NamedTuple):
    """A mean over noise draws and its standard error (nan with a single draw), of equal shapes."""

    mean: Tensor
    standard_error: Tensor


def over_draws(values_K: Tensor) -> Estimate:
    """Mean and standard error over the first axis.

    >>> over_draws(torch.tensor([1.0, 3.0]))
    Estimate(mean=tensor(2.), standard_error=tensor(1.))
    """
    mean, draws = values_K.mean(0), len(values_K)
    if draws < 2:
        return Estimate(mean, torch.full_like(mean, math.nan))
    return Estimate(mean, values_K.std(0, correction=1) / math.sqrt(draws))


@torch.no_grad()
def likelihood(
    flow: DeepShallowFlow,
    x: Tensor,
    text_BJE: Tensor | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    windows: Sequence[ContextWindow] | None = None,
) -> Likelihood:
    """Log-densities of latents as they are: x carries its noise already.

    They are the numbers of `flow(x, text)`, whatever the chunk. Memory beyond the weights: the
    activations of a chunk, and of the whole clip five tensors [B, J + L, M] of the deep block
    (hidden states; queries, keys, values and output of one attention), whatever its depth. For
    unsharded weights.

    Args:
        flow: the flow.
        x: latents [B, T, C, h, w], or images [B, C, h, w].
        text_BJE: text; None for none.
        chunk_tokens: tokens in one pass; shallow blocks take whole frames, at least one.
        windows: the context windows through which a video longer than the trained length is seen
            (`SampleSpec.context_windows`). Each frame then is conditioned on what its window shows
            of the past, as when it is sampled. By default the deep block sees all frames at once.

    Raises:
        LikelihoodError: windows or chunks that cannot be.
        ValueError: latents that do not fit the flow.

    >>> from flow.config import tiny
    >>> flow = DeepShallowFlow(tiny())
    >>> x = torch.randn(1, 3, 4, 2, 2)
    >>> clip = likelihood(flow, x)
    >>> clip.nll("frame", "bits_per_dim").shape
    torch.Size([1, 3])
    >>> torch.allclose(clip.log_prob(), flow(x).log_prob())
    True
    """
    if chunk_tokens < 1:
        raise LikelihoodError(f"chunk_tokens = {chunk_tokens}: must be at least 1")
    x_BTHWC = flow.tokens(x)
    num_frames, tokens = x_BTHWC.shape[1], x_BTHWC.shape[2] * x_BTHWC.shape[3]
    shallow_parts = [
        flow.shallow_stack(part) for part in x_BTHWC.split(max(1, chunk_tokens // tokens), dim=1)
    ]
    u_BTHWC = torch.cat([u for u, _ in shallow_parts], dim=1)
    shallow_BTHW = torch.cat([log_det.double().sum(-1) for _, log_det in shallow_parts], dim=1)
    # Two whole clips that the deep block has no room for.
    del shallow_parts
    deep = [
        _deep_loss(flow, u_BTHWC[:, start:end], text_BJE, chunk_tokens)[:, new - start :]
        for start, new, end in checked_windows(windows, num_frames)
    ]
    return Likelihood(torch.cat(deep, dim=1) - shallow_BTHW, x_BTHWC.shape[-1])


def _deep_loss(
    flow: DeepShallowFlow, u_BTHWC: Tensor, text_BJE: Tensor | None, chunk: int
) -> Tensor:
    """½z² - log|det| of the deep block summed over channels: [B, T, H, W], raster order, fp64."""
    block, (num_frames, rows, columns) = flow.deep, u_BTHWC.shape[1:4]
    text_BJE = text_BJE if flow.config.deep_text else None
    s_BLC = frame_sequence(u_BTHWC, flow.deep_reversed)
    rope = flow.deep_rope((rows, columns), num_frames, text_BJE)
    h_BLM, text_len = block.read(s_BLC, text_BJE)
    for layer in block.layers:
        _pass_layer(layer, h_BLM, rope, chunk)  # type: ignore[arg-type]
    loss = []
    for low in range(0, s_BLC.shape[1], chunk):
        part = slice(low, low + chunk)
        mu, sigma = block.affine(h_BLM[:, text_len:][:, part])
        z = (s_BLC[:, part] - mu) / sigma
        loss.append((0.5 * z.square() + sigma.log()).double().sum(-1))
    loss_BTN = rearrange(torch.cat(loss, dim=1), "b (t n) -> b t n", t=num_frames)
    loss_BTN = loss_BTN.flip(2) if flow.deep_reversed else loss_BTN
    return rearrange(loss_BTN, "b t (h w) -> b t h w", h=rows)


def _pass_layer(layer: TransformerLayer, h_BLM: Tensor, rope: Rope, chunk: int) -> None:
    """`layer(h_BLM, rope)` in place: products by chunks of places, and one causal attention.

    Attention is one call of the fused kernel, which never holds the logits of all places at once.
    (Letters here are those of `flow.attention`: H heads, S places, D head_dim.)
    """
    attention, places = layer.attention, h_BLM.shape[1]
    parts = [slice(low, min(low + chunk, places)) for low in range(0, places, chunk)]
    shape = (len(h_BLM), attention.heads, places, attention.head_dim)
    q_BHSD, k_BHSD, v_BHSD = (h_BLM.new_empty(shape) for _ in range(3))
    for part in parts:
        turned = attention.project(h_BLM[:, part], rope.slice(part.start, part.stop))
        q_BHSD[:, :, part], k_BHSD[:, :, part], v_BHSD[:, :, part] = turned
    out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
    for part in parts:
        h_BPM = h_BLM[:, part] + attention.merge(out_BHSD[:, :, part])
        h_BLM[:, part] = h_BPM + layer.mlp(h_BPM)


def checked_windows(
    windows: Sequence[ContextWindow] | None, num_frames: int
) -> Sequence[ContextWindow]:
    """The context windows; by default one of all frames.

    Raises:
        LikelihoodError: a frame is not new in exactly one of them, in order.
    """
    if windows is None:
        return [ContextWindow(0, 0, num_frames)]
    new_frames = [frame for _, new, end in windows for frame in range(new, end)]
    if new_frames != [*range(num_frames)] or any(start > new for start, new, _ in windows):
        raise LikelihoodError(
            f"windows = {[tuple(window) for window in windows]}: must make each of the "
            f"{num_frames} frames once, in order, as SampleSpec.context_windows() does"
        )
    return windows


def draw_noise(
    seed: int, draw: int, shape_TCHW: Sequence[int], *, purpose: str = "noise"
) -> Tensor:
    """Standard normal noise [T, C, h, w] of one draw, fp32 on the CPU.

    Frame n's noise comes from (seed, draw, n) alone. `purpose` keeps kinds of noise apart, such as
    a codec's posterior noise and the σ-noise.
    """
    frames = []
    for n in range(shape_TCHW[0]):
        name = f"flowreel likelihood {purpose} {seed} {draw} {n}"
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        frames.append(torch.randn(tuple(shape_TCHW[1:]), generator=generator))
    return torch.stack(frames)


def noisy_likelihood(
    flow: DeepShallowFlow,
    clean: Tensor | Callable[[int], Tensor],
    text_BJE: Tensor | None = None,
    *,
    draws: int,
    seed: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    windows: Sequence[ContextWindow] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Log-densities of x + σ·ε for seeded draws of ε: a `Likelihood` with an axis K in front.

    σ is the model's `noise_std`. All videos of a batch get the same ε, so that each has the
    likelihood that it would have alone. Mean and standard error are `over_draws(result.loss())`.

    Args:
        flow: the flow.
        clean: latents [B, T, C, h, w] without the noise, or a function from a draw's number to them
            (where they are themselves drawn from a codec's posterior).
        text_BJE: text; None for none.
        draws: number of draws, at least 1.
        seed: of all draws.
        chunk_tokens, windows: as in `likelihood`.
        progress: called with (draws made, draws in all).

    Raises:
        LikelihoodError: no draws, or what `likelihood` refuses.
    """
    if draws < 1:
        raise LikelihoodError(f"draws = {draws}: must be at least 1")
    losses = []
    for draw in range(draws):
        x = clean(draw) if callable(clean) else clean
        shape_TCHW = x.shape[1:] if x.dim() == 5 else (1, *x.shape[1:])
        noise = draw_noise(seed, draw, shape_TCHW).reshape(x.shape[1:]).to(x)
        x_noisy = x + flow.config.noise_std * noise
        of_draw = likelihood(flow, x_noisy, text_BJE, chunk_tokens=chunk_tokens, windows=windows)
        losses.append(of_draw.loss_BTHW)
        if progress is not None:
            progress(draw + 1, draws)
    return Likelihood(torch.stack(losses), of_draw.token_dim)


def noise_floor(sigma: float) -> float:
    """½ + ln σ in nats per dimension: the least mean loss on data that carries Gaussian noise of σ.

    It is the entropy of the noise without ½ ln 2π. By Gibbs' inequality it holds for every single
    clip, known by heart or not, as long as the noise is fresh. Source: `docs/design.md`, "The model
    exactly", loss.

    >>> round(noise_floor(0.3), 3)
    -0.704
    """
    return 0.5 + math.log(sigma)


def check_noise_floor(
    mean_loss: float, standard_error: float, sigma: float, *, num_elements: int, what: str
) -> bool:
    """Whether a mean loss is clearly under the noise floor; if so, warn with the likely causes.

    A flow that knew the data exactly would be sqrt(½ / num_elements) off by chance. No smaller
    error is believed, so that too few draws to tell an error from never raise a false alarm.

    Args:
        mean_loss: nats per dimension, ½ ln 2π left out.
        standard_error: of it over noise draws; nan where there is but one.
        sigma: standard deviation σ of the noise.
        num_elements: noise numbers in the mean, all draws together.
        what: what the mean is of, for the message.
    """
    by_chance = math.sqrt(0.5 / num_elements)
    error = by_chance if math.isnan(standard_error) else max(standard_error, by_chance)
    floor = noise_floor(sigma)
    # Not `<`: a loss of NaN is no violation of this rule, and has its own checks.
    if not mean_loss < floor - FLOOR_ERRORS * error:
        return False
    warnings.warn(
        f"{what}: mean loss {mean_loss:.4f} nats/dim is {(floor - mean_loss) / error:.0f} standard "
        f"errors under the noise floor ½ + ln σ = {floor:.4f} (σ = {sigma:g}), which no density "
        "can be. Likely causes: the latents carry no noise, or less than σ (noise_std, latent "
        "convention or scale differ from those of training); the model saw this very noise in "
        "training (same seed); or its log-density is wrong (a block sees the token it predicts, a "
        "log-determinant is off)",
        NoiseFloorWarning,
        stacklevel=3,
    )
    return True
