"""The causal denoiser s_φ of flow-score matching, for whole clips and as a stream.

Knows latents, text and who may look how far ahead. Knows nothing of the flow's blocks, or of how
the denoiser is trained.

Look-ahead (`docs/design.md`, "The model exactly", denoiser):

- "every" layer sees one frame ahead, as released weights need it. Frame f then depends on frames up
  to f + layers, and text on frames 0 and 1.
- "once", in the first layer only, and text sees text only: the latency is one frame.
- "none": no layer looks ahead.

Shapes: B batch, T frames, C channels, h, w latent cells, H, W tokens, N tokens of a frame, L tokens
of a sequence, J text tokens, E text width, M model width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flow.attention import (
    Attention,
    FrameReach,
    GainNorm,
    TransformerLayer,
    ZeroLinear,
    project_out,
)
from flow.config import FlowConfig
from flow.rope import Rope, RopeCache
from flow.tokens import patchify, unpatchify


class Denoiser(nn.Module):
    """s_φ(x_noisy, text), the negative score of smoothed data in the scale of a denoising step.

        s_φ ≈ -(σ² / 0.3) ∇ log p(x_noisy),   x = x_noisy - 0.3 s_φ(x_noisy)

    A pre-norm transformer without a causal mask reads the tokens themselves, in raster order and
    with the text in front.

    Source: arXiv 2511.20462, flow-score matching; `docs/design.md`, "The model exactly", denoiser.

    >>> from flow.config import tiny
    >>> denoiser = Denoiser(tiny())
    >>> x_noisy, text = torch.randn(1, 3, 4, 2, 2), torch.randn(1, 6, 16)
    >>> s = denoiser(x_noisy, text)
    >>> stream = denoiser.stream(text)
    >>> frames = [*stream.push(x_noisy[:, 0]), *stream.push(x_noisy[:, 1])]
    >>> len(frames), torch.allclose(frames[0], s[:, 0], atol=1e-5)  # one frame of latency
    (1, True)
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.shallow_width
        self.proj_in = nn.Linear(config.token_dim, width)
        self.proj_txt = nn.Linear(config.text_dim, width) if config.denoiser_text else None
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.head_dim) for _ in range(config.denoiser_layers)
        )
        self.final_norm = GainNorm(width) if config.final_norm else None
        self.proj_out = ZeroLinear(width, config.token_dim)
        self.ropes = RopeCache(config.head_dim, config.pos_len)

    def forward(self, x: Tensor, text_BJE: Tensor | None = None) -> Tensor:
        """s of noisy latents [B, T, C, h, w] or images [B, C, h, w]: their shape, fp32 or wider."""
        x_BTCHW = x.unsqueeze(1) if x.dim() == 4 else x
        u_BTHWC = patchify(x_BTCHW, self.config.patch_size)
        num_frames, rows, columns = u_BTHWC.shape[1:4]
        h_BLM = self.embed(rearrange(u_BTHWC, "b t h w c -> b (t h w) c"))
        text_len = 0
        if text_BJE is not None and self.proj_txt is not None:
            text_len = text_BJE.shape[1]
            h_BLM = torch.cat([self.embed_text(text_BJE), h_BLM], dim=1)
        rope = self.ropes.get((rows, columns), num_frames, text_len, like=self.proj_in.weight)
        for index, layer in enumerate(self.layers):
            h_BLM = layer(h_BLM, rope, self.reach(index, text_len, rows * columns))
        s_BLC = self.read_out(h_BLM[:, text_len:])
        s_BTHWC = rearrange(s_BLC, "b (t h w) c -> b t h w c", t=num_frames, h=rows)
        # Sharding hooks refuse a view as a root's output.
        return unpatchify(s_BTHWC, self.config.patch_size).reshape(x.shape).clone()

    def reach(self, layer: int, text_len: int, tokens: int) -> FrameReach:
        """Who sees whom in layer `layer`, with `tokens` tokens in a frame."""
        mode = self.config.denoiser_lookahead
        ahead = 1 if mode == "every" or (mode == "once" and layer == 0) else 0
        return FrameReach(
            text=text_len,
            tokens=tokens,
            window=self.config.denoiser_window,
            ahead=ahead,
            text_frames=2 if mode == "every" else 0,
        )

    def stream(self, text_BJE: Tensor | None = None) -> DenoiserStream:
        """A stream that gives, frame by frame, what `forward` gives for the whole clip."""
        return DenoiserStream(self, text_BJE)

    def embed(self, u_BLC: Tensor) -> Tensor:
        """Tokens as hidden states [B, L, M] in the compute dtype."""
        return self.proj_in(u_BLC.to(self.proj_in.weight.dtype))

    def embed_text(self, text_BJE: Tensor) -> Tensor:
        """Text tokens as hidden states [B, J, M]; only where the denoiser reads text."""
        assert self.proj_txt is not None
        return self.proj_txt(text_BJE.to(self.proj_txt.weight.dtype))

    def read_out(self, h_BLM: Tensor) -> Tensor:
        """s as tokens [B, L, C], fp32 or wider, of final hidden states."""
        out = project_out(h_BLM, self.final_norm, self.proj_out)
        return out.to(torch.promote_types(out.dtype, torch.float32))


