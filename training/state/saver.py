"""Checkpoints written by a thread while training goes on, from a copy of the state.

A step waits for the copy alone. At most one checkpoint is being written; the next one waits for it.
One that cannot be written (a full disk) leaves nothing behind and takes nothing away: the next that
is due is tried as any other. Knows nothing of the loop.

    FlowreelError, RuntimeError
    └── CheckpointFailed    the last checkpoint of a run could not be written
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from flowreel.errors import FlowreelError
from training.optimizer.sharded import local_tensor
from training.parallel import Parallel
from training.sections import CheckpointConfig
from training.state.checkpoint import (
    SINGLE_PROCESS,
    Checkpoint,
    complete_checkpoints,
    folder_of,
    remove_old,
    write_checkpoint,
)
from training.state.group import HostGroup


class CheckpointFailed(FlowreelError, RuntimeError):
    """The last checkpoint of a run could not be written; the message says why."""


@dataclass(frozen=True)
class _Staged:
    """A copy of the state after some steps, waiting to be written."""

    step: int
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Written:
    """What became of a checkpoint; alike on all workers."""

    checkpoint: Checkpoint | None
    error: OSError | None


class Saver:
    """Writes a run's checkpoints. All workers make one, and call the same methods in one order.

    Args:
        root: folder of the checkpoints.
        description: what the run is, for the marker.
        config: how many stay.
        parallel: this worker's place.
    """

    def __init__(
        self,
        root: Path,
        description: Mapping[str, Any],
        config: CheckpointConfig,
        parallel: Parallel,
    ) -> None:
        self.root = root
        self.description = dict(description)
        self.config = config
        self.last: Checkpoint | None = None
        self._group = HostGroup.of(parallel)
        on_gpu = parallel.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: _Staged | None = None
        self._writing: Future[_Written] | None = None
        self._failed: OSError | None = None
        # Filters belong to the process, so that a thread must not change them for a while.
        warnings.filterwarnings("ignore", message=SINGLE_PROCESS)

    def stage(self, step: int, state: dict[str, Tensor]) -> None:
        """Copy the state after so many steps; `settle` comes before it."""
        assert self._writing is None, "the one before is still being written"
        # The stager reuses its memory, which the one before has left by now.
        copied = self._stager.stage(state)
        assert isinstance(copied, dict), "staged at once"
        self._staged = _Staged(step, copied)

    def begin(self, *, held_out: float | None = None, error: OSError | None = None) -> None:
        """Write what was staged, in the thread.

        Args:
            held_out: loss of the averaged weights after this very step, nats per dimension.
            error: what kept this worker from writing what must be on disk before; then no worker
                writes.
        """
        assert self._staged is not None, "staged before"
        staged, self._staged = self._staged, None
        self._writing = self._pool.submit(self._write, staged, held_out, error)

    def settle(self) -> str | None:
        """Wait for the checkpoint that is being written; a sentence where it could not be."""
        if self._writing is None:
            return None
        written, self._writing = self._writing.result(), None
        self._failed = written.error
        if written.checkpoint is not None:
            self.last = written.checkpoint
        if written.error is None:
            return None
        return (
            f"a checkpoint could not be written to {self.root} ({_reason(written.error)}): "
            "training goes on, and tries again at the next one due; free some space"
        )

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointFailed: it could not be written.
        """
        self.settle()
        if self._failed is not None:
            kept = complete_checkpoints(self.root)
            again = f"from step {kept[-1].step}" if kept else "at its beginning"
            raise CheckpointFailed(
                f"the last checkpoint could not be written to {self.root} "
                f"({_reason(self._failed)}): free some space, then run the same command again; it "
                f"goes on {again}"
            ) from self._failed

    def close(self) -> None:
        """Wait for the thread, whatever became of its checkpoint."""
        self._pool.shutdown(wait=True)
        self._stager.close()

    def _write(self, staged: _Staged, held_out: float | None, error: OSError | None) -> _Written:
        try:
            self._group.together(lambda: _raise(error))
            checkpoint = write_checkpoint(
                self.root, staged.step, staged.state, self.description, self._group, held_out
            )
            self._group.together(self._remove_old)
        except OSError as failure:
            self._group.together(lambda: self._remove_partial(staged.step))
            return _Written(None, failure)
        return _Written(checkpoint, None)

    def _remove_old(self) -> None:
        if self._group.is_first:
            remove_old(self.root, self.config.keep, self.config.keep_best)

    def _remove_partial(self, step: int) -> None:
        folder = folder_of(self.root, step)
        if self._group.is_first and folder.exists():
            shutil.rmtree(folder)


def _raise(error: OSError | None) -> None:
    if error is not None:
        raise error


def _reason(error: OSError) -> str:
    return " ".join(str(error.strerror or error).split())


def want_of_room(
    root: Path, state: Mapping[str, Tensor], config: CheckpointConfig, group: HostGroup
) -> str | None:
    """What is missing for the checkpoints that will be kept, and the one being written besides.

    All workers call it; the sentence is worker 0's, None where there is room.

    Args:
        state: what a checkpoint holds; of sharded tensors this worker's part.
    """
    own = sum(local_tensor(tensor).nbytes for tensor in state.values())
    size = sum(group.of_all(own))
    if not group.is_first:
        return None
    number = config.keep + config.keep_best + 1
    taken = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    room = shutil.disk_usage(root).free + taken
    if number * size <= room:
        return None
    return (
        f"{number} checkpoints of {size / 1e9:.3g} GB ({number - 1} kept and one being written) "
        f"need {number * size / 1e9:.3g} GB, but {root} has room for {room / 1e9:.3g} GB: free "
        "some space, or lower train.checkpoints.keep"
    )
