"""One training step: two backwards (flow, then denoiser), one decision, two updates.

The same function for one process and for many: the only thing workers exchange here, beside FSDP's
own traffic, is one small vector of losses and squared gradient norms. Everything it returns is
still on the device. Knows nothing of data, schedules of checkpoints, logs or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flow.flow import FlowModel, FlowOutput
from flowreel.errors import FlowreelError, FlowreelWarning
from training.config import TrainConfig
from training.data.batches import TrainBatch
from training.objective import denoiser_backward, flow_backward
from training.optimizer.optim import LearningRate, ShardedOptimizer, SkipRule
from training.optimizer.sharded import local_tensor
from training.parallel import Parallel, forget_gathered, networks, share_gradients

NAMED = 8
"""So many samples of a skipped step stand in its warning; the history has all."""


class StepWarning(FlowreelWarning):
    """A step was skipped."""


class SkippedTooOften(FlowreelError, RuntimeError):
    """Steps were skipped so many times in a row that the run makes no sense any more."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured; tensors on the device, so that nobody waits for it.

    Attributes:
        step, mode, tokens: which step, of which kind, and how many latent tokens it had over all
            workers.
        values: [flow loss, denoiser loss, flow norm, denoiser norm, skipped, skipped in a row,
            log-det of every block].
        has_denoiser: whether the denoiser was trained in this step.
        learning_rate: the flow's; 0 where all of it is frozen.
    """

    step: int
    mode: str
    tokens: int
    values: Tensor
    has_denoiser: bool
    learning_rate: float

    def record(self) -> dict[str, float | int | str | None]:
        """Plain numbers, one line of the history; waits for the device.

        Numbers that are not finite become None.
        """
        loss, denoiser, norm, denoiser_norm, skipped, in_a_row, *log_dets = (
            value if math.isfinite(value) else None for value in self.values.tolist()
        )
        record: dict[str, float | int | str | None] = {
            "step": self.step,
            "mode": self.mode,
            "loss_nats_per_dim": loss,
            "denoiser_loss": denoiser if self.has_denoiser else None,
            "flow_grad_norm": norm,
            "denoiser_grad_norm": denoiser_norm if self.has_denoiser else None,
            "skipped": int(skipped or 0),
            "skipped_in_a_row": int(in_a_row or 0),
            "learning_rate": self.learning_rate,
        }
        record.update({f"log_det_block_{i}": value for i, value in enumerate(log_dets)})
        return record


class TrainStep:
    """A model with its optimizers, ready to take steps.

    Args:
        model: already sharded (`parallel.shard_model`) where there are several workers.
        config: the run's; each optimizer and the rule that skips get their section of it.
        parallel: this worker's place.
    """

    def __init__(self, model: FlowModel, config: TrainConfig, parallel: Parallel) -> None:
        self.model = model
        self.config = config
        self.parallel = parallel
        optimizer = config.optimizer
        peaks = {"flow": optimizer.flow_learning_rate, "denoiser": optimizer.denoiser_learning_rate}
        trained = {
            name: [(key, p) for key, p in module.named_parameters() if p.requires_grad]
            for name, module in networks(model).items()
        }
        self.optimizers = {
            name: ShardedOptimizer(
                parameters,
                optimizer,
                LearningRate.of(optimizer, peaks[name], config.steps),
                torch.bfloat16 if config.precision == "bf16" else torch.float32,
                offload=config.memory.offload_optimizer,
            )
            for name, parameters in trained.items()
            if parameters
        }
        self.skip_rule = SkipRule(optimizer, parallel.device)

    def trains_denoiser(self, step: int) -> bool:
        """Whether a step has a denoiser loss."""
        return (
            "denoiser" in self.optimizers
            and self.config.denoiser_loss
            and step >= self.config.denoiser_from_step
        )

    def run_flow(self, x: Tensor, text_BJE: Tensor | None) -> FlowOutput:
        """The flow in the run's precision, as every measurement of a run has it."""
        with self.parallel.autocast(self.config.precision):
            output: FlowOutput = self.model.flow(x, text_BJE)
        return output

    def run_denoiser(self, x: Tensor, text_BJE: Tensor | None) -> Tensor:
        """The denoiser in the run's precision."""
        assert self.model.denoiser is not None
        with self.parallel.autocast(self.config.precision):
            s: Tensor = self.model.denoiser(x, text_BJE)
        return s

    def _backward(self, part: TrainBatch, with_denoiser: bool, share: float) -> Tensor:
        """Both backwards of a micro-batch; [flow loss, denoiser loss, log-det of every block]."""
        x, text_BJE = part.x_noisy, part.text_BJE
        sigma = self.model.config.noise_std
        flow = flow_backward(
            self.run_flow, x, text_BJE, sigma, with_target=with_denoiser, share=share
        )
        denoiser_loss = torch.zeros((), device=self.parallel.device)
        if with_denoiser:
            assert flow.score_target is not None
            denoiser_loss = denoiser_backward(
                self.run_denoiser, x, text_BJE, flow.score_target, share
            )
        losses = torch.stack([flow.nats_per_dim, denoiser_loss])
        return torch.cat([losses, flow.block_log_det]).float()

    def take(self, step: int, batch: TrainBatch) -> StepMetrics:
        """Take one step on this worker's share of the batch, in `accumulate` micro-batches."""
        with_denoiser = self.trains_denoiser(step)
        zero = torch.zeros((), device=self.parallel.device)
        parts = batch.parts(self.config.batches.accumulate)
        found = []
        for index, part in enumerate(parts):
            share_gradients(self.model, now=index == len(parts) - 1)
            found.append(self._backward(part, with_denoiser, 1 / len(parts)))
        means = torch.stack(found).mean(0)
        squares = [
            self.optimizers[n].take_gradients() if n in self.optimizers else zero
            for n in ("flow", "denoiser")
        ]
        world = self.parallel.world
        # One exchange: means need dividing by the workers, squares of shards by their copies.
        replicas = self.parallel.replicas
        shared = self.parallel.sum(
            torch.cat([means / world, torch.stack(squares).float() / replicas])
        )
        averages, norms = shared[:-2], shared[-2:].sqrt()
        skip = self.skip_rule.decide(shared, norms)
        rate = 0.0
        if "flow" in self.optimizers:
            rate = self.optimizers["flow"].step(step, norms[0], skip)
        if with_denoiser:
            self.optimizers["denoiser"].step(step, norms[1], skip)
        in_a_row = self.skip_rule.counts[2].float()
        values = torch.cat([averages[:2], norms, torch.stack([skip, in_a_row]), averages[2:]])
        tokens = batch.x_noisy.numel() // batch.x_noisy.shape[-3] * world
        tokens //= self.model.config.patch_size**2
        return StepMetrics(step, batch.mode, tokens, values, with_denoiser, rate)

    @staticmethod
    def skip_sentence(record: Mapping[str, Any], ids: Sequence[str]) -> str:
        """What is said of a skipped step; of many samples the first ones are named."""
        named = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" * (len(ids) > NAMED))
        return (
            f"step {record['step']} was skipped: loss {record['loss_nats_per_dim']}, gradient "
            f"norms {record['flow_grad_norm']} and {record['denoiser_grad_norm']} (None: not "
            f"finite); its samples: {named}"
        )

    def check_skips(self, record: dict[str, float | int | str | None]) -> None:
        """Stop a run that only skips.

        Raises:
            SkippedTooOften: `max_consecutive_skips` steps in a row were skipped.
        """
        in_a_row = int(record["skipped_in_a_row"] or 0)
        if in_a_row >= self.config.optimizer.max_consecutive_skips:
            raise SkippedTooOften(
                f"{in_a_row} steps in a row were skipped up to step {record['step']}: loss "
                f"{record['loss_nats_per_dim']}, gradient norms {record['flow_grad_norm']} and "
                f"{record['denoiser_grad_norm']} (None: not finite). Lower the learning rates, "
                "lengthen warmup_steps (both in train.optimizer), or look for broken latents; "
                "training resumes from the last checkpoint"
            )

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name; of sharded tensors this worker's part."""
        state: dict[str, Tensor] = {}
        for name, module in networks(self.model).items():
            for key, parameter in module.named_parameters():
                state[f"model.{name}.{key}"] = parameter.detach()
        for name, optimizer in self.optimizers.items():
            for key, tensor in optimizer.state().items():
                state[f"optimizer.{name}.{key}"] = tensor
        for key, tensor in self.skip_rule.state().items():
            state[f"skip_rule.{key}"] = tensor
        return state

    def after_load(self) -> None:
        """To be called once `state()`'s tensors were overwritten by a checkpoint."""
        for optimizer in self.optimizers.values():
            optimizer.after_load()
        forget_gathered(self.model)

    def swap_ema(self) -> None:
        """Exchange weights and averaged weights, for an evaluation; call twice."""
        for optimizer in self.optimizers.values():
            optimizer.swap_ema()
        forget_gathered(self.model)

    def parameter_digest(self) -> Tensor:
        """Sum of squares of all weights, over all workers: equal runs have equal digests."""
        total = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for optimizer in self.optimizers.values():
            for parameter in optimizer.locals.values():
                total += local_tensor(parameter.detach()).double().square().sum()
        return self.parallel.sum(total) / self.parallel.replicas