class _RingCache:
    """Keys and values of one denoiser layer: text for good, and the last `slots` frames.

    A frame takes the place of the one `slots` before it. Attention does not care in which order
    keys lie, because their positions are turned into them.
    """

    def __init__(
        self, attention: Attention, batch: int, text_len: int, tokens: int, slots: int
    ) -> None:
        like = attention.qkv.weight
        places = text_len + slots * tokens
        shape = (batch, attention.heads, places, attention.head_dim)
        # Two tensors, keys and values.
        self.kv = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2)]
        self.text_len, self.tokens, self.slots = text_len, tokens, slots
        self.newest = -1

    def write_text(self, k_BHJD: Tensor, v_BHJD: Tensor) -> None:
        """Put the text's keys and values in front."""
        for cache, value in zip(self.kv, (k_BHJD, v_BHJD), strict=True):
            cache[:, :, : self.text_len] = value

    def write(self, frame: int, k_BHND: Tensor, v_BHND: Tensor) -> None:
        """Put a frame's keys and values in its slot; it is the newest from now on."""
        for cache, value in zip(self.kv, (k_BHND, v_BHND), strict=True):
            cache[:, :, self._place(frame)] = value
        self.newest = frame

    def read(self, oldest: int) -> list[Tensor]:
        """Text and frames `oldest` .. newest, in any order."""
        num_cached = min(self.newest + 1, self.slots)
        num_frames = self.newest - oldest + 1
        assert num_frames <= num_cached, "a frame that has left the cache"
        if num_frames == num_cached:
            return [cache[:, :, : self.text_len + num_cached * self.tokens] for cache in self.kv]
        places = [slice(0, self.text_len), *map(self._place, range(oldest, self.newest + 1))]
        return [torch.cat([cache[:, :, place] for place in places], dim=2) for cache in self.kv]

    def _place(self, frame: int) -> slice:
        start = self.text_len + frame % self.slots * self.tokens
        return slice(start, start + self.tokens)


