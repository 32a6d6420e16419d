"""What a look at one sample found, as words, as JSON and as a contact sheet.

Knows nothing of how it was found, and nothing of Ray, torch or the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from media.contact_sheet import AMBER, GREEN, RED, Strip, contact_sheet
from media.frames import Frames

_MOST_LETTERS = 400
"""Of what is shown; JSON has the whole."""
_MARKS = {"kept": GREEN, "dropped": AMBER, "failed": RED}


@dataclass(frozen=True)
class WindowLook:
    """One window of frames that was cut, and what became of it."""

    number: int
    window: list[int]
    """Places of its frames among those of the source, from 0."""
    pts_s: list[float]
    """Times of its frames in the source, in seconds."""
    status: str
    reason: str
    detail: str
    frames_digest: str
    """SHA-256, as it is stored beside the latents."""
    frames: Frames
    """uint8 [T, H, W, 3]: what the codec would encode."""


@dataclass(frozen=True)
class Look:
    """What preparation makes of one sample."""

    source: str
    shard: str
    key: str
    number: int
    """Its place in the shard, from 0."""
    status: str
    """`kept`, `dropped` (by a filter) or `failed` (bad input)."""
    reason: str
    detail: str
    remedy: str
    """What would keep it; empty where it is kept."""
    caption: str
    metadata: dict[str, Any]
    reader: str
    """`pyav` or `pillow`; empty where nothing could be opened."""
    reader_why: str
    facts: dict[str, Any]
    """What the container says; empty where nothing could be opened."""
    windows: tuple[WindowLook, ...] = ()
    overview: tuple[Frames, ...] = field(default=(), repr=False)
    """Some frames of a source from which no window was cut."""
    overview_s: tuple[float, ...] = ()
    """Their times in seconds."""
    same_key: int = 0
    """Later samples of the shard with the same key, which fail."""

    @property
    def has_pictures(self) -> bool:
        """Whether there is a frame to show."""
        return bool(self.windows or self.overview)

    def document(self) -> dict[str, Any]:
        """All but the pixels, as JSON holds it; `window` and `pts_s` are those of window 0."""
        windows = [
            {
                **{name: getattr(w, name) for name in ("number", "window", "pts_s")},
                **{name: getattr(w, name) for name in ("status", "reason", "detail")},
                "frames_digest": w.frames_digest,
                "shape": list(w.frames.shape),
            }
            for w in self.windows
        ]
        outcome = ("source", "shard", "key", "number", "status", "reason", "detail", "remedy")
        found = ("caption", "metadata", "reader", "reader_why", "facts")
        first = windows[0] if windows else {"window": [], "pts_s": []}
        return {
            **{name: getattr(self, name) for name in (*outcome, *found)},
            "window": first["window"],
            "pts_s": first["pts_s"],
            "windows": windows,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(name, words) of what a person wants to know, in order."""
        rows = [
            ("outcome", f"{self.status}: {self.reason}" if self.reason else self.status),
            ("why" if self.reason else "noted", self.detail),
            ("to keep it", self.remedy),
            ("container", _facts_in_words(self.facts)),
            ("reader", f"{self.reader or 'none'}: {self.reader_why}"),
            *((f"window {w.number}", _window_in_words(w)) for w in self.windows),
            ("caption", self.caption),
            ("same key", f"{self.same_key} more in this shard: duplicate_key, failed")
            if self.same_key
            else ("", ""),
        ]
        return [(name, _short(printable(words))) for name, words in rows if words]

    def sheet(self) -> Frames:
        """A contact sheet, uint8 [H, W, 3]: the outcome, the facts, every frame with its time."""
        outcome = f"{self.key}: {self.status}" + (f", {self.reason}" if self.reason else "")
        lines = [f"{name}: {words}" for name, words in self.rows()[1:]]
        strips = [
            Strip(
                f"window {w.number}, as the codec would get it"
                + (f": {w.status}, {w.reason}" if w.reason else ""),
                list(w.frames),
                [f"{time:.3f} s" for time in w.pts_s],
            )
            for w in self.windows
        ]
        if self.overview:
            labels = [f"{time:.3f} s" for time in self.overview_s]
            shown = "the source" if len(labels) > 1 else "the source's first frame"
            strips.append(Strip(f"{shown}: no window was cut from it", self.overview, labels))
        return contact_sheet(printable(outcome), lines, strips, _MARKS[self.status])


def _facts_in_words(facts: dict[str, Any]) -> str:
    """What the container says, with what is out of the ordinary last."""
    if not facts:
        return ""
    words = [facts["container"], facts.get("codec"), f"{facts['width']}×{facts['height']}"]
    if "frames" not in facts:
        return ", ".join([*(w for w in words if w), f"mode {facts['mode']}"])
    words += [f"{facts['frames']} frames in {facts['duration_s']:.3f} s"]
    if facts["rate"]:
        words.append(f"{round(facts['rate'][0] / facts['rate'][1], 3):g} frames a second")
    if (facts["coded_width"], facts["coded_height"]) != (facts["width"], facts["height"]):
        words.append(f"stored as {facts['coded_width']}×{facts['coded_height']}")
    if facts["orientation"] != "upright":
        words.append(f"shown {facts['orientation']}")
    if facts["transfer"] != "sdr":
        words.append(f"HDR ({facts['transfer']})")
    if facts["interlaced"]:
        words.append("interlaced")
    if facts["video_streams"] > 1:
        words.append(f"the largest of {facts['video_streams']} video streams")
    if facts["hidden_packets"]:
        words.append(f"{facts['hidden_packets']} frames hidden by an edit list")
    if facts["packets_before_keyframe"]:
        words.append(f"{facts['packets_before_keyframe']} frames before its first keyframe")
    return ", ".join(words)


def _window_in_words(look: WindowLook) -> str:
    count, (height, width) = len(look.window), look.frames.shape[1:3]
    text = f"{count} frames of {width}×{height}: source frames {look.window[0]} to "
    text += f"{look.window[-1]}, {look.pts_s[0]:.3f} s to {look.pts_s[-1]:.3f} s"
    return text + (f"; {look.status}: {look.reason}, {look.detail}" if look.reason else "")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"


def printable(text: str) -> str:
    r"""Text on one line, as it may be shown: what would steer a terminal is spelled out.

    >>> printable("red \x1b[31m\nline")
    'red \\x1b[31m\\nline'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
