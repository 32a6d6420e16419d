"""Samples for VBench: its prompts' videos, in the layout that the package `vbench` reads.

    DIR/videos/PROMPT-0.mp4 … PROMPT-4.mp4   as its standard mode looks for them
    DIR/full_info.json                       the part of its prompt list that was made
    DIR/prompts.json                         file → prompt, as its custom mode reads it
    DIR/manifest.json                        how each was made: seed, what the model read
    DIR/rewritten.json                       prompt → what the rewriter made of it

A video is a function of its line in the manifest; one that is there with the same line is left
alone, so that a run that was interrupted goes on. `run_vbench` scores them where package and
weights are. Knows nothing of Ray.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowreel.errors import FlowreelError
from flowreel.files import write_json, write_whole
from media.write import encode_mp4
from pipeline.console import Reporter
from pipeline.evaluation.rewriter import Rewriter
from pipeline.evaluation.samples import BATCH, Sampling, make_videos
from serving.loading import LoadedModel

PROMPT_LIST = "VBench_full_info.json"
VIDEOS_PER_PROMPT = 5
"""As its protocol has it; its standard mode looks for these and no others."""
NAME_BYTES = 250
"""A file's name may be no longer on common file systems."""

_SCORE = """
import json, sys, torch
from vbench import VBench
full_info, out, videos, dimensions = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(",")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBench(device, full_info, out).evaluate(
    videos_path=videos, name="flowreel", dimension_list=dimensions
)
"""


class VBenchError(FlowreelError, ValueError):
    """A prompt list that cannot be read, or a prompt that no file can be named after."""


def read_prompts(path: Path | None) -> list[dict[str, Any]]:
    """The benchmark's prompts: `prompt_en`, `dimension` and, of some, `auxiliary_info`.

    Args:
        path: its prompt list; None takes that of the installed package.

    Raises:
        VBenchError: no list there, or another kind of file.
    """
    if path is None:
        found = importlib.util.find_spec("vbench")
        if found is None or not found.submodule_search_locations:
            raise VBenchError(
                "--vbench reads the prompt list of the package vbench, which is not installed: run "
                f"`pip install --no-deps vbench`, or name its {PROMPT_LIST} with --vbench-prompts"
            )
        path = Path(found.submodule_search_locations[0]) / PROMPT_LIST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VBenchError(f"--vbench-prompts {path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise VBenchError(
            f"{path} is no prompt list of VBench: it must be a list of maps with prompt_en (text) "
            f"and dimension (a list), as {PROMPT_LIST} is"
        )
    for entry in entries:
        _check_name(entry["prompt_en"])
    return entries


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("prompt_en"), str)
        and isinstance(entry.get("dimension"), list)
    )


def _check_name(prompt: str) -> None:
    name = video_name(prompt, VIDEOS_PER_PROMPT - 1)
    if "/" in prompt or "\0" in prompt or len(name.encode()) > NAME_BYTES:
        raise VBenchError(
            f"no file can be named after the prompt {prompt[:80]!r}: it must have no / and at most "
            f"{NAME_BYTES} bytes with its number; leave it out of the list"
        )


def video_name(prompt: str, index: int) -> str:
    """The file that `vbench` looks for.

    >>> video_name("a cat", 0)
    'a cat-0.mp4'
    """
    return f"{prompt}-{index}.mp4"


