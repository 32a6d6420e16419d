"""`flowreel evaluate`: measure a model, say it, and write what is wanted of it.

Starts no cluster. Knows nothing of Ray or of how a figure comes about.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowreel.files import write_whole
from pipeline.console import Reporter, plain
from pipeline.evaluation import vbench
from pipeline.evaluation.options import Options
from pipeline.evaluation.page import page
from pipeline.evaluation.record import log_to_mlflow
from pipeline.evaluation.result import Evaluation, Shown
from pipeline.evaluation.rewriter import rewriter_of
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.samples import Sampling
from pipeline.evaluation.tables import markdown, say
from serving.loading import load
from training.record.feed import TrackingError


@dataclass(frozen=True)
class VBenchJob:
    """Samples for VBench.

    Attributes:
        out: folder of videos and lists.
        prompts: its prompt list; None is that of the installed package.
        first: how many of its prompts, from the first on; None is all.
        rewriter: address of an endpoint, or a language model; None leaves prompts as they are.
        rewriter_model: the endpoint's model.
    """

    out: Path
    prompts: Path | None = None
    first: int | None = None
    rewriter: str | None = None
    rewriter_model: str | None = None


def evaluate_model(
    folder: Path,
    options: Options,
    *,
    out: Path | None = None,
    mlflow: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Measure a model folder, and print every figure as tables or as JSON.

    Args:
        folder: the model.
        options: what is measured.
        out: folder for `evaluation.json`, `evaluation.md` and `evaluation.html`; None writes none.
        mlflow: store that figures and files go to as well, such as sqlite:///mlflow.db.
        reporter: what is said on the way.

    Raises:
        what `pipeline.evaluation.run.evaluate` raises.
    """
    reporter = reporter or Reporter()
    evaluation, shown = evaluate(folder, options, reporter)
    say(evaluation, reporter)
    if out is not None:
        write_files(out, evaluation, shown)
        reporter.outcome(f"page: {out / 'evaluation.html'}")
    if mlflow is not None:
        try:
            run_id = _record(evaluation, shown, mlflow, out)
        except TrackingError as error:
            # Minutes of work are not lost to a store that is away.
            reporter.outcome(f"not in MLflow: {error}")
        else:
            reporter.outcome(f"MLflow run {run_id}")
    reporter.document(evaluation.document())
    return evaluation


def sample_for_vbench(
    folder: Path, options: Options, job: VBenchJob, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Write a model's samples for VBench, and score them where that can be done.

    Returns:
        The folder, how many videos it holds, and VBench's results or None.

    Raises:
        VBenchError: no prompt list, or VBench failed.
        RewriterError: the rewriter did.
    """
    reporter = reporter or Reporter()
    entries = vbench.read_prompts(job.prompts)[: job.first]
    rewriter = None if job.rewriter is None else rewriter_of(job.rewriter, job.rewriter_model)
    loaded = load(folder, sampling=options.sampling)
    with reporter.progress("sampling for VBench") as update:
        paths = vbench.write_samples(
            loaded,
            entries,
            job.out,
            Sampling(options.guidance, options.schedule, options.seed),
            model=str(folder),
            rewriter=rewriter,
            progress=lambda done, total: update(done, total, "videos"),
        )
    reporter.outcome(f"{len(paths)} videos in {job.out / 'videos'}")
    results = vbench.run_vbench(job.out, entries, reporter)
    scores = None if results is None else json.loads(results.read_text())
    found = {"out": job.out, "videos": len(paths), "results": scores}
    reporter.document({"vbench": found})
    return found


def write_files(out: Path, evaluation: Evaluation, shown: Shown) -> list[Path]:
    """Write the three files into a folder, each whole; returns their paths."""
    document = json.dumps(plain(evaluation.document()), indent=1, allow_nan=False) + "\n"
    contents = {
        "evaluation.json": document,
        "evaluation.md": markdown(evaluation),
        "evaluation.html": page(evaluation, shown),
    }
    for name, content in contents.items():
        write_whole(out / name, content)
    return [out / name for name in contents]


def _record(evaluation: Evaluation, shown: Shown, uri: str, out: Path | None) -> str:
    if out is not None:
        return log_to_mlflow(evaluation, uri, out, [*out.glob("evaluation.*")])
    with tempfile.TemporaryDirectory(prefix="flowreel-") as folder:
        files = write_files(Path(folder), evaluation, shown)
        return log_to_mlflow(evaluation, uri, Path(folder), files)
