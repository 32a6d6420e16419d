"""The report of a run: contact sheet, loss curve, a request's timeline, and a page with all of it.

Reads what the stages left (`summary.json`, histories, videos) and draws; it measures nothing
itself. The page embeds every picture and video, so that it opens without a server and can be sent
to somebody. Knows nothing of Ray or models.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from flowreel.files import write_whole
from media.frames import Frames
from pipeline.tables import JUDGED

INK, PALE, DEEP, DECODE = "#1d2733", "#8a97a6", "#2f6fde", "#e2842c"


@dataclass(frozen=True)
class Sample:
    """A video of the report: its prompt, how it came about, its file, its frames [T, H, W, 3]."""

    prompt: str
    kind: str
    path: Path
    frames: Frames


def contact_sheet(samples: list[Sample], columns: int = 6, scale: int = 2) -> Image.Image:
    """Frames from left to right in time, a video per row, its prompt above it."""
    height, width = samples[0].frames.shape[1:3]
    cell_h, cell_w, label = height * scale, width * scale, 20
    sheet = Image.new(
        "RGB", (columns * (cell_w + 4) + 4, len(samples) * (cell_h + label + 6) + 4), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, sample in enumerate(samples):
        top = 4 + row * (cell_h + label + 6)
        draw.text((6, top), f"{sample.kind}: {sample.prompt}", fill=INK, font=font)
        picks = np.linspace(0, len(sample.frames) - 1, columns).round().astype(int)
        for column, index in enumerate(picks):
            picture = Image.fromarray(sample.frames[index]).resize(
                (cell_w, cell_h), Image.Resampling.BICUBIC
            )
            sheet.paste(picture, (4 + column * (cell_w + 4), top + label))
    return sheet


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "axes.edgecolor": PALE, "text.color": INK, "svg.fonttype": "none"}
    )
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _smooth(values: list[float], window: int) -> npt.NDArray[np.float64]:
    """Running median: one bad step does not draw a spike that hides the curve."""
    array = np.asarray(values, dtype=np.float64)
    return np.array([np.median(array[max(0, i - window + 1) : i + 1]) for i in range(len(array))])


def loss_curve(history: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """SVG of training loss per step, with noise floor, Gaussian baseline and held-out mean.

    These are the noise floor ½ + ln σ, the best Gaussian and the held-out mean. Steps whose loss
    was not finite are left out.
    """
    history = [h for h in history if h["loss_nats_per_dim"] is not None]
    figure, axes = _axes(8, 3.4)
    for mode, colour in (("video", DEEP), ("image", DECODE)):
        points = [(h["step"], h["loss_nats_per_dim"]) for h in history if h["mode"] == mode]
        if points:
            steps, values = [p[0] for p in points], [p[1] for p in points]
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            axes.plot(
                steps, _smooth(values, 15), color=colour, linewidth=1.6, label=f"{mode} steps"
            )
    lines = (
        ("noise_floor_nats_per_dim", "floor ½ + ln σ", ":"),
        ("gaussian_nats_per_dim", "best Gaussian", "--"),
        ("held_out_nats_per_dim", "held out", "-"),
    )
    for key, label, style in lines:
        if summary.get(key) is not None:
            axes.axhline(
                summary[key],
                color=INK,
                linestyle=style,
                linewidth=1,
                label=f"{label} {summary[key]:.3f}",
            )
    losses = [h["loss_nats_per_dim"] for h in history]
    if losses:
        low = min([summary.get("noise_floor_nats_per_dim", min(losses)), *losses])
        axes.set_ylim(low - 0.1, float(np.quantile(losses, 0.98)) + 0.3)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per dimension")
    # Above the axes: inside, a line would cross its words sooner or later.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=3, fontsize=9)
    return _svg(figure)


def timeline(spans: list[dict[str, Any]]) -> str:
    """SVG of one request: a bar per recorded span, deep block above frame decoder."""
    figure, axes = _axes(8, 1.9)
    start = min(span["start_s"] for span in spans)
    for lane, (name, colour) in enumerate((("decode", DECODE), ("deep", DEEP))):
        for span in (s for s in spans if s["name"] == name):
            left, width = (span["start_s"] - start) * 1e3, (span["end_s"] - span["start_s"]) * 1e3
            axes.barh(lane, width, left=left, height=0.62, color=colour, edgecolor="white")
            axes.text(
                left + width / 2,
                lane,
                str(span["frame"]),
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
    pids = {
        name: next((s["pid"] for s in spans if s["name"] == name), "?")
        for name in ("decode", "deep")
    }
    axes.set_yticks(
        [0, 1], [f"frame decoder\npid {pids['decode']}", f"deep block\npid {pids['deep']}"]
    )
    axes.set_xlabel("milliseconds since the request's first span")
    return _svg(figure)


def data_uri(path: Path) -> str:
    """The file as a `data:` URI."""
    kinds = {".mp4": "video/mp4", ".png": "image/png"}
    return f"data:{kinds[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(
    out: Path,
    *,
    title: str,
    summary: dict[str, Any],
    samples: list[Sample],
    history: list[dict[str, Any]],
    spans: list[dict[str, Any]],
    statuses: dict[str, int],
) -> Path:
    """Write `contact_sheet.png` and `report.html` into `out`; returns the page's path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    contact_sheet(samples).save(out / "contact_sheet.png")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "j2"]),
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        judged=JUDGED,
        samples=[
            {
                "prompt": s.prompt,
                "kind": s.kind,
                "uri": data_uri(s.path),
                "name": s.path.name,
                "frames": len(s.frames),
            }
            for s in samples
        ],
        loss_svg=loss_curve(history, summary),
        timeline_svg=timeline(spans) if spans else "",
        statuses=statuses,
    )
    path = out / "report.html"
    write_whole(path, page)
    return path
