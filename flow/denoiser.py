"""The causal denoiser s_φ of flow-score matching, for whole clips and as a stream.

Knows latents, text and who may look how far ahead. Does not know the flow, its score or the denoising step's scale.

Look-ahead (DESIGN section 3): "every" layer sees one frame ahead (released weights: frame f then depends on
frames up to f + layers, and text on frames 0 and 1); "once", in the first layer only, and text sees text only, so
the latency is one frame; "none".

Shapes: B batch, T frames, C channels, N tokens per frame, J text tokens, E text width, W width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flow.attention import Attention, FrameReach, GainNorm, TransformerLayer
from flow.config import FlowConfig
from flow.rope import Rope, RopeCache
from flow.tokens import patchify, unpatchify


class Denoiser(nn.Module):
    """s_φ(x_noisy, text): the σ/0.3-scaled negative score of the smoothed data (arXiv 2511.20462, section 4)."""

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
        self.proj_out = nn.Linear(width, config.token_dim)
        self.ropes = RopeCache(config.head_dim, config.pos_len)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as "nothing to remove"; submodules have their own start values."""
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, text_BJE: Tensor | None = None) -> Tensor:
        """Noisy latents [B,T,C,H,W] (an image [B,C,H,W] too) -> s of the same shape, fp32 or wider."""
        x_BTCHW = x.unsqueeze(1) if x.dim() == 4 else x
        u_BTHWC = patchify(x_BTCHW, self.config.patch_size)
        num_frames, rows, columns = u_BTHWC.shape[1:4]
        h_BLW = self.embed(rearrange(u_BTHWC, "b t h w c -> b (t h w) c"))
        text_len = 0
        if text_BJE is not None and self.proj_txt is not None:
            text_len = text_BJE.shape[1]
            h_BLW = torch.cat([self.embed_text(text_BJE), h_BLW], dim=1)
        rope = self.ropes.get((rows, columns), num_frames, text_len, like=self.proj_in.weight)
        for index, layer in enumerate(self.layers):
            h_BLW = layer(h_BLW, rope, self.reach(index, text_len, rows * columns))
        s_BLC = self.read_out(h_BLW[:, text_len:])
        s_BTHWC = rearrange(s_BLC, "b (t h w) c -> b t h w c", t=num_frames, h=rows)
        # Sharding hooks refuse a view as a root's output.
        return unpatchify(s_BTHWC, self.config.patch_size).reshape(x.shape).clone()

    def reach(self, layer: int, text_len: int, tokens: int) -> FrameReach:
        """Who sees whom in layer `layer`."""
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
        """Tokens -> [B, L, W] in the compute dtype."""
        return self.proj_in(u_BLC.to(self.proj_in.weight.dtype))

    def embed_text(self, text_BJE: Tensor) -> Tensor:
        """Text tokens -> [B, J, W]; only where the denoiser reads text."""
        assert self.proj_txt is not None
        return self.proj_txt(text_BJE.to(self.proj_txt.weight.dtype))

    def read_out(self, h_BLW: Tensor) -> Tensor:
        """Final hidden states -> s tokens [B, L, C], fp32 or wider."""
        if self.final_norm is not None:
            h_BLW = self.final_norm(h_BLW)
        out = self.proj_out(h_BLW)
        return out.to(torch.promote_types(out.dtype, torch.float32))


class _RingCache:
    """Keys and values of one denoiser layer: text for good, and the last `slots` frames."""

    def __init__(
        self, attention: Attention, batch: int, text_len: int, tokens: int, slots: int
    ) -> None:
        like = attention.qkv.weight
        places = text_len + slots * tokens
        shape = (batch, attention.heads, places, attention.head_dim)
        self.kv = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2)]
        self.text_len, self.tokens, self.slots = text_len, tokens, slots
        self.newest = -1

    def write_text(self, k_BHJD: Tensor, v_BHJD: Tensor) -> None:
        for cache, value in zip(self.kv, (k_BHJD, v_BHJD), strict=True):
            cache[:, :, : self.text_len] = value

    def write(self, frame: int, k_BHND: Tensor, v_BHND: Tensor) -> None:
        for cache, value in zip(self.kv, (k_BHND, v_BHND), strict=True):
            cache[:, :, self._place(frame)] = value
        self.newest = frame

    def read(self, oldest: int) -> list[Tensor]:
        """Text and frames `oldest` .. newest, in any order: positions are in the keys."""
        held = min(self.newest + 1, self.slots)
        wanted = self.newest - oldest + 1
        assert wanted <= held, "a frame that has left the cache"
        if wanted == held:
            return [cache[:, :, : self.text_len + held * self.tokens] for cache in self.kv]
        places = [slice(0, self.text_len), *map(self._place, range(oldest, self.newest + 1))]
        return [torch.cat([cache[:, :, place] for place in places], dim=2) for cache in self.kv]

    def _place(self, frame: int) -> slice:
        start = self.text_len + frame % self.slots * self.tokens
        return slice(start, start + self.tokens)


class DenoiserStream:
    """The denoiser over a video that arrives frame by frame; time positions go on for as long as it does.

    "none" answers at once, "once" one frame later, "every" only at `finish` (it needs the whole clip).
    Frames are [B, C, h, w]; outputs are s frames of the same shape, in order.
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
        """Take the next noisy frame; give the outputs that are now final (none or one)."""
        if self.mode == "every":
            self._clip.append(x_BCHW)
            return []
        u_BTHWC = patchify(x_BCHW.unsqueeze(1), self.denoiser.config.patch_size)
        if not self._caches:
            self._start(u_BTHWC)
        h_BNW = self.denoiser.embed(rearrange(u_BTHWC, "b t h w c -> b (t h w) c"))
        rope = self._rope(1, 0, self.next_frame)
        q, k, v = self._attention(0).project(h_BNW, rope)
        self._caches[0].write(self.next_frame, k, v)
        arrived = (h_BNW, q, rope)
        self.next_frame += 1
        if self.mode == "none":
            return [self._answer(self.next_frame - 1, *arrived)]
        ready, self._waiting = self._waiting, arrived
        return [] if ready is None else [self._answer(self.next_frame - 2, *ready)]

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """No frame follows: give the outputs still owed."""
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
        h_BJW, rope = self.denoiser.embed_text(self.text), self._rope(0, text_len, 0)
        for index, cache in enumerate(self._caches):
            layer = self._layer(index)
            q, k, v = layer.attention.project(h_BJW, rope)
            cache.write_text(k, v)
            h_BJW = h_BJW + layer.attention.merge(scaled_dot_product_attention(q, k, v))
            h_BJW = h_BJW + layer.mlp(h_BJW)

    def _answer(self, frame: int, h_BNW: Tensor, q_BHND: Tensor, rope: Rope) -> Tensor:
        """s of `frame`, whose queries of the first layer are given; the caches hold what it may see."""
        oldest = max(0, frame + 1 - self.window)
        for index, cache in enumerate(self._caches):
            layer = self._layer(index)
            if index > 0:
                q_BHND, k, v = layer.attention.project(h_BNW, rope)
                cache.write(frame, k, v)
            k, v = cache.read(oldest)
            attended = scaled_dot_product_attention(q_BHND, k, v)
            h_BNW = h_BNW + layer.attention.merge(attended)
            h_BNW = h_BNW + layer.mlp(h_BNW)
        s_BNC = self.denoiser.read_out(h_BNW)
        s_BTHWC = rearrange(s_BNC, "b (t h w) c -> b t h w c", t=1, h=self._grid[0])
        return unpatchify(s_BTHWC, self.denoiser.config.patch_size).squeeze(1)
