"""An evaluation as a page: tables, plots, and videos, real beside generated.

Every picture and video is in the page itself, so that it opens without a server and can be sent to
somebody. Measures nothing. Knows nothing of Ray or models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from media.frames import Frames
from media.write import encode_mp4
from pipeline.evaluation.prompt_following import PromptFollowing
from pipeline.evaluation.result import Evaluation, Shown, ShownClip
from pipeline.evaluation.tables import about_lines, tables

INK, PALE, DEEP, WARM = "#1d2733", "#8a97a6", "#2f6fde", "#e2842c"
LONG_FRAMES = 241
"""Of a long video, frames that the page shows at most, spread evenly over it."""


def page(evaluation: Evaluation, shown: Shown) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "assets"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "j2"]),
    )
    return environment.get_template("evaluation.html.j2").render(
        about=about_lines(evaluation.about),
        tables=tables(evaluation),
        plots=plots(evaluation),
        splits=_splits(shown),
        long_video=_long_video(shown),
    )


def _splits(shown: Shown) -> list[dict[str, Any]]:
    """The clips, seen combinations apart from unseen ones."""
    names = {"seen": "Combinations of words that were trained on", "unseen": "Unseen combinations"}
    return [
        {"name": name, "clips": [_clip(clip, shown.fps) for clip in clips]}
        for split, name in names.items()
        if (clips := [clip for clip in shown.clips if clip.split == split])
    ]


def _clip(clip: ShownClip, fps: float) -> dict[str, Any]:
    videos = [("generated", clip.made), ("real", clip.real)]
    if clip.back is not None:
        videos.append(("real, after the codec", clip.back))
    return {
        "prompt": clip.prompt,
        "read": clip.read,
        "videos": [{"kind": kind, "uri": _video_uri(frames, fps)} for kind, frames in videos],
    }


def _long_video(shown: Shown) -> dict[str, Any] | None:
    if shown.long_video is None:
        return None
    count = len(shown.long_video)
    step = max(1, -(-count // LONG_FRAMES))
    uri = _video_uri(shown.long_video[::step], shown.fps)
    faster = f", {step} times as fast" if step > 1 else ""
    return {"uri": uri, "words": f"{count / shown.fps:.0f} seconds{faster}"}


def _video_uri(frames: Frames, fps: float) -> str:
    data = base64.b64encode(encode_mp4(frames, fps)).decode()
    return f"data:video/mp4;base64,{data}"


def plots(evaluation: Evaluation) -> dict[str, str]:
    """SVG pictures by the title of the table that they stand under."""
    found = {}
    if evaluation.prompts is not None:
        found["Prompt following"] = _bars(evaluation.prompts)
    if evaluation.codec is not None:
        of = {f"{q.frames} frames": q.psnr_db_by_frame for q in evaluation.codec.values()}
        found["Codec"] = _lines(of, "frame", "PSNR, dB")
    if evaluation.drift is not None:
        nats = {"own nats per dimension": evaluation.drift.nats_per_dim_by_frame}
        found["Drift"] = _lines(nats, "latent frame", "nats per dimension")
    return found


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: it takes the page's own font, and can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bars(prompts: PromptFollowing) -> str:
    """A group of bars for each attribute, chance as a line across it."""
    figure, axes = _axes(8, 2.8)
    sets = {
        "seen": (prompts.seen, DEEP),
        "unseen": (prompts.unseen, WARM),
        "real clips after the codec": (prompts.codec, PALE),
    }
    attributes = [name for name, chance in prompts.chance.items() if chance < 1]
    for number, (name, (shares, colour)) in enumerate(sets.items()):
        at = [i + 0.26 * (number - 1) for i, a in enumerate(attributes) if a in shares]
        of = [shares[a] for a in attributes if a in shares]
        values = [share.value for share in of]
        ends = [[s.value - s.low for s in of], [s.high - s.value for s in of]]
        axes.bar(at, values, width=0.24, color=colour, label=name)
        axes.errorbar(at, values, yerr=ends, fmt="none", ecolor=INK, elinewidth=0.8)
    for i, attribute in enumerate(attributes):
        label = "chance" if i == 0 else None
        chance = prompts.chance[attribute]
        axes.hlines(chance, i - 0.42, i + 0.42, color=INK, linestyle=":", label=label)
    axes.set_xticks(range(len(attributes)), attributes)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share right")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=4, fontsize=9)
    return _svg(figure)


def _lines(series: Mapping[str, Sequence[float]], below: str, beside: str) -> str:
    figure, axes = _axes(8, 2.4)
    for colour, (name, values) in zip((DEEP, WARM), series.items(), strict=False):
        axes.plot(range(len(values)), values, color=colour, linewidth=1.4, label=name)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=3, fontsize=9)
    return _svg(figure)
