"""`flowreel look`: what preparation makes of one input, as words, a contact sheet, frames or JSON.

Knows nothing of how a sample is judged, and nothing of Ray or torch.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np

from data_prep.look import keys_in, look_at
from data_prep.look_record import Look, printable
from data_prep.sources.one_sample import is_shard
from flow.codec_factors import read_factors
from flowreel.files import write_whole
from media.write import encode_png
from pipeline.console import Reporter
from pipeline.recipes import Recipe

_KEYS_SHOWN = 20


def look(
    source: str,
    key: str | None,
    recipe: Recipe,
    reporter: Reporter,
    *,
    sheet: Path | None = None,
    frames: Path | None = None,
) -> None:
    """Say what a run of this recipe makes of a sample; of a shard without a key, say its keys.

    Args:
        source: a video, an image, or a shard.
        key: the sample's key in the shard.
        recipe: the settings.
        reporter: through which it is said.
        sheet: the contact sheet to write; by default `look-KEY.png` in this folder, unless JSON or
            `frames` is wanted.
        frames: file for the frames, uint8 [T, H, W, 3] in NumPy's format; a second window goes
            into NAME-1.npy, and so on.

    Raises:
        FlowreelError: what is wrong with the input, the settings or the codec.
    """
    if key is None and is_shard(source):
        _say_keys(source, recipe, reporter)
        return
    found = look_at(source, key, recipe.prepare, read_factors(recipe.codec_source))
    title = f"{source} {key}" if key else source
    reporter.table(printable(title), ["", ""], [list(row) for row in found.rows()], left=True)
    if sheet is None and frames is None and not reporter.as_json:
        if found.has_pictures:
            sheet = Path(sheet_name(found.key))
        else:
            reporter.outcome("no contact sheet: no frame can be shown")
    if sheet is not None:
        write_whole(sheet, encode_png(found.sheet()))
        reporter.outcome(f"contact sheet  {sheet}")
    paths = _write_frames(found, frames, reporter) if frames is not None else []
    reporter.document({**found.document(), "sheet": sheet, "frames": paths})


def sheet_name(key: str) -> str:
    """The file name of a sample's contact sheet.

    >>> sheet_name("clips/a b"), sheet_name("../x")
    ('look-clips_a_b.png', 'look-.._x.png')
    """
    plain = re.sub(r"[^\w.-]", "_", key)
    return f"look-{plain[:100]}.png"


def _say_keys(source: str, recipe: Recipe, reporter: Reporter) -> None:
    samples = keys_in(source, recipe.prepare.source)
    shown = [
        [printable(key), ", ".join(suffixes), f"{size_bytes:,}"]
        for key, suffixes, size_bytes in samples[:_KEYS_SHOWN]
    ]
    reporter.table(f"{source}: {len(samples)} samples", ["key", "files", "bytes"], shown)
    if len(samples) > len(shown):
        reporter.outcome(f"and {len(samples) - len(shown)} more; --json lists all")
    reporter.outcome(f"look at one: flowreel look {source} {printable(samples[0][0])}")
    document = [
        {"key": key, "files": suffixes, "bytes": size_bytes}
        for key, suffixes, size_bytes in samples
    ]
    reporter.document({"source": source, "samples": document})


def _write_frames(found: Look, path: Path, reporter: Reporter) -> list[Path]:
    """One file for each window; none where no window was cut."""
    paths: list[Path] = []
    for window in found.windows:
        number = len(paths)
        own = path if not number else path.with_name(f"{path.stem}-{number}{path.suffix}")
        file = io.BytesIO()
        np.save(file, window.frames)
        write_whole(own, file.getvalue())
        shape = "×".join(str(side) for side in window.frames.shape)
        reporter.outcome(f"frames {shape}  {own}")
        paths.append(own)
    if not paths:
        reporter.outcome(f"no window was cut, so {path} is not written")
    return paths
