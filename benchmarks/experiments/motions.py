"""Which kinds of motion does the model fail at.

    python -m benchmarks.experiments.motions [--model FOLDER]

As many prompts for each motion, of seen combinations; the judge reads colour, shape and motion from
the videos, and from real clips after the codec. What it takes a failed motion for stands beside.

Knows prompts and the judge. Knows nothing of training.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.experiments.page import SEED, Subject, run, save_plot, table
from data_prep.world.judge import judge
from pipeline.evaluation import scenes
from pipeline.evaluation.codec_quality import round_trip
from pipeline.evaluation.prompt_following import shares
from pipeline.evaluation.samples import Sampling, make_videos

PROMPTS = 24
"""For each motion."""


def experiment(subject: Subject, pages: Path) -> str:
    """The table and the plot."""
    from dataclasses import replace

    from matplotlib import pyplot

    loaded, kinds = subject.loaded, subject.recipe.world.kinds
    assert loaded.codec is not None
    rows, values = [], {}
    for motion in kinds.motions:
        alone = replace(kinds, motions=(motion,))
        asked = scenes.asked(PROMPTS, "seen", SEED, alone, loaded.facts)
        made = make_videos(loaded, asked.texts, Sampling(subject.guidance, seed=SEED))
        read = [judge(clip, fps=loaded.facts.fps) for clip in made]
        back = round_trip(loaded.codec, asked.real_NTHWC)
        ceiling = shares(asked.prompts, [judge(clip, fps=loaded.facts.fps) for clip in back])
        found = shares(asked.prompts, read)
        wrong = Counter(str(r.motion or "unsure") for r in read if r.motion != motion)
        values[motion] = found["motion"].value
        rows.append(
            [
                motion, f"{found['motion'].value:.2f}", f"{ceiling['motion'].value:.2f}",
                f"{found['colour'].value:.2f}", f"{found['shape'].value:.2f}",
                ", ".join(f"{word} {count}" for word, count in wrong.most_common(3)),
            ]
        )  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    axis.bar(list(values), list(values.values()))
    axis.axhline(1 / len(values), color="grey", linestyle=":", label="chance")
    axis.set_ylabel("motions read right")
    axis.tick_params(axis="x", rotation=30)
    axis.legend()
    columns = ["motion", "read right", "after the codec", "colour", "shape", "taken for"]
    about = f"{PROMPTS} prompts a motion, guidance {subject.guidance:g}."
    return f"{table(columns, rows)}\n\n{about}\n\n{save_plot(figure, 'motions', pages)}"


if __name__ == "__main__":
    run(experiment, "motions", __doc__ or "")
