"""Plans against what is really kept and what a GPU really took, and their advice against itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flow.config import FlowConfig, tiny, video_7b
from flow.flow import FlowModel
from tests.training.steps import random_model
from tests.training.test_memory import KeptBytes
from tests.training.world import small_config
from training.footprint import StepShape, activation_bytes, memory_of
from training.hardware import Hardware, PlanError
from training.memory import set_memory
from training.parallel import Parallel
from training.plan import Job, make_plan
from training.sections import MemoryConfig
from training.step import TrainStep

CLIP = StepShape(frames=21, rows=30, columns=53, batch=1)


def kept(flow: FlowConfig, shape: StepShape, how: str) -> list[int]:
    """Bytes that the graphs of flow and denoiser keep in fp32."""
    model = random_model(flow)
    set_memory(model, MemoryConfig(checkpointing=how))
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.frames, flow.latent_channels, shape.rows, shape.columns)
    x = torch.randn(size, generator=generator).requires_grad_()
    text = torch.randn(shape.batch, flow.text_len, flow.text_dim, generator=generator)
    found = []
    for network in (model.flow, model.denoiser):
        counted = KeptBytes(*model.parameters())
        with counted.counting():
            assert network is not None
            network(x, text)
        found.append(counted.total)
    return found


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("flow", "shape"),
    [
        (
            tiny(
                shallow_width=128,
                deep_width=256,
                layers_per_block=(1, 2, 4),
                denoiser_layers=3,
                latent_channels=16,
            ),
            StepShape(5, 4, 4, 2),
        ),
        (tiny(denoiser_window=3), StepShape(12, 8, 8, 1)),
        (tiny(), StepShape(3, 8, 8, 2)),
    ],
)
def test_planned_activations_are_within_5_percent_of_what_graphs_keep(
    flow: FlowConfig, shape: StepShape, how: Any
) -> None:
    found = kept(flow, shape, how)
    planned = activation_bytes(flow, shape, how, "fp32")
    print(how, [f"{plan / real - 1:+.1%}" for plan, real in zip(planned, found, strict=True)])
    assert list(planned) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    ("layers", "how", "measured_gb"), [(17, "none", 145.0), (24, "full", 84.0)]
)
def test_planned_peaks_are_within_5_percent_of_an_h200(
    layers: int, how: str, measured_gb: float
) -> None:
    """The deep block's step of 33,390 tokens, without averaged weights: docs/gpu.md."""
    flow = dataclasses.replace(video_7b(), layers_per_block=(layers,), denoiser=False)
    config = small_config(precision="bf16", memory={"checkpointing": how})
    with torch.device("meta"):
        model = FlowModel(flow)
    memory = memory_of(model, config, CLIP, averaged=False)
    print(f"{memory.peak / 1e9:.1f} GB planned, {measured_gb} measured")
    assert memory.peak / 1e9 == pytest.approx(measured_gb, rel=0.05)


def test_planned_states_are_those_of_a_step() -> None:
    """Weights, moments and averages as they lie there, byte by byte."""
    config = small_config()
    model = random_model()
    step = TrainStep(model, config, Parallel(0, 1, torch.device("cpu"), None))
    sizes = {"model.": 0, ".exp_avg": 0, ".ema.": 0}
    for name, tensor in step.state().items():
        for part in sizes:
            sizes[part] += tensor.nbytes if part in name else 0
    memory = memory_of(model, config, StepShape(3, 4, 4, 4))
    assert memory.weights == memory.gradients == sizes["model."]
    assert memory.optimizer == sizes[".exp_avg"]
    assert memory.averaged == sizes[".ema."]


def seven_b(**changes: Any) -> Job:
    config = small_config(
        precision="bf16",
        steps=1000,
        batches={"batch_size": 96, "image_batch_size": 192, "image_ratio": 0.2},
        workers={"strategy": "fsdp", "count": 96},
        **changes,
    )
    return Job(video_7b(), config, (CLIP_OF_96,), dataclasses.replace(CLIP_OF_96, frames=1))


CLIP_OF_96 = dataclasses.replace(CLIP, batch=96)


def test_the_7b_does_not_fit_without_checkpointing_and_the_plan_says_what_makes_it_fit() -> None:
    plan = make_plan(seven_b(), Hardware.of("h200x96"))
    assert plan.parameters == pytest.approx(6.89e9, rel=0.01)
    assert not plan.fits
    assert plan.advice == ("train.memory.checkpointing=selective",)
    fitting = make_plan(seven_b(memory={"checkpointing": "selective"}), Hardware.of("h200x96"))
    assert fitting.fits
    assert fitting.advice == ()
    assert fitting.memory.peak < 0.9 * 141e9 < plan.memory.peak
    # The same work, of which some is done twice.
    assert fitting.step_flops == plan.step_flops
    assert 1.1 < fitting.hours / plan.hours < 4 / 3


@pytest.mark.parametrize(
    ("hardware", "kind", "words"),
    [
        ("a100-40x8", "adamw", "train.memory.offload_optimizer=true"),
        ("a100-40x8", "muon", "GPUs with train.workers.strategy=fsdp"),
        ("rtx4090x8", "adamw", "no number of these GPUs"),
    ],
)
def test_what_is_too_small_asks_for_the_host_for_more_gpus_or_for_less(
    hardware: str, kind: str, words: str
) -> None:
    plan = make_plan(seven_b(optimizer={"kind": kind}), Hardware.of(hardware))
    assert not plan.fits
    assert len(plan.advice) == 1
    assert words in plan.advice[0]


def test_hardware_is_named_and_batches_must_divide() -> None:
    assert Hardware.of("a100-40x16") == Hardware("a100-40", 16)
    assert Hardware.of("H200") == Hardware("h200", 1)
    assert Hardware.of("rtx4090") == Hardware("rtx4090", 1)
    assert Hardware.of("rtx4090x2") == Hardware("rtx4090", 2)
    with pytest.raises(PlanError, match="known kinds: h100, h200"):
        Hardware.of("abacusx3")
    with pytest.raises(PlanError, match="a batch of 96 is no multiple of 7 GPUs"):
        make_plan(seven_b(), Hardware.of("h200x7"))
