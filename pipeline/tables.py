"""Outcomes as a person reads them: the tables and closing lines of the stages and commands.

Takes what was measured and prints it through a `Reporter`. Measures nothing itself. Knows nothing
of Ray or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import Reporter, duration, size

if TYPE_CHECKING:
    from data_prep.ledger.problems import ShardProblem
    from data_prep.progress import Pace, RunState
    from data_prep.run import PrepareReport
    from data_prep.texts.run import TextReport
    from serving.messages import GeneratedVideo

CLOSING_FIGURES = (
    "held_out_nats_per_dim", "gaussian_nats_per_dim", "shuffled_caption_nats_per_dim",
    "noise_floor_nats_per_dim", "codec_psnr_db", "overlap_s", "wall_s",
)  # fmt: skip
"""What of the demo's summary is printed at its end, in this order."""
JUDGED = ("colour", "shape", "size", "motion")
"""What is read back from the demo's videos."""


_NO_CAPTION = {
    "no_captioner": "captioner.backend is none",
    "not_moving_shapes": "captioner measured writes of moving shapes only (vlm, vllm and http of "
    "any video)",
}
"""Why clips are without a synthetic caption on purpose, by code."""


def progress_words(state: RunState, pace: Pace) -> str:
    """How a run of `prepare` goes, the most wanted first: a narrow terminal cuts off the rest.

    >>> from data_prep.progress import Pace, RunState
    >>> progress_words(RunState(0, 3, 12, {"kept": 10, "failed": 2}), Pace())
    '12 samples (10 kept, 0 dropped, 2 failed)'
    """
    statuses = [f"{state.by_status.get(name, 0)} {name}" for name in ("kept", "dropped", "failed")]
    words = [f"{state.samples} samples"]
    if (rate := pace.samples_per_s) is not None:
        words.append(f"{rate:.1f}/s")
    if state.shards < state.of_shards and (left_s := pace.left_s) is not None:
        words.append(f"about {duration(left_s)} left")
    if len(words) == 1:
        words[0] += f" ({', '.join(statuses)})" if state.samples else ""
    else:
        words += statuses
    if (bottleneck := pace.bottleneck) is not None:
        stage, share = bottleneck
        words.append(f"{stage} {share:.0%} busy")
    return ", ".join(words)


def say_prepared(report: PrepareReport, reporter: Reporter) -> None:
    """What became of every sample."""
    rows = [[status, reason, str(count)] for status, reason, count in report.rows()]
    reporter.table(f"{report.total} samples", ["status", "reason", "samples"], rows)
    if report.shards_now == 0:
        reporter.outcome("  nothing to do: every shard was prepared before")
    else:
        _say_stages(report, reporter)
        reporter.say(f"  on {report.resources}")
    if report.reused_now:
        reporter.say(
            f"  {report.reused_now} of {report.samples_now} samples kept what was made of them "
            "before"
        )
    _say_failed_captions(report, reporter)
    for line in unjudged_lines(report.unjudged):
        reporter.outcome(f"  {line}")
    say_shard_problems(report.shard_problems, report.shards, reporter)


def say_encoded(report: TextReport, reporter: Reporter) -> None:
    """How many prompts are encoded, and what they weigh."""
    if report.shards_now:
        over = f", {report.taken_over:,} taken over" if report.taken_over else ""
        reporter.say(f"  {report.encoded_now:,} encoded now{over}, in {report.shards_now} shards")
    else:
        reporter.say("  nothing to do: every prompt was encoded before")
    reporter.outcome(f"  {text_line(report)}")


def text_line(report: TextReport) -> str:
    """The encoded prompts of a dataset in one line.

    >>> from data_prep.texts.run import TextReport
    >>> text_line(TextReport("d", 2, 2, 1000, 6000, 6000, 0, 3_700_000_000, 60.0))
    '6,000 prompts of 1,000 clips and images: 3.7 GB, 3.7 MB each (1M of them: 3.7 TB)  d'
    """
    each = report.size_bytes / max(1, report.clips)
    return (
        f"{report.prompts:,} prompts of {report.clips:,} clips and images: "
        f"{size(report.size_bytes)}, {size(round(each))} each (1M of them: "
        f"{size(round(each * 1_000_000))})  {report.out}"
    )


def say_shard_problems(
    problems: Sequence[ShardProblem], shards: int, reporter: Reporter, *, shown: int = 20
) -> None:
    """The shards of which nothing, or not everything, could be read, and why."""
    if not problems:
        return
    rows = [[p.shard, p.problem, p.why] for p in problems[:shown]]
    if len(problems) > shown:
        rows.append([f"and {len(problems) - shown} more", "", ""])
    counts = [
        f"{sum(p.problem == kind for p in problems)} {kind}" for kind in ("unreadable", "truncated")
    ]
    reporter.table(
        f"{len(problems)} of {shards} shards not read to their end: {', '.join(counts)}",
        ["shard", "", "why"],
        rows,
        left=True,
    )


