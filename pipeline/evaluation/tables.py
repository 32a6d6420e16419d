"""An evaluation as tables: the same ones for the terminal, for Markdown and for the page.

Takes what was measured. Measures nothing. Knows nothing of Ray or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.console import Reporter
from pipeline.evaluation.codec_quality import CodecQuality
from pipeline.evaluation.distances import Distance
from pipeline.evaluation.drift import Drift
from pipeline.evaluation.fidelity import Fidelity
from pipeline.evaluation.nats import Nats
from pipeline.evaluation.physics import Physics
from pipeline.evaluation.prompt_following import PromptFollowing, Share, Shares
from pipeline.evaluation.result import About, Evaluation
from pipeline.evaluation.steadiness import Steadiness


@dataclass(frozen=True)
class Table:
    """A family of figures as a person reads them; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, under a heading.

        >>> print(Table("a", ("b", "c"), (("d", "1"),), "Of e.").markdown())
        ## a
        <BLANKLINE>
        Of e.
        <BLANKLINE>
        | b | c |
        | --- | ---: |
        | d | 1 |
        """
        marks = ["---", *("---:" for _ in self.columns[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, marks, *self.rows)]
        return "\n".join([f"## {self.title}", "", *([self.note, ""] if self.note else []), *lines])


def tables(evaluation: Evaluation) -> list[Table]:
    """A table for each family that was measured."""
    return [*_tables(evaluation)]


def say(evaluation: Evaluation, reporter: Reporter) -> None:
    """Print every table."""
    for table in tables(evaluation):
        rows = [list(row) for row in table.rows]
        title = f"{table.title}: {table.note}" if table.note else table.title
        reporter.table(title, list(table.columns), rows)
    took = ", ".join(f"{name} {s:.0f}" for name, s in evaluation.about.seconds.items())
    reporter.say(f"seconds: {took}")


def markdown(evaluation: Evaluation) -> str:
    """All tables as one page of Markdown."""
    parts = ["# Evaluation", *(f"- {line}" for line in about_lines(evaluation.about))]
    head = "\n".join([parts[0], "", *parts[1:]])
    return "\n\n".join([head, *(table.markdown() for table in tables(evaluation))]) + "\n"


def about_lines(about: About) -> list[str]:
    """How it was measured, a line each."""
    clips = f"held-out clips of {about.data}" if about.data else "scenes rendered for this"
    return [
        f"model {about.model}: {about.size}, {about.parameters / 1e6:.2f}M parameters",
        f"{about.prompts} prompts of seen combinations and as many of unseen ones; likelihood on "
        f"{clips}",
        f"guidance {about.guidance:g}, schedule {about.schedule}, denoiser {about.denoiser}, seed "
        f"{about.seed}",
        f"{sum(about.seconds.values()):.0f} seconds",
    ]


def _tables(evaluation: Evaluation) -> Iterator[Table]:
    if evaluation.nats is not None:
        yield _of_nats(evaluation.nats)
    if evaluation.prompts is not None:
        yield _of_prompts(evaluation.prompts)
    if evaluation.sampler is not None:
        yield _of_sampler(evaluation.sampler)
    if evaluation.codec is not None:
        yield _of_codec(evaluation.codec)
    if evaluation.distances is not None:
        yield _of_distances(evaluation.distances)
    if evaluation.steadiness is not None:
        yield _of_steadiness(evaluation.steadiness)
    if evaluation.physics is not None:
        yield _of_physics(evaluation.physics)
    if evaluation.drift is not None:
        yield _of_drift(evaluation.drift)


def _of_nats(nats: Nats) -> Table:
    floor = f"{nats.noise_floor_nats_per_dim:.4f}"
    rows = [
        (
            bucket,
            str(of.clips),
            f"{of.held_out_nats_per_dim:.4f} ± {of.held_out_stderr:.4f}",
            f"{of.shuffled_caption_nats_per_dim:.4f}",
            f"{of.gaussian_nats_per_dim:.4f}",
            floor,
        )
        for bucket, of in nats.buckets.items()
    ]
    columns = (
        "bucket",
        "clips",
        "held out",
        "captions shuffled",
        "best Gaussian",
        "floor ½ + ln σ",
    )
    note = (
        f"nats per dimension without ½ ln 2π, {nats.noise_draws} noise draws, floor ½ + ln σ; with "
        f"½ ln 2π {nats.held_out_nll_bits_per_dim:.4f} bits per dimension"
    )
    return Table("Likelihood", columns, tuple(rows), note)


def _of_prompts(prompts: PromptFollowing) -> Table:
    def said(shares: Shares, attribute: str) -> str:
        return _share(shares[attribute]) if attribute in shares else "–"

    rows = [
        (
            attribute,
            said(prompts.seen, attribute),
            said(prompts.unseen, attribute),
            _unsure(attribute, prompts.seen, prompts.unseen),
            _percent(chance),
            said(prompts.real, attribute),
            said(prompts.codec, attribute),
        )
        for attribute, chance in prompts.chance.items()
        if chance < 1
    ]
    columns = ("read back", "seen", "unseen", "not sure", "chance", "real clips", "after codec")
    note = "share right, Wilson's 95% interval; where the judge is not sure, it counts as wrong"
    return Table("Prompt following", columns, tuple(rows), note)


def _of_sampler(found: Fidelity) -> Table:
    rows = (
        ("relative rms error, deep block", f"{found.deep_relative_rms:.2e}"),
        ("relative rms error, latents", f"{found.latent_relative_rms:.2e}"),
        ("certificate: largest |r|", f"{found.certificate_max_abs:.2e}"),
        ("certificate: |r| p99.9", f"{found.certificate_p999_abs:.2e}"),
        ("largest |r| of sequential", f"{found.sequential_certificate_max_abs:.2e}"),
        ("evaluations per token", f"{found.evaluations_per_token:.1f}"),
        ("times as fast as sequential", f"{found.speedup:.2f}"),
    )
    note = f"{found.schedule} against sequential, {found.videos} videos of the same noise"
    return Table("Sampler", ("", "value"), rows, note)


def _of_codec(found: Mapping[str, CodecQuality]) -> Table:
    rows = [
        (
            f"{of.clips} clips of {of.frames} frames",
            f"{of.psnr_db:.2f}",
            f"{of.psnr_db_by_frame[0]:.2f}",
            f"{min(of.psnr_db_by_frame):.2f}",
            f"{of.psnr_db_change:+.2f}",
            f"{of.ssim:.3f}",
        )
        for of in found.values()
    ]
    columns = ("", "PSNR dB", "first frame", "worst frame", "last quarter - first", "SSIM")
    return Table("Codec", columns, tuple(rows), "encode, decode, against the clip itself")


def _of_distances(found: Mapping[str, Distance]) -> Table:
    names = {
        "latent_frechet": "Fréchet, codec latents",
        "latent_sliced_wasserstein": "sliced Wasserstein, codec latents",
        "efficientnet_lite0_frechet": "Fréchet, EfficientNet-Lite0 features",
    }
    rows = [
        (
            names[name],
            f"{of.generated:.3f}",
            f"{of.codec:.3f}",
            f"{of.real:.3f}",
            f"{of.vectors} of {of.dimensions}",
        )
        for name, of in found.items()
    ]
    columns = ("distance to other real clips", "generated", "after the codec", "real", "vectors")
    note = "what a perfect model would have stands under real; single pictures, so no FVD"
    return Table("Distances", columns, tuple(rows), note)


def _of_steadiness(found: Mapping[str, Steadiness]) -> Table:
    rows = [
        (_WHOSE[name], f"{of.flicker:.2f}", f"{of.warp_error:.2f}") for name, of in found.items()
    ]
    columns = ("grey levels of 255", "flicker", "flow-warp error")
    return Table("Steadiness", columns, tuple(rows))


_WHOSE = {"generated": "generated", "codec": "after the codec", "real": "real"}


def _of_physics(found: Mapping[str, Physics]) -> Table:
    rows = []
    for name, of in found.items():
        turn, bar = of.bounce, of.occluder
        rows.append(
            (
                _WHOSE[name],
                _percent(turn.turned) if turn else "–",
                _number(turn.momentum_ratio) if turn else "–",
                _percent(bar.came_out) if bar else "–",
                _number(bar.place_error) if bar else "–",
            )
        )
    columns = ("", "turn round", "momentum after : before", "come out from behind a bar", "off by")
    note = "an elastic bounce has 1; off by is from a straight way, in lengths of the smaller side"
    return Table("Physics", columns, tuple(rows), note)


def _of_drift(found: Drift) -> Table:
    rows = [
        (
            f"{window.end_s:.0f} s" if number else f"first {window.end_s:.1f} s",
            f"{window.look.colour:.0f} ({_number(window.colour_ratio)})",
            f"{window.look.sharpness:.2f} ({_number(window.sharpness_ratio)})",
            f"{window.look.background:.0f} ({_number(window.background_ratio)})",
            f"{window.nats_per_dim:.3f} ({_number(window.excess_nats_ratio)})",
        )
        for number, window in enumerate(found.windows)
    ]
    columns = ("until", "colour", "sharpness", "background", "own nats/dim")
    note = f"“{found.prompt}”, value (ratio to the first window; of nats, what is above the floor)"
    if found.worst_to_20x is not None:
        note += f"; within 20 times the trained length at most {_percent(found.worst_to_20x)} off"
    return Table("Drift", columns, tuple(rows), note)


def _share(share: Share) -> str:
    return f"{_percent(share.value)} ({100 * share.low:.0f}–{100 * share.high:.0f})"


def _unsure(attribute: str, *sets: Shares) -> str:
    """How often the judge was not sure of the videos of all sets."""
    found = [shares[attribute] for shares in sets if attribute in shares]
    return _percent(sum(share.unsure for share in found) / sum(share.count for share in found))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f}%"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"