class DenoiserStream:
    """The denoiser over a video that arrives frame by frame; time positions go on with it.

    With the look-ahead "none" a frame's output comes at once, with "once" one frame later, with
    "every" only at `finish`, since it needs the whole clip. Frames are [B, C, h, w]; outputs are
    frames of s of the same shape, in order.
    """

    def __init__(self, denoiser: Denoiser, text_BJE: Tensor | None = None) -> None:
        self.denoiser = denoiser
        self.mode = denoiser.config.denoiser_lookahead
        self.window = denoiser.config.denoiser_window
        self.text = text_BJE if denoiser.proj_txt is not None else None
        self.next_frame = 0
        self._clip: list[Tensor] = []
        self._caches: list[_RingCache] = []
        self._waiting: tuple[Tensor, Tensor, Rope] | None = None
        self._grid = (0, 0)

    @torch.no_grad()
    def push(self, x_BCHW: Tensor) -> list[Tensor]:
        """Take the next noisy frame; give the outputs that are now final: none or one."""
        if self.mode == "every":
            self._clip.append(x_BCHW)
            return []
        u_BTHWC = patchify(x_BCHW.unsqueeze(1), self.denoiser.config.patch_size)
        if not self._caches:
            self._start(u_BTHWC)
        h_BNM = self.denoiser.embed(rearrange(u_BTHWC, "b t h w c -> b (t h w) c"))
        rope = self._rope(1, 0, self.next_frame)
        q, k, v = self._attention(0).project(h_BNM, rope)
        self._caches[0].write(self.next_frame, k, v)
        arrived = (h_BNM, q, rope)
        self.next_frame += 1
        if self.mode == "none":
            return [self._answer(self.next_frame - 1, *arrived)]
        ready, self._waiting = self._waiting, arrived
        return [] if ready is None else [self._answer(self.next_frame - 2, *ready)]

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """Say that no frame follows; give the outputs still owed."""
        if self._clip:
            clip, self._clip = torch.stack(self._clip, dim=1), []
            return list(self.denoiser(clip, self.text).unbind(1))
        ready, self._waiting = self._waiting, None
        return [] if ready is None else [self._answer(self.next_frame - 1, *ready)]

    def _layer(self, index: int) -> TransformerLayer:
        layer = self.denoiser.layers[index]
        assert isinstance(layer, TransformerLayer)
        return layer

    def _attention(self, index: int) -> Attention:
        return self._layer(index).attention

    def _rope(self, num_frames: int, text_len: int, first_frame: int) -> Rope:
        like = self.denoiser.proj_in.weight
        return self.denoiser.ropes.get(self._grid, num_frames, text_len, like, first_frame)

    def _start(self, u_BTHWC: Tensor) -> None:
        """Allocate the caches and read the text, which sees itself only."""
        self._grid = (u_BTHWC.shape[2], u_BTHWC.shape[3])
        text_len = 0 if self.text is None else self.text.shape[1]
        tokens = self._grid[0] * self._grid[1]
        ahead = 1 if self.mode == "once" else 0
        self._caches = [
            _RingCache(
                self._attention(i),
                len(u_BTHWC),
                text_len,
                tokens,
                self.window + (ahead if i == 0 else 0),
            )
            for i in range(len(self.denoiser.layers))
        ]
        if self.text is None:
            return
        h_BJM, rope = self.denoiser.embed_text(self.text), self._rope(0, text_len, 0)
        for index, cache in enumerate(self._caches):
            layer = self._layer(index)
            q, k, v = layer.attention.project(h_BJM, rope)
            cache.write_text(k, v)
            h_BJM = h_BJM + layer.attention.merge(scaled_dot_product_attention(q, k, v))
            h_BJM = h_BJM + layer.mlp(h_BJM)

    def _answer(self, frame: int, h_BNM: Tensor, q_BHND: Tensor, rope: Rope) -> Tensor:
        """s of `frame`, whose queries of the first layer are given.

        The first layer's cache holds the frame already, and with "once" the next one too: that is
        all the look-ahead there is.
        """
        oldest = max(0, frame + 1 - self.window)
        for index, cache in enumerate(self._caches):
            layer = self._layer(index)
            if index > 0:
                q_BHND, k, v = layer.attention.project(h_BNM, rope)
                cache.write(frame, k, v)
            k, v = cache.read(oldest)
            attended = scaled_dot_product_attention(q_BHND, k, v)
            h_BNM = h_BNM + layer.attention.merge(attended)
            h_BNM = h_BNM + layer.mlp(h_BNM)
        s_BNC = self.denoiser.read_out(h_BNM)
        s_BTHWC = rearrange(s_BNC, "b (t h w) c -> b t h w c", t=1, h=self._grid[0])
        return unpatchify(s_BTHWC, self.denoiser.config.patch_size).squeeze(1)