def unjudged_lines(unjudged: Mapping[str, int]) -> list[str]:
    """Which metadata filters had no value to judge, and of how many samples.

    >>> print(*unjudged_lines({"samples": 1200, "matching_score": 1200, "one": 3}), sep="\\n")
    1,200 of 1,200 samples have no matching_score: that filter judged nothing
    3 of 1,200 samples have no one: that filter let them pass
    """
    total = unjudged.get("samples", 0)
    fields = {name: count for name, count in unjudged.items() if name != "samples"}
    lines = []
    whole = [name for name, count in fields.items() if count == total]
    if whole:
        filters = "that filter" if len(whole) == 1 else "those filters"
        lines.append(
            f"{total:,} of {total:,} samples have no {' or '.join(whole)}: {filters} judged nothing"
        )
    lines += [
        f"{count:,} of {total:,} samples have no {name}: that filter let them pass"
        for name, count in fields.items()
        if count < total
    ]
    return lines


def _say_stages(report: PrepareReport, reporter: Reporter) -> None:
    """How busy each stage was; the busiest held up the others."""
    if not report.stages:
        return
    rows = [
        [
            stage.name,
            str(stage.workers),
            f"{stage.utilisation:.0%}",
            f"{stage.rows / stage.elapsed_s:.1f}" if stage.elapsed_s > 0 else "–",
            size(stage.bytes_out),
        ]
        for stage in report.stages
    ]
    busiest = max(report.stages, key=lambda stage: stage.utilisation)
    rate = f"{report.clips_per_s:.1f} clips/s; " if report.clips_per_s else ""
    title = f"{rate}the busiest stage was {busiest.name}"
    reporter.table(title, ["stage", "workers", "busy", "rows/s", "bytes out"], rows)


def say_captioned(report: PrepareReport, reporter: Reporter) -> None:
    """How many clips have a synthetic caption, and what still keeps others from one."""
    num_kept, failed = report.counts.get("kept", 0), sum(report.captions_failed.values())
    reporter.outcome(f"  {num_kept - failed} of {num_kept} clips have a synthetic caption")
    if report.shards_now == 0:
        reporter.outcome("  nothing to do: every caption was written before")
    if report.unprepared_shards:
        names = ", ".join(report.unprepared_shards[:5])
        reporter.outcome(
            f"  {len(report.unprepared_shards)} shards have no latents yet ({names}): prepare them "
            "first"
        )
    _say_failed_captions(report, reporter)


def _say_failed_captions(report: PrepareReport, reporter: Reporter) -> None:
    failed = dict(report.captions_failed)
    refused = {code: failed.pop(code) for code in _NO_CAPTION if code in failed}
    for code, count in refused.items():
        reporter.outcome(
            f"  {count} kept clips have no synthetic caption: {_NO_CAPTION[code]}; training reads "
            "their original captions"
        )
    if failed:
        total = sum(failed.values())
        codes = ", ".join(f"{code} {n}" for code, n in failed.items())
        reporter.outcome(
            f"  {total} kept clips have no synthetic caption ({codes}); `flowreel prepare --only "
            "captions` tries them again"
        )


def sampling_lines(video: GeneratedVideo) -> list[str]:
    """What sampling took and how exact it is."""
    lines = []
    if (took := video.counters) is not None:
        lines.append(
            f"deep block  {took.iterations} iterations of {took.ms_per_iteration:.1f} ms, "
            f"{took.evaluations_per_token:.1f} evaluations per token, {took.tokens_per_s:.0f} "
            "tokens/s"
        )
        sweeps = " ".join(str(work.iterations) for work in took.shallow)
        lines.append(f"shallow     {sweeps} sweeps, block by block")
    if (proof := video.certificate) is not None:
        lines.append(
            f"certificate |r| at most {proof.max_abs:.2g}, p99.9 {proof.p999_abs:.2g}: the exact "
            "sample of noise that far from the noise drawn"
        )
    return lines


def say_summary(out: Path, page: Path, summary: Mapping[str, Any], reporter: Reporter) -> None:
    """The demo's closing table, and where to look."""
    rows = [[name, f"{summary[name]:.3f}"] for name in CLOSING_FIGURES]
    reporter.table("what was measured", ["", ""], rows)
    columns = ("accuracy", "after_codec", "chance")
    reporter.table(
        f"what was asked for and is seen, of {summary['judged_clips']} clips",
        ["", "generated", "real, after the codec", "chance"],
        [[word, *(f"{summary[f'{word}_{of}']:.0%}" for of in columns)] for word in JUDGED],
    )
    store = out / "train" / "mlflow.db"
    for line in (
        f"report         {page}",
        f"contact sheet  {out / 'contact_sheet.png'}",
        f"videos         {out}/*.mp4",
        f"tracking       mlflow ui --backend-store-uri sqlite:///{store}",
    ):
        reporter.outcome(line)
