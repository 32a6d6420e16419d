"""Where this process stands among the workers, and how a model is spread over them (FSDP2).

The three strategies are one: weights lie in parts over the workers of a group, and each group has
all of them. `fsdp` is one group, `hsdp` several, and in `ddp` a group is one worker.

`.flow` and `.denoiser` are two roots, so that each has its own backward and optimizer. Masters are
fp32 always; with bf16 the transformer layers are gathered in bf16 and gradients are reduced in
fp32. Knows nothing of Ray (whoever starts the workers sets up the process group or the environment
variables), of losses or of files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from flow.denoiser import Denoiser
from flow.flow import FlowModel
from flowreel.errors import FlowreelError
from training.sections import Precision, ShardGranularity, WorkerConfig

COLLECTIVE_TIMEOUT_S = 1800.0
Backend = Literal["gloo", "nccl"]


class ParallelError(FlowreelError, ValueError):
    """A number of processes or a kind of collectives that cannot be had here."""


@dataclass(frozen=True)
class Parallel:
    """This worker's place.

    Attributes:
        rank, world: number of this worker, and of all.
        device: where it computes.
        mesh: the workers as FSDP2 sees them; None in a single process.
        replicas: workers that hold the same part of the weights.

    >>> alone = Parallel(rank=0, world=1, device=torch.device("cpu"), mesh=None)
    >>> alone.is_first, alone.sum(torch.tensor(2.0)), alone.broadcast_int(3)
    (True, tensor(2.), 3)
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None
    replicas: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def all_agree(self, flag: bool) -> bool:
        """Whether the flag is set on every worker."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) == self.world)

    def barrier(self) -> None:
        """Wait until all workers are here."""
        if self.mesh is not None:
            dist.barrier()

    def broadcast_int(self, value: int) -> int:
        """Worker 0's value, for all."""
        if self.mesh is None:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor.item())

    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        """The compute dtype of matrix products; log-densities stay fp32 inside the flow."""
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_backend(config: WorkerConfig, gpus: float, workers: int | None = None) -> Backend:
    """What workers talk by, and so compute on: nccl where there are GPUs, unless gloo is asked for.

    Args:
        gpus: how many there are for these workers.
        workers: how many these are; all of the run by default.

    Raises:
        ParallelError: more workers than GPUs, where there are any or nccl is asked for.

    >>> choose_backend(WorkerConfig(), gpus=0), choose_backend(WorkerConfig(), gpus=8)
    ('gloo', 'nccl')
    """
    if config.backend == "gloo" or (config.backend == "auto" and not gpus):
        return "gloo"
    workers = config.counts.start if workers is None else workers
    if workers > gpus:
        raise ParallelError(
            f"{workers} training workers, but {gpus:g} GPUs: a worker needs one of its own; "
            f"lower train.workers.count{f' to {int(gpus)}' if gpus >= 1 else ''}, or set "
            "train.workers.backend to 'gloo' to train on CPUs"
        )
    return "nccl"


def _local_backend(config: WorkerConfig) -> Backend:
    """The choice of a worker for itself, by the GPUs of its machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if dist.is_initialized():
        # Whoever set up the group has given each worker its device, and may show it that one only.
        return choose_backend(config, gpus, workers=1)
    return choose_backend(config, gpus, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _mesh(config: WorkerConfig, device: torch.device, world: int) -> DeviceMesh:
    """One axis of shards; before it one of copies, where there are several."""
    if config.strategy == "fsdp":
        return init_device_mesh(device.type, (world,))
    size = config.shard_size or 1
    return init_device_mesh(
        device.type, (world // size, size), mesh_dim_names=("replicate", "shard")
    )


@contextmanager
def join_workers(config: WorkerConfig) -> Iterator[Parallel]:
    """Take this process's place among the workers; leave it at the end if it was taken here.

    With several workers the process group is the one already set up (Ray Train does), or is set up
    from the environment variables of `torchrun`.

    Raises:
        ParallelError: more or fewer processes than `count`, or more than GPUs.
    """
    backend = _local_backend(config)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(config.threads)
    if config.strategy == "single":
        yield Parallel(0, 1, device, None)
        return
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        world = dist.get_world_size()
        if world not in config.counts:
            fewest = "" if config.min_count is None else f"{config.min_count} to "
            raise ParallelError(
                f"{world} processes were started, but train.workers.count is {fewest}"
                f"{config.count}; start as many as that"
            )
        mesh = _mesh(config, device, world)
        replicas = world // mesh.size(mesh.ndim - 1)
        yield Parallel(dist.get_rank(), world, device, mesh, replicas)
    finally:
        if own_group:
            dist.destroy_process_group()


def _shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool
) -> None:
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def shard_model(
    model: FlowModel, parallel: Parallel, granularity: ShardGranularity, precision: Precision
) -> None:
    """Spread the parameters over the workers, in place.

    A single process only moves them to its device. A model on `meta` gets its memory only then,
    each worker its own part, and holds anything: `training.weights` fills it. Of the granularities,
    `layer` gathers one transformer layer at a time (least memory), `block` one affine block,
    `model` a whole network in one collective (least latency: right for models of a few million
    parameters).
    """
    is_meta = any(p.is_meta for p in model.parameters())
    if not is_meta:
        model.to(parallel.device)
    if parallel.mesh is not None:
        _shard_all(model, parallel.mesh, granularity, precision)
    if is_meta:
        model.to_empty(device=parallel.device)


def _shard_all(
    model: FlowModel, mesh: DeviceMesh, granularity: ShardGranularity, precision: Precision
) -> None:
    # The flow never writes into a module's output, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # Inputs are cast by autocast alone: casting x itself to bf16 would change the data whose
    # density is learnt.
    layer = (
        MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if precision == "bf16"
        else fp32
    )
    blocks = [*model.flow.shallow, model.flow.deep]
    if granularity == "layer":
        for stack in [*blocks, model.denoiser]:
            for one_layer in () if stack is None else stack.layers:
                _shard(one_layer, mesh, layer, reshard=True)
    elif granularity == "block":
        for block in blocks:
            _shard(block, mesh, fp32, reshard=True)
    for root in networks(model).values():
        _shard(root, mesh, fp32, reshard=False)


def networks(model: FlowModel) -> dict[str, nn.Module]:
    """The separately trained parts: `flow`, and `denoiser` where there is one."""
    parts: dict[str, nn.Module] = {"flow": model.flow}
    if isinstance(model.denoiser, Denoiser):
        parts["denoiser"] = model.denoiser
    return parts


def share_gradients(model: FlowModel, now: bool) -> None:
    """Whether the next backward pass adds up gradients over copies of the weights, or leaves it.

    Between micro-batches it can wait; over the parts of one copy gradients are added up at once,
    for no worker has room for all of them.
    """
    for part in networks(model).values():
        if isinstance(part, FSDPModule):
            part.set_requires_all_reduce(now)


def forget_gathered(model: FlowModel) -> None:
    """Drop gathered weights, so that the next forward sees weights that were changed in place.

    After a forward without a backward the roots stay gathered; FSDP2 would go on using the old
    values.
    """
    for part in networks(model).values():
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
