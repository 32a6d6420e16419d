"""A driver in a process of its own, for the test that kills it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.training.world import small_config, small_request, two_workers
from training.on_ray import train_on_ray

CONFIG = small_config(
    steps=300,
    checkpoints={"every_steps": 10},
    tracking={"every_steps": 5},
    workers=two_workers(shard_granularity="model"),
)


def main(dataset: Path, out: Path) -> None:
    train_on_ray(small_request(dataset, out, CONFIG))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
