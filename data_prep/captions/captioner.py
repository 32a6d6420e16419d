"""What a captioner is: clips in, one caption or one named failure a clip out.

A clip is shown as a few of its frames, as images, so that no model needs a video processor. Knows
nothing of Ray or of the back ends.

    CaptionError(FlowreelError, ValueError)
    ├── CaptionerUnavailable   no caption can be had: the run stops and can be resumed
    └── CaptionerUnfit         the captioner is not made for these videos: the run does not begin
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from data_prep.captions.config import CaptionConfig
from flowreel.errors import FlowreelError
from media.frames import Frames

MAX_CAPTION_CHARS = 4000
MAX_ERROR_CHARS = 300


class CaptionError(FlowreelError, ValueError):
    """Captions cannot be written."""


class CaptionerUnavailable(CaptionError):
    """The captioner cannot work at all, as opposed to failing on one clip."""


class CaptionerUnfit(CaptionError):
    """The captioner is not made for videos of this kind."""


class CaptionResult(NamedTuple):
    """What a captioner made of one clip: a caption, or why there is none."""

    text: str
    error: str = ""
    """`code: detail`; empty where there is a caption."""

    @classmethod
    def failed(cls, code: str, detail: str) -> CaptionResult:
        """No caption, with the reason; addresses are cut out, because they differ between runs."""
        steady = re.sub(r" ?\b0x[0-9a-f]+", "", " ".join(detail.split()))
        return cls("", f"{code}: {steady}"[:MAX_ERROR_CHARS])

    @classmethod
    def of(cls, text: str) -> CaptionResult:
        """A model's words as a caption: one line of bounded length, without control characters.

        >>> CaptionResult.of(" A car\\n on a road. ").text
        'A car on a road.'
        >>> CaptionResult.of(" ").error
        'empty_caption: the model wrote nothing'
        """
        text = text.encode("utf-8", "replace").decode()
        plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        if not plain:
            return cls.failed("empty_caption", "the model wrote nothing")
        return cls(plain[:MAX_CAPTION_CHARS])


class Captioner(Protocol):
    """Writes the synthetic captions of clips."""

    name: str
    """By which the captions are signed."""

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """One result for each clip of uint8 frames [T, H, W, 3], in order.

        A clip's result depends on its frames and the settings, never on the others.

        Raises:
            CaptionerUnavailable: no clip can be captioned.
        """
        ...

    def close(self) -> None:
        """Let go of what the captioner holds, such as connections."""
        ...


def captioner_name(config: CaptionConfig) -> str:
    """How captions are signed: the back end, and its model without the path to it.

    >>> captioner_name(CaptionConfig(backend="vlm", model="owner/model"))
    'vlm:owner/model'
    """
    if not config.model:
        return config.backend
    folder = Path(config.model)
    return f"{config.backend}:{folder.name if folder.is_dir() else config.model}"


def shown_frames(num_frames: int, count: int) -> list[int]:
    """Indices of the frames that stand for a clip, evenly spaced, first and last among them.

    >>> shown_frames(17, 4), shown_frames(1, 4), shown_frames(9, 1)
    ([0, 5, 11, 16], [0], [4])
    """
    if count >= num_frames:
        return list(range(num_frames))
    if count == 1:
        return [num_frames // 2]
    return [round(i * (num_frames - 1) / (count - 1)) for i in range(count)]


def shown_images(frames: Frames, count: int) -> list[Image.Image]:
    """The frames that stand for a clip, as RGB pictures."""
    return [Image.fromarray(frames[i]) for i in shown_frames(len(frames), count)]


def question(config: CaptionConfig, num_frames: int) -> str:
    """What is asked about a clip of so many frames."""
    return config.image_prompt if num_frames == 1 else config.prompt


def chat_messages(config: CaptionConfig, num_frames: int) -> list[dict[str, Any]]:
    """The conversation that a chat template renders: places for the images, then the question."""
    images = [{"type": "image"} for _ in shown_frames(num_frames, config.frames)]
    content = [*images, {"type": "text", "text": question(config, num_frames)}]
    return [{"role": "user", "content": content}]
