"""Training processes of which the second finds the disk full at one checkpoint."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.training import workers
from training.state import saver as savers
from training.state.checkpoint import Checkpoint, write_checkpoint

FULL_AT = 2
"""Steps taken at the checkpoint that finds no room."""


@contextmanager
def small_files(limit_bytes: int) -> Iterator[None]:
    """No file of this process grows over this size meanwhile, as on a full disk."""

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(root: Path, step: int, *arguments: Any) -> Checkpoint:
    """A checkpoint as it is written, but for the second worker's full disk."""
    is_full = step == FULL_AT and dist.get_rank() == 1
    with small_files(4096) if is_full else nullcontext():
        return write_checkpoint(root, step, *arguments)


def main(settings: dict[str, Any]) -> None:
    """What `workers.run` runs, in a process of its own."""
    savers.write_checkpoint = write
    workers.main(settings)
