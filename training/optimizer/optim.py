"""A network's optimizer over a worker's own shards, its schedule, and the rule that skips.

Works on the local tensors behind FSDP's sharded parameters (or on plain parameters: the same
code), so that a step is a few fused kernels whatever the number of parameters. Whether a step is
skipped, and how far its gradient is clipped, are tensors on the device, alike on all workers; the
host is never asked. Knows nothing of losses or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.optimizer.muon import ShardedMuon, is_inner
from training.optimizer.sharded import like_parameter, local_tensor, on_host
from training.sections import OptimizerConfig


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to the peak, then half a cosine down to a share of it, the final ratio r.

    Before warm-up ends, step n has peak·(n + 1)/warmup_steps. After it, with p = (n − warmup_steps)
    / (steps − warmup_steps), at most 1, it has peak·(r + (1 − r)·½(1 + cos πp)).

    Attributes:
        peak: the highest rate.
        warmup_steps: steps of warm-up.
        steps: step at which the cosine ends, warm-up included.
        final_ratio: r.

    >>> rate = LearningRate(peak=1.0, warmup_steps=10, steps=110)
    >>> rate.at(4), rate.at(10), rate.at(60), rate.at(200)
    (0.5, 1.0, 0.5, 0.0)
    """

    peak: float
    warmup_steps: int
    steps: int
    final_ratio: float = 0.0

    @classmethod
    def of(cls, config: OptimizerConfig, peak: float, steps: int) -> LearningRate:
        """The configured schedule of a run of so many steps."""
        return cls(
            peak,
            config.warmup_steps,
            config.schedule_steps or steps,
            config.final_learning_rate_ratio,
        )

    def at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        length = max(1, self.steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / length)
        low = self.final_ratio
        return self.peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(limit: float, step: int) -> float:
    """Decay of the averaged weights: short at first, so that early weights are soon forgotten.

    >>> ema_decay(0.99, 0), ema_decay(0.99, 5000)
    (0.1, 0.99)
    """
    return min(limit, (1 + step) / (10 + step))


