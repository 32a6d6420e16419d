"""Several lengths and resolutions are killed and resumed as one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from tests.data_prep.ledger import test_resuming


@pytest.mark.parametrize(
    "changed",
    [pytest.param(False, id="new"), pytest.param(True, id="changed", marks=pytest.mark.slow)],
)
def test_killed_at_any_write_and_run_again_gives_the_same_bytes(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path, changed: bool
) -> None:
    several = {"resolutions": ("24p", "36p"), "frame_counts": (17, 5)}
    bucket = config.bucket.model_copy(update=several)
    config = config.model_copy(update={"bucket": bucket, "windows_per_clip": 2})
    resume = test_resuming.test_killed_at_any_write_and_run_again_gives_the_same_bytes
    resume(config, world, codec_dir, tmp_path, changed)
