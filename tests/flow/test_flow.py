"""Laws of the flow, in float64: inverse, Jacobian, gradients, and who depends on whom."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian

from flow.flow import FlowModel
from flow.sample_spec import SampleSpec
from flow.sampling import sample
from flow.shallow import shallow_inverse
from flow.tokens import unpatchify
from tests.flow.models import randn, shaken, texts, tiny_config, tiny_model

STRUCTURES: dict[str, dict[str, object]] = {
    "video": {},
    "deep block reads in reverse": {"layers_per_block": (1, 1, 2)},
    "patches, exp, no clip, no norm": {
        "patch_size": 2,
        "softplus": False,
        "soft_clip": 0.0,
        "final_norm": False,
    },
    "image": {"video": False, "denoiser": False},
    "one block, no text": {"layers_per_block": (2,), "deep_text": False},
}


def _latents(model: FlowModel, frames: int = 3, batch: int = 2, seed: int = 1) -> torch.Tensor:
    p = model.config.patch_size
    frames = frames if model.config.video else 1
    return randn(batch, frames, model.config.latent_channels, 2 * p, 3 * p, seed=seed)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_inverse_of_forward_is_the_identity(structure: str) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x = _latents(model)
    text, _ = texts(model, 2)
    z = model.flow(x, text).z_BTHWC.detach()
    z_latent = unpatchify(z, model.config.patch_size)
    spec = SampleSpec(num_frames=x.shape[1], grid=tuple(x.shape[-2:]), tolerance=0.0)
    back = sample(model, text, None, spec, denoiser="none", noise=lambda n: z_latent[:, n])
    torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_log_det_is_that_of_the_jacobian(structure: str) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x = _latents(model, frames=2, batch=1)
    text, _ = texts(model)
    rows = jacobian(lambda y: model.flow(y, text).z_BTHWC.flatten(), x)
    expected = torch.linalg.slogdet(rows.reshape(x.numel(), -1)).logabsdet
    out = model.flow(x, text)
    torch.testing.assert_close(out.log_det_BTHWC.sum(), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(sum(out.block_log_det), out.log_det_BTHWC)
    expected_loss = 0.5 * out.z_BTHWC.square().mean() - expected / x.numel()
    torch.testing.assert_close(out.loss(), expected_loss)


def test_shallow_forward_and_inverse_undo_each_other_for_many_frames_at_once() -> None:
    model = tiny_model()
    x = _latents(model, frames=4)
    u = model.flow.shallow_forward(x)
    for sequential in (True, False):
        back = shallow_inverse(model.flow, u, tolerance=0.0, sequential=sequential)
        torch.testing.assert_close(back, x, atol=1e-11, rtol=0)
    close = shallow_inverse(model.flow, u)
    torch.testing.assert_close(close, x, atol=1e-3, rtol=0)


def test_gradients_reach_every_parameter_and_the_data() -> None:
    model = tiny_model()
    x = _latents(model).requires_grad_()
    text, _ = texts(model, 2)
    model.flow(x, text).loss().backward()
    assert model.denoiser is not None
    model.denoiser(x.detach(), text).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad is not None
    # The last element a block reads feeds nothing, but its own density still moves it.
    assert (x.grad != 0).all()


def test_a_fresh_model_is_the_identity_with_unit_jacobian() -> None:
    model = FlowModel(tiny_config()).double()
    x = _latents(model)
    out = model.flow(x, texts(model, 2)[0])
    torch.testing.assert_close(out.z_BTHWC, x.permute(0, 1, 3, 4, 2), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        out.log_det_BTHWC, torch.zeros_like(out.log_det_BTHWC), atol=1e-12, rtol=0
    )


def test_model_built_on_meta_gets_fresh_start_values() -> None:
    with torch.device("meta"):
        model = FlowModel(tiny_config())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    assert (model.flow.deep.proj_out.weight == 0).all()


@pytest.mark.parametrize("structure", ["video", "deep block reads in reverse"])
def test_no_frame_depends_on_a_later_one(structure: str) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x = _latents(model, frames=4)
    text, _ = texts(model, 2)
    before = model.flow(x, text)
    for changed in range(4):
        moved = x.clone()
        moved[:, changed] += 1
        after = model.flow(moved, text)
        for y, y2 in ((before.z_BTHWC, after.z_BTHWC), (before.log_det_BTHWC, after.log_det_BTHWC)):
            difference = (y - y2).abs().amax(dim=(0, 2, 3, 4))
            assert (difference[:changed] == 0).all()
            assert difference[changed] > 0
            if y is before.z_BTHWC:
                assert (difference[changed:] > 0).all()


def test_shallow_stack_never_crosses_frames() -> None:
    model = tiny_model()
    x = _latents(model, frames=3)
    moved = x.clone()
    moved[:, 1] += 1
    difference = (model.flow.shallow_forward(moved) - model.flow.shallow_forward(x)).abs()
    assert (difference.amax(dim=(0, 2, 3, 4)) > 0).tolist() == [False, True, False]


def test_text_moves_every_frame_and_only_through_the_deep_block() -> None:
    model = tiny_model()
    x = _latents(model)
    text, null = texts(model, 2)
    moved = model.flow(x, text).z_BTHWC != model.flow(x, null).z_BTHWC
    assert moved.any(dim=-1).flatten(2).any(dim=2).all()
    stages, others = (model.flow.block_outputs(x, y) for y in (text, null))
    assert torch.equal(stages[-2], others[-2])
    assert model.flow(x, None).z_BTHWC.isfinite().all()
    silent = tiny_model(deep_text=False)
    assert torch.equal(silent.flow(x, text).z_BTHWC, silent.flow(x, null).z_BTHWC)


def test_an_image_is_a_clip_of_one_frame() -> None:
    for video in (True, False):
        model = tiny_model(video=video)
        x = _latents(model, frames=1)
        text, _ = texts(model, 2)
        assert torch.equal(model.flow(x[:, 0], text).z_BTHWC, model.flow(x, text).z_BTHWC)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 4), (4, 4, 4), (1, 5, 3, 3)])
def test_latents_of_another_shape_are_refused_by_value(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="latents of shape"):
        model.flow(torch.zeros(shape, dtype=torch.float64))


def test_affine_arithmetic_stays_in_fp32_under_half_precision() -> None:
    model = tiny_model(torch.float32)
    x, (text, _) = _latents(model).float(), texts(model, 2, torch.float32)
    exact = model.flow(x, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [model.flow(x, text)]
    half = tiny_model(torch.float32)
    half.to(torch.bfloat16)
    outs.append(half.flow(x, text))
    for out in outs:
        assert out.z_BTHWC.dtype == out.log_det_BTHWC.dtype == torch.float32
        assert (out.loss() - exact.loss()).abs() < 0.1
        assert out.z_BTHWC.bfloat16().float().ne(out.z_BTHWC).any()


def test_outputs_are_not_views_so_that_sharding_hooks_accept_them() -> None:
    model = tiny_model(torch.float32)
    x, (text, _) = _latents(model).float(), texts(model, 2, torch.float32)
    out = model.flow(x, text)
    tensors = [out.z_BTHWC, out.log_det_BTHWC, *out.block_log_det]
    assert model.denoiser is not None
    tensors.append(model.denoiser(x, text))
    assert all(tensor._base is None for tensor in tensors)


def test_perturbation_helper_leaves_no_zero_parameter() -> None:
    model = shaken(FlowModel(tiny_config()))
    assert all(parameter.abs().max() > 0 for parameter in model.parameters())