class ShardedOptimizer:
    """AdamW and averaged weights for one network; Muon for its inner matrices where asked for.

    Args:
        parameters: name and parameter; sharded ones are updated where they lie.
        config: β, ε, weight decay, clipping and the decay of the averaged weights.
        learning_rate: of every step.
        dtype: of the products of Muon.
        offload: moments and averaged weights lie in the host's memory, beside a copy of the weights
            that is stepped there.

    >>> layer = nn.Linear(2, 1)
    >>> rates = LearningRate(peak=0.1, warmup_steps=0, steps=10)
    >>> optimizer = ShardedOptimizer(layer.named_parameters(), OptimizerConfig(), rates)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> norm = optimizer.take_gradients().sqrt()
    >>> round(float(norm) ** 2), optimizer.step(0, norm, skip=torch.tensor(0.0))
    (3, 0.1)
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        learning_rate: LearningRate,
        dtype: torch.dtype = torch.float32,
        *,
        offload: bool = False,
    ) -> None:
        self.config = config
        self.offload = offload
        self.learning_rate = learning_rate
        self.parameters = dict(parameters)
        self.locals = {
            name: nn.Parameter(local_tensor(p.detach())) for name, p in self.parameters.items()
        }
        # What is stepped: the weights themselves, or copies in the host's memory.
        self.masters = self.locals
        if offload:
            self.masters = {
                name: nn.Parameter(p.detach().to("cpu", copy=True))
                for name, p in self.locals.items()
            }
        # Dressed as their parameters, for checkpoints; the optimizer works on the local parts.
        self._averages = {name: self._zeros_like(p) for name, p in self.parameters.items()}
        self.ema = {name: local_tensor(p) for name, p in self._averages.items()}
        torch._foreach_copy_(list(self.ema.values()), [p.detach() for p in self.locals.values()])
        inner = {
            name: p
            for name, p in self.parameters.items()
            if config.kind == "muon" and is_inner(name, p)
        }
        self.muon = ShardedMuon(inner, self.locals, config.weight_decay, dtype)
        outer = {name: p for name, p in self.parameters.items() if name not in inner}
        matrices = [self.masters[name] for name, p in outer.items() if p.ndim >= 2]
        vectors = [self.masters[name] for name, p in outer.items() if p.ndim < 2]
        self._adams = {name: self.masters[name] for name in outer}
        self.adam = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            ],
            lr=learning_rate.peak,
            betas=config.adam_betas,
            eps=config.adam_eps,
            fused=True,
        )
        self._moments = {
            f"{kind}.{name}": self._zeros_like(self.parameters[name])
            for name in outer
            for kind in ("exp_avg", "exp_avg_sq")
        }
        for name, parameter in self._adams.items():
            # Made now rather than at the first step, so that a checkpoint can be read into them.
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": local_tensor(self._moments[f"exp_avg.{name}"]),
                "exp_avg_sq": local_tensor(self._moments[f"exp_avg_sq.{name}"]),
            }

    def _zeros_like(self, parameter: Tensor) -> Tensor:
        """A state of a parameter, sharded as it is, where states lie."""
        if self.offload:
            return on_host(parameter)
        return like_parameter(torch.zeros_like(local_tensor(parameter.detach())), parameter)

    def take_gradients(self) -> Tensor:
        """Take the parameters' gradients over; returns the sum of their squares, 0-dim.

        The sum is over this worker's part, and lies on the device.
        """
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self.locals[name].grad = None if gradient is None else local_tensor(gradient)
            parameter.grad = None
        gradients = [p.grad for p in self.locals.values() if p.grad is not None and p.numel()]
        if not gradients:
            return torch.zeros((), device=next(iter(self.locals.values())).device)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    @torch.no_grad()
    def step(self, step: int, norm: Tensor, skip: Tensor) -> float:
        """One update, clipped to `clip_norm`, left out where `skip`; returns its learning rate.

        Args:
            norm: norm of the whole network's gradient, 0-dim on the device.
            skip: 1.0 or 0.0, 0-dim on the device.
        """
        rate = self.learning_rate.at(step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        scale = (norm / self.config.clip_norm).nan_to_num(1.0).clamp(min=1.0)
        if self.offload:
            for name, master in self.masters.items():
                gradient = self.locals[name].grad
                master.grad = None if gradient is None else gradient.cpu()
        where = next((p.device for p in self.masters.values()), norm.device)
        # The fused kernel divides gradients by grad_scale and does nothing where found_inf is 1.
        self.adam.grad_scale = scale.to(where)  # type: ignore[attr-defined]
        self.adam.found_inf = skip.float().to(where)  # type: ignore[attr-defined]
        self.adam.step()
        self.muon.step(rate, scale, skip.float())
        for name, parameter in self.locals.items():
            parameter.grad = self.masters[name].grad = None
            if self.offload:
                parameter.copy_(self.masters[name])
        weight = 1 - ema_decay(self.config.ema_decay, step)
        torch._foreach_lerp_(list(self.ema.values()), list(self.masters.values()), weight)
        return rate

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds of it, each tensor sharded as its parameter is."""
        out: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            out[f"ema.{name}"] = self._averages[name]
            if name in self.muon.momentum:
                out[f"momentum.{name}"] = like_parameter(self.muon.momentum[name], parameter)
                continue
            for kind in ("exp_avg", "exp_avg_sq"):
                out[f"{kind}.{name}"] = self._moments[f"{kind}.{name}"]
        if self._adams:
            # All parameters are stepped together, so one count stands for all.
            first = next(iter(self._adams.values()))
            out["adam_step"] = self.adam.state[first]["step"]
        return out

    def after_load(self) -> None:
        """Spread the one loaded step count over all parameters; copies on the host follow."""
        if self.offload:
            with torch.no_grad():
                for name, master in self.masters.items():
                    master.copy_(self.locals[name])
        if not self._adams:
            return
        first = next(iter(self._adams.values()))
        count = self.adam.state[first]["step"]
        for parameter in self._adams.values():
            self.adam.state[parameter]["step"] = count.clone()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange weights and averaged weights (twice is nothing)."""
        for name, parameter in self.locals.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.ema[name])
            self.ema[name].copy_(weights)


class SkipRule:
    """Decides on the device, alike on all workers, whether a step is taken.

    A step is skipped when a loss or gradient norm is not finite, or (with `spike_factor`) when a
    norm is more than so many medians of the last `spike_median_steps` steps that were taken.

    Args:
        config: the factor, and how many steps the median is over.
        device: where norms and counts lie.

    >>> rule = SkipRule(OptimizerConfig(), torch.device("cpu"))
    >>> norms = torch.tensor([1.0, 1.0])
    >>> float(rule.decide(torch.tensor([0.5]), norms))
    0.0
    >>> float(rule.decide(torch.tensor([float("nan")]), norms))
    1.0
    """

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        self.norms = torch.full((2, config.spike_median_steps), float("nan"), device=device)
        # Steps taken, steps skipped in all, and steps skipped in a row.
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def decide(self, values: Tensor, norms: Tensor) -> Tensor:
        """1.0 to skip, 0.0 to take the step.

        Args:
            values: everything that must be finite, 1-dim.
            norms: gradient norms of flow and denoiser [2]; 0 for one that was not trained.
        """
        bad = ~torch.isfinite(values).all()
        if self.config.spike_factor > 0:
            medians = self.norms.nanmedian(dim=1).values
            # Before the ring is full a median says little, and nothing is skipped by it.
            full = self.counts[0] >= self.config.spike_median_steps
            bad = bad | (full & (norms > self.config.spike_factor * medians).any())
        # A ring of norms, written where the step is taken. A branch would have to ask the device.
        index = (self.counts[0] % self.config.spike_median_steps).expand(2, 1)
        norms_or_nan = torch.where(norms > 0, norms, torch.nan)
        old_norms = self.norms.gather(1, index)
        self.norms.scatter_(1, index, torch.where(~bad, norms_or_nan[:, None], old_norms))
        self.counts[0] += ~bad
        self.counts[1] += bad
        self.counts[2] = (self.counts[2] + 1) * bad
        return bad.float()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; the tensors themselves."""
        return {"norms": self.norms, "counts": self.counts}
