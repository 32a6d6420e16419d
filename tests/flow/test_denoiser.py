"""The denoiser: exactly the look-ahead its mode grants, and a stream that equals the whole clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flow.attention import FrameReach, attend_frames
from flow.denoiser import Denoiser
from tests.flow.models import randn, texts, tiny_model

FRAMES = 7


def _denoiser(**changes: object) -> tuple[Denoiser, Tensor, Tensor]:
    model = tiny_model(**changes)
    assert model.denoiser is not None
    x = randn(2, FRAMES, 4, 2, 2, seed=3)
    return model.denoiser, x, texts(model, 2)[0]


def _dependency(denoiser: Denoiser, x: Tensor, text: Tensor | None) -> list[list[int]]:
    """For every output frame, the input frames that move it."""
    with torch.no_grad():
        before = denoiser(x, text)
        moved_by: list[list[int]] = [[] for _ in range(x.shape[1])]
        for frame in range(x.shape[1]):
            moved = x.clone()
            moved[:, frame] += 1
            change = (denoiser(moved, text) - before).abs().amax(dim=(0, 2, 3, 4))
            for out in (change > 1e-13).nonzero().flatten().tolist():
                moved_by[out].append(frame)
    return moved_by


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("with_text", [True, False])
def test_once_is_one_frame_of_latency_whatever_the_depth(layers: int, with_text: bool) -> None:
    denoiser, x, text = _denoiser(denoiser_layers=layers)
    dependency = _dependency(denoiser, x, text if with_text else None)
    assert dependency == [list(range(min(f + 2, FRAMES))) for f in range(FRAMES)]


def test_none_sees_no_later_frame() -> None:
    denoiser, x, text = _denoiser(denoiser_lookahead="none")
    assert _dependency(denoiser, x, text) == [list(range(f + 1)) for f in range(FRAMES)]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_looks_ahead_once_per_layer(layers: int) -> None:
    denoiser, x, _ = _denoiser(denoiser_lookahead="every", denoiser_layers=layers)
    dependency = _dependency(denoiser, x, None)
    assert dependency == [list(range(min(f + 1 + layers, FRAMES))) for f in range(FRAMES)]


def test_every_spreads_frames_0_and_1_through_the_text() -> None:
    denoiser, x, text = _denoiser(denoiser_lookahead="every", denoiser_layers=2, denoiser_window=1)
    without = _dependency(denoiser, x, None)
    assert without == [list(range(f, min(f + 3, FRAMES))) for f in range(FRAMES)]
    with_text = _dependency(denoiser, x, text)
    assert with_text == [sorted({0, 1, *seen}) for seen in without]


def test_window_limits_the_past() -> None:
    denoiser, x, text = _denoiser(denoiser_window=2, denoiser_layers=1)
    dependency = _dependency(denoiser, x, text)
    assert dependency == [list(range(max(0, f - 1), min(f + 2, FRAMES))) for f in range(FRAMES)]


def test_text_moves_every_frame_only_where_the_denoiser_reads_it() -> None:
    denoiser, x, text = _denoiser()
    assert ((denoiser(x, text) - denoiser(x, 2 * text)).abs().amax(dim=(2, 3, 4)) > 0).all()
    silent, x, text = _denoiser(denoiser_text=False)
    assert torch.equal(silent(x, text), silent(x, None))


def test_frame_products_equal_one_masked_attention() -> None:
    reach = FrameReach(text=3, tokens=2, window=2, ahead=1, text_frames=2)
    frames, places = 5, 3 + 5 * 2
    q, k, v = (randn(1, 2, places, 8, seed=i) for i in range(3))
    frame_of = torch.tensor([-1] * 3 + [f for f in range(frames) for _ in range(2)])
    seen = torch.zeros(places, places, dtype=torch.bool)
    for i, f in enumerate(frame_of.tolist()):
        for j, g in enumerate(frame_of.tolist()):
            seen[i, j] = g < 0 or (g <= 1 if f < 0 else f + 1 - 2 <= g <= f + 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attend_frames(q, k, v, reach), expected)


@pytest.mark.parametrize("mode", ["every", "once", "none"])
@pytest.mark.parametrize("window", [1, 2, 3, 10])
@pytest.mark.parametrize("with_text", [True, False])
def test_stream_equals_the_whole_clip(mode: str, window: int, with_text: bool) -> None:
    denoiser, x, text = _denoiser(denoiser_lookahead=mode, denoiser_window=window)
    given = text if with_text else None
    stream = denoiser.stream(given)
    pushed = [stream.push(frame) for frame in x.unbind(1)]
    latency = {"every": [0] * FRAMES, "once": [0] + [1] * (FRAMES - 1), "none": [1] * FRAMES}[mode]
    assert [len(out) for out in pushed] == latency
    outputs = [frame for out in pushed for frame in out] + stream.finish()
    assert stream.finish() == []
    with torch.no_grad():
        whole = denoiser(x, given)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frames", [1, 2])
def test_stream_of_few_frames_equals_the_whole_clip(frames: int) -> None:
    for mode in ("every", "once", "none"):
        denoiser, x, text = _denoiser(denoiser_lookahead=mode)
        stream = denoiser.stream(text)
        out = [s for frame in x[:, :frames].unbind(1) for s in stream.push(frame)] + stream.finish()
        with torch.no_grad():
            whole = denoiser(x[:, :frames], text)
        torch.testing.assert_close(torch.stack(out, dim=1), whole, atol=1e-12, rtol=0)


def test_an_image_is_denoised_like_a_clip_of_one_frame() -> None:
    denoiser, x, text = _denoiser(denoiser_lookahead="every")
    assert torch.equal(denoiser(x[:, 0], text), denoiser(x[:, :1], text)[:, 0])