def write_samples(
    loaded: LoadedModel,
    entries: Sequence[Mapping[str, Any]],
    out: Path,
    sampling: Sampling,
    *,
    model: str,
    rewriter: Rewriter | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Make what is missing of five videos for each prompt; returns the paths of all.

    Args:
        loaded: the model.
        entries: of the prompt list.
        out: the folder of the layout above.
        sampling: how videos are made; video `index` of every prompt has the seed `seed + index`.
        model: what the manifest calls the model.
        rewriter: what puts a prompt into more words for the model; the files keep its own.
        progress: called with (videos there, videos in all).
    """
    prompts = list(dict.fromkeys(entry["prompt_en"] for entry in entries))
    read = _rewritten(prompts, out, rewriter)
    wanted = [(prompt, index) for index in range(VIDEOS_PER_PROMPT) for prompt in prompts]
    paths = {job: out / "videos" / video_name(*job) for job in wanted}
    how = {"model": model, "guidance": sampling.guidance, "schedule": sampling.schedule}
    lines = [
        {
            "file": f"videos/{path.name}",
            "prompt": prompt,
            "read": read[prompt],
            "seed": sampling.seed + index,
            **how,
        }
        for (prompt, index), path in paths.items()
    ]
    _remove_others(out, lines)
    write_json(out / "manifest.json", {"videos": lines})
    write_json(out / "prompts.json", {path.name: prompt for (prompt, _), path in paths.items()})
    write_whole(out / "full_info.json", json.dumps(list(entries), indent=1) + "\n")
    missing = [job for job in wanted if not paths[job].is_file()]
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    for low in range(0, len(missing), BATCH):
        part = missing[low : low + BATCH]
        seeds = [sampling.seed + index for _prompt, index in part]
        videos = make_videos(loaded, [read[prompt] for prompt, _ in part], sampling, seeds=seeds)
        for job, frames in zip(part, videos, strict=True):
            write_whole(paths[job], encode_mp4(frames, loaded.facts.fps))
        done += len(part)
        progress(done, len(wanted))
    return [paths[job] for job in wanted]


def _rewritten(prompts: Sequence[str], out: Path, rewriter: Rewriter | None) -> dict[str, str]:
    """What the model reads of each prompt; rewritten once, and kept."""
    if rewriter is None:
        return {prompt: prompt for prompt in prompts}
    path = out / "rewritten.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for prompt in prompts:
        if prompt not in kept:
            kept[prompt] = rewriter(prompt)
            # After each: an endpoint may fail at the next.
            write_json(path, kept)
    return {prompt: kept[prompt] for prompt in prompts}


def _remove_others(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Remove the videos of an earlier manifest that were made in another way."""
    path = out / "manifest.json"
    earlier = json.loads(path.read_text())["videos"] if path.is_file() else []
    wanted = {line["file"]: line for line in lines}
    for line in earlier:
        if wanted.get(line["file"], line) != line:
            (out / line["file"]).unlink(missing_ok=True)


def run_vbench(out: Path, entries: Sequence[Mapping[str, Any]], reporter: Reporter) -> Path | None:
    """Score the videos where the package and its weights are; else say what to type.

    Returns:
        Its results, or None where it could not run here.

    Raises:
        VBenchError: it ran and failed.
    """
    dimensions = sorted({name for entry in entries for name in entry["dimension"]})
    cache = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
    for there, what in (
        (importlib.util.find_spec("vbench") is not None, "the package vbench"),
        (cache.is_dir(), f"its weights ({cache}, or VBENCH_CACHE_DIR)"),
    ):
        if not there:
            reporter.outcome(
                f"not scored: {what} is not here; where it is, run `vbench evaluate --videos_path "
                f"{out / 'videos'} --full_json_dir {out / 'full_info.json'} --dimension NAME`, "
                f"NAME one of {', '.join(dimensions)}"
            )
            return None
    arguments = [out / "full_info.json", out / "results", out / "videos", ",".join(dimensions)]
    command = [sys.executable, "-c", _SCORE, *map(str, arguments)]
    results = out / "results" / "flowreel_eval_results.json"
    # Those of an earlier run must not pass for this one's.
    results.unlink(missing_ok=True)
    ended = subprocess.run(command, check=False)
    if ended.returncode or not results.is_file():
        raise VBenchError(
            f"vbench ended with code {ended.returncode} and left no {results}; its own words are "
            "above. The videos are whole: mend it, and run again"
        )
    reporter.outcome(f"VBench: {results}")
    return results
