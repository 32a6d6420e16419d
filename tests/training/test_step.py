"""One step of one process: in micro-batches it is the same, in bf16 nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from flow.config import tiny
from flow.flow import FlowModel, FlowOutput
from flow.released_checkpoint import import_released
from tests.places import TRAINED_SMALL
from tests.training.steps import random_batch, random_model
from tests.training.world import TEXT, small_config, two_workers, write_dataset
from training.loop import TrainJob, train
from training.objective import flow_backward
from training.parallel import Parallel
from training.state.checkpoint import latest_complete, load_averaged
from training.step import TrainStep


def gradients(model: FlowModel) -> torch.Tensor:
    found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_make_the_same_step(accumulate: int) -> None:
    whole, parts = (
        TrainStep(
            random_model(),
            small_config(batches={"batch_size": 8, "image_batch_size": 8, "accumulate": count}),
            Parallel(0, 1, torch.device("cpu"), None),
        )
        for count in (1, accumulate)
    )
    batch = random_batch(0)
    # Targets and gradients before a step, then what the steps come to.
    for step in (whole, parts):
        for part in batch.parts(step.config.batches.accumulate):
            step._backward(part, True, part.x_noisy.shape[0] / 8)
    one, many = gradients(whole.model), gradients(parts.model)
    assert float((one - many).norm() / one.norm()) < 1e-6
    for number in range(3):
        a, b = (s.take(number, random_batch(number)).values for s in (whole, parts))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_micro_batches_must_be_equal() -> None:
    with pytest.raises(ValidationError, match=r"times batches\.accumulate 3, so that all"):
        small_config(batches={"batch_size": 4, "accumulate": 3})
    two = {"workers": two_workers(), "batches": {"batch_size": 4, "image_batch_size": 4}}
    assert small_config(**two).batches.accumulate == 1
    two["batches"]["accumulate"] = 4
    with pytest.raises(ValidationError, match=r"workers\.count 2 times batches\.accumulate 4"):
        small_config(**two)


def test_a_step_taken_on_the_host_is_the_same_step_also_after_a_resumption(tmp_path: Path) -> None:
    """Where states lie is free: a run with them on the host goes on from one without."""

    def run(out: Path, *halves: bool) -> dict[str, torch.Tensor]:
        for number, offload in enumerate(halves, start=1):
            config = small_config(
                steps=6 * number // len(halves),
                optimizer={"schedule_steps": 6},
                memory={"offload_optimizer": offload},
            )
            job = TrainJob(tiny(), TEXT, dataset, out)
            train(config, job)
        model = FlowModel(tiny())
        checkpoint = latest_complete(job.checkpoints)
        assert checkpoint is not None
        load_averaged(checkpoint, model)
        return model.state_dict()

    dataset = write_dataset(tmp_path / "data")
    whole = run(tmp_path / "whole", False)
    for name, halves in (("host", (True,)), ("both", (False, True)), ("back", (True, False))):
        other = run(tmp_path / name, *halves)
        assert all(torch.equal(whole[key], other[key]) for key in whole), name


def test_muon_is_not_taken_on_the_host() -> None:
    with pytest.raises(ValidationError, match=r"set optimizer\.kind to 'adamw'"):
        small_config(optimizer={"kind": "muon"}, memory={"offload_optimizer": True})


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_last_product_is_fp32_under_bf16_and_halves_the_error() -> None:
    """Of a trained model against float64, beside what the product in bf16 would come to."""
    case = load_file(TRAINED_SMALL / "case.safetensors")
    x = case["sample_sequential"][:2, :3].float()
    text = case["text"][:2].float()

    def backward(dtype: torch.dtype, *, last_in_bf16: bool = False) -> tuple[torch.Tensor, ...]:
        model, _ = import_released(TRAINED_SMALL / "weights.pth", TRAINED_SMALL / "config.yaml")
        flow = model.flow.to(dtype).requires_grad_(True)
        if last_in_bf16:
            for block in (*flow.shallow, flow.deep):
                _round_last(block)

        def run(x: torch.Tensor, text_BJE: torch.Tensor | None) -> FlowOutput:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                output: FlowOutput = flow(x, text_BJE)
            return output

        left = flow_backward(run, x.to(dtype), text.to(dtype), 0.3, with_target=True)
        assert left.score_target is not None
        return left.nats_per_dim.double(), gradients(model), left.score_target.double()

    exact = backward(torch.float64)
    kept, rounded = backward(torch.float32), backward(torch.float32, last_in_bf16=True)
    for figures in zip(("loss", "gradient", "score"), exact, kept, rounded, strict=True):
        name, truth, ours, theirs = figures
        print(f"{name}: {relative(ours, truth):.2e}, in bf16 {relative(theirs, truth):.2e}")
        bar = 1.0 if name == "score" else 0.75
        assert relative(ours, truth) < bar * relative(theirs, truth), name


def _round_last(block: torch.nn.Module) -> None:
    """Have a block's last product rounded as bf16 would."""

    def forward(h: torch.Tensor) -> torch.Tensor:
        h, weight, bias = (t.to(torch.bfloat16) for t in (h, proj.weight, proj.bias))
        return torch.nn.functional.linear(h, weight, bias).float()

    proj = block.proj_out
    proj.forward = forward
