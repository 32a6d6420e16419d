"""An evaluation in MLflow: its own run, and the figures with the run that trained the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluation.codec_quality import CodecQuality
from pipeline.evaluation.record import EXPERIMENT, log_to_mlflow
from pipeline.evaluation.result import About, Evaluation
from training.record.feed import TrackingError
from training.record.tracking import Tracking, mlflow_client


def evaluation(model: Path, psnr_db: float) -> Evaluation:
    """What an evaluation of a codec alone finds."""
    about = About(
        model=str(model),
        size="9 frames of 64x64 at 8 fps",
        parameters=92_180,
        codec_digest="0123456789abcdef",
        data=None,
        prompts=3,
        guidance=2.5,
        schedule="jacobi",
        denoiser="none",
        seed=0,
        seconds={"codec": 1.5},
    )
    found = CodecQuality(psnr_db, 0.9, (20.0, 21.0, 22.0), (0.9, 0.9, 0.9), 2.0, 4, 3)
    return Evaluation(about, codec={"codec": found})


def test_figures_are_in_a_run_of_their_own_and_with_the_run_that_trained(
    uri: str, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    (out / "evaluation.json").write_text("{}")
    Tracking(uri, "training", "a run", status="FINISHED").write(run)
    ids = [
        log_to_mlflow(evaluation(run / "model", psnr_db), uri, out, [out / "evaluation.json"])
        for psnr_db in (20.0, 21.0)
    ]
    assert ids[0] == ids[1], "into one folder twice is one run"
    client = mlflow_client(uri)
    own = client.get_run(ids[0])
    assert own.info.status == "FINISHED"
    assert own.info.run_name.endswith("run/model")
    assert own.data.params["guidance"] == "2.5"
    assert own.data.metrics["codec.psnr_db"] == 21.0
    assert own.data.metrics["seconds.codec"] == 1.5
    history = client.get_metric_history(ids[0], "codec.psnr_db_by_frame")
    assert {metric.step for metric in history} == {0, 1, 2}
    assert [file.path for file in client.list_artifacts(ids[0])] == ["evaluation.json"]
    experiments = {name: client.get_experiment_by_name(name) for name in ("training", EXPERIMENT)}
    (trained,) = client.search_runs([experiments["training"].experiment_id])
    assert trained.data.metrics["evaluation/codec.psnr_db"] == 21.0
    assert trained.info.status == "FINISHED"


def test_a_store_that_is_away_is_one_line(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:1"
    with pytest.raises(TrackingError, match="does not take") as caught:
        log_to_mlflow(evaluation(tmp_path / "model", 20.0), nowhere, tmp_path / "out", [])
    assert "\n" not in str(caught.value)
