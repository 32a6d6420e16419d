"""What every test needs: Ray as the product starts it; an MLflow store that is made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# By default Ray gives its workers the lowest priority, so that any other busy process starves them.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def empty_mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without a run; making its tables takes MLflow seconds, so it is copied."""
    from training.record.tracking import mlflow_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_mlflow_store: Path, tmp_path: Path) -> str:
    """An MLflow store of this test's own."""
    shutil.copy(empty_mlflow_store, tmp_path / "store.db")
    return f"sqlite:///{tmp_path / 'store.db'}"
