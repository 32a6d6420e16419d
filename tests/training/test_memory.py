"""What a step keeps for its backward pass, and that keeping less changes nothing."""

from __future__ import annotations

import gc
import weakref
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import flow.attention
from flow.attention import FrameReach, attend_frames
from flow.config import tiny
from tests.training.steps import random_batch, random_model
from tests.training.world import small_config
from training.memory import set_memory
from training.parallel import Parallel
from training.sections import MemoryConfig
from training.step import TrainStep


class KeptBytes:
    """Bytes that graphs keep, counted as they are saved; a storage is counted once."""

    def __init__(self, *parameters: Tensor) -> None:
        self.storages = {p.untyped_storage().data_ptr() for p in parameters}
        self.total = 0
        self.alive: list[Tensor] = []

    def counting(self) -> AbstractContextManager[Any]:
        """What the body's graphs keep; hooks inside of it, which hide theirs, count too."""
        hooks, stack = torch.autograd.graph.saved_tensors_hooks, ExitStack()

        def inner(pack: Any, unpack: Any) -> Any:
            def counted(saved: Tensor) -> Any:
                packed = pack(saved)
                return self.pack(packed) if isinstance(packed, Tensor) else packed

            return hooks(counted, unpack)

        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(flow.attention, "saved_tensors_hooks", inner)
        stack.enter_context(hooks(self.pack, lambda saved: saved))
        return stack

    def pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            # Held, so that no later tensor takes its place.
            self.alive.append(saved)
            self.total += storage.nbytes()
        return saved


def kept_bytes(checkpointing: str, precision: str, part: str) -> int:
    """What the forward pass of a network keeps."""
    config = small_config(precision=precision)
    model = random_model(tiny(layers_per_block=(1, 1, 1, 4), denoiser_layers=4))
    set_memory(model, MemoryConfig(checkpointing=checkpointing))
    step = TrainStep(model, config, Parallel(0, 1, torch.device("cpu"), None))
    batch = random_batch(0, frames=8)
    run: Any = step.run_flow if part == "flow" else step.run_denoiser
    kept = KeptBytes(*model.parameters())
    with kept.counting():
        run(batch.x_noisy.requires_grad_(), batch.text_BJE)
    return kept.total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["flow", "denoiser"])
def test_the_more_is_computed_again_the_less_is_kept(precision: str, part: str) -> None:
    none, selective, full = (
        kept_bytes(how, precision, part) for how in ("none", "selective", "full")
    )
    print(part, precision, none, selective, full)
    assert full < 0.6 * selective
    assert selective < 0.6 * none


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(how: str, precision: str) -> None:
    found = []
    for checkpointing in ("none", how):
        model = random_model(tiny(denoiser_window=2))
        set_memory(model, MemoryConfig(checkpointing=checkpointing))
        config = small_config(precision=precision)
        step = TrainStep(model, config, Parallel(0, 1, torch.device("cpu"), None))
        losses = step._backward(random_batch(0, frames=5), True, 1.0)
        found.append([losses, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


REACH = FrameReach(text=6, tokens=4, window=2, ahead=1, text_frames=2)


def clip_qkv(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, REACH.text + 9 * REACH.tokens, 32)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_keys_of_frames_die_with_the_forward_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gradients are those of a graph that kept them."""
    joined: list[weakref.ref[Tensor]] = []
    cat = torch.cat

    def watched(tensors: list[Tensor], dim: int) -> Tensor:
        out = cat(tensors, dim=dim)
        joined.append(weakref.ref(out))
        return out

    monkeypatch.setattr(flow.attention.torch, "cat", watched)
    gradients = []
    for rejoin in (True, False):
        joined.clear()
        leaves = clip_qkv(dtype)
        out = attend_frames(*leaves, REACH, rejoin=rejoin)
        gc.collect()
        copies = joined[:-1]  # The last one is the result.
        assert len(copies) == 14
        assert {copy() is None for copy in copies} == {rejoin}
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Warnings of the compiler about itself, which are errors elsewhere in the tests.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_layers_compute_the_same(checkpointing: str) -> None:
    batch, found = random_batch(0), []
    for memory in (MemoryConfig(), MemoryConfig(compile=True, checkpointing=checkpointing)):
        model = random_model(tiny(layers_per_block=(1,), denoiser=False))
        set_memory(model, memory)
        step = TrainStep(model, small_config(), Parallel(0, 1, torch.device("cpu"), None))
        losses = step._backward(batch, False, 1.0)
        found.append([losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
