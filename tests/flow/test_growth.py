"""A grown model computes what the smaller one did, in float64, and all that is new learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flow.flow import FlowModel
from flow.growth import Growth, GrowthError
from flow.shallow import shallow_inverse
from tests.flow.models import latents, randn, texts, tiny_config, tiny_model

TOLERANCE = 1e-9


def grown(small: FlowModel, **changes: Any) -> FlowModel:
    """A larger model with the weights of `small`."""
    torch.manual_seed(5)
    large = FlowModel(tiny_config(**changes)).double().eval()
    growth, weights = Growth(small.config, large.config), small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            start = parameter.detach()
            parameter.copy_(growth.tensor(name, weights.__getitem__, start.clone))
    return large


def random_text(model: FlowModel, batch: int = 2) -> Tensor:
    return texts(model, batch)[0]


LARGER: dict[str, dict[str, Any]] = {
    "more layers in the deep block": {"layers_per_block": (1, 1, 1, 4)},
    "more layers everywhere": {"layers_per_block": (2, 1, 3, 3), "denoiser_layers": 4},
    "a deep block of twice the width": {"deep_width": 64},
    "a deep block of three times the width and more layers": {
        "deep_width": 96,
        "layers_per_block": (1, 1, 1, 3),
    },
    "wider shallow blocks and denoiser": {"shallow_width": 64},
}
BASES: dict[str, dict[str, Any]] = {
    "released structure": {},
    "no final norm": {"final_norm": False, "softplus": False, "soft_clip": 0.0},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", LARGER)
def test_a_larger_model_computes_the_same(kind: str, base: str) -> None:
    small = tiny_model(**BASES[base])
    large = grown(small, **BASES[base], **LARGER[kind])
    x, text = latents(small, frames=3), random_text(small)
    before, after = small.flow(x, text), large.flow(x, text)
    assert (after.z_BTHWC - before.z_BTHWC).abs().max() < TOLERANCE
    assert (after.log_det_BTHWC - before.log_det_BTHWC).abs().max() < TOLERANCE
    assert after.loss().item() == pytest.approx(before.loss().item(), abs=1e-10)
    assert small.denoiser is not None
    assert large.denoiser is not None
    assert (large.denoiser(x, text) - small.denoiser(x, text)).abs().max() < TOLERANCE


def test_a_width_that_is_no_multiple_is_exact_too() -> None:
    small = tiny_model(head_dim=20, deep_width=60, shallow_width=20)
    large = grown(small, head_dim=20, deep_width=80, shallow_width=20)
    x, text = latents(small), random_text(small)
    difference = large.flow(x, text).log_prob() - small.flow(x, text).log_prob()
    assert difference.abs().max() < TOLERANCE


def test_growing_twice_is_growing_at_once_in_what_it_computes() -> None:
    small = tiny_model()
    step = grown(small, deep_width=64)
    torch.manual_seed(6)
    large = FlowModel(tiny_config(deep_width=96, layers_per_block=(1, 1, 1, 3))).double()
    growth, weights = Growth(step.config, large.config), step.state_dict()
    with torch.no_grad():
        for name, p in large.named_parameters():
            p.copy_(growth.tensor(name, weights.__getitem__, p.detach().clone))
    x, text = latents(small), random_text(small)
    assert (large.flow(x, text).z_BTHWC - small.flow(x, text).z_BTHWC).abs().max() < TOLERANCE


IMAGE: dict[str, Any] = {"video": False, "denoiser": False}


@pytest.mark.parametrize("layers", [(1, 1, 1, 2), (1, 1, 2)], ids=["forward", "reversed"])
def test_an_image_model_as_a_video_model_gives_images_and_first_frames_the_same_density(
    layers: tuple[int, ...],
) -> None:
    image_model = tiny_model(**IMAGE, layers_per_block=layers)
    more = (*layers[:-1], layers[-1] + 1)
    video_model = grown(image_model, layers_per_block=more, deep_width=64)
    clip, text = latents(video_model, frames=3), random_text(video_model)
    image = image_model.flow(clip[:, 0], text)
    as_clip = video_model.flow(clip[:, :1], text)
    assert (as_clip.nats() - image.nats()).abs().max() < TOLERANCE
    in_clip = video_model.flow(clip, text).nats()[:, :1]
    assert (in_clip - image.nats()).abs().max() < TOLERANCE
    # A new denoiser finds no noise.
    assert video_model.denoiser is not None
    assert video_model.denoiser(clip, text).abs().max() == 0


def test_a_grown_model_is_still_inverted() -> None:
    large = grown(tiny_model(), deep_width=64, shallow_width=64, layers_per_block=(1, 2, 1, 3))
    x = latents(large)
    back = shallow_inverse(large.flow, large.flow.shallow_forward(x), tolerance=0.0)
    assert (back - x).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", LARGER)
def test_every_new_parameter_has_a_gradient_after_two_steps(kind: str) -> None:
    small = tiny_model()
    large = grown(small, **LARGER[kind])
    assert large.denoiser is not None
    before = dict(small.named_parameters())
    touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in large.named_parameters()}
    optimizer = torch.optim.SGD(large.parameters(), lr=0.02)
    x, text = latents(large, frames=3), random_text(large)
    target = randn(*x.shape, seed=9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = large.flow(x, text).loss()
        (loss + (large.denoiser(x, text) - target).square().mean()).backward()
        for name, parameter in large.named_parameters():
            assert parameter.grad is not None, name
            touched[name] |= parameter.grad != 0
        optimizer.step()
    for name, parameter in large.named_parameters():
        if name in before and before[name].shape == parameter.shape:
            continue
        seen = touched[name]
        if name.endswith("qkv.bias"):
            # A bias of keys that no turn moves adds the same to all logits: attention ignores it.
            seen = torch.cat([*seen.chunk(3)[::2]])
        assert seen.all(), f"{name}: {int((~seen).sum())} numbers without a gradient"


def test_what_cannot_be_grown_is_named_with_both_values() -> None:
    small = tiny_config(deep_width=64, layers_per_block=(1, 1, 1, 3))
    other = tiny_config(video=False, pos_len=8.0, text_dim=32)
    with pytest.raises(GrowthError) as caught:
        Growth(small, other)
    for part in (
        "deep_width is 32 but that model has 64, and may only grow",
        "layers_per_block is (1, 1, 1, 2) but that model has (1, 1, 1, 3)",
        "pos_len is 8.0 but that model has 4.0",
        "text_dim is 32 but that model has 16",
        "video is False but that model has True",
    ):
        assert part in str(caught.value)
