"""A driver in a process of its own, for the test that kills it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.training.world import TEXT, small_config, small_flow
from training.on_ray import train_on_ray

CONFIG = small_config(
    strategy="fsdp",
    workers=2,
    steps=300,
    checkpoint_every=10,
    log_every=5,
    shard_granularity="model",
)


def main(dataset: Path, out: Path) -> None:
    train_on_ray(CONFIG, small_flow(), TEXT, None, dataset, None, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
