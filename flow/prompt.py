"""The prompt as a model reads it: the template, and the one function that fills it for a clip.

Training, serving, sampling and likelihood all call `prompt_for`, so that a clip reads alike
wherever it is met. Knows nothing of text encoders, torch or files.
"""

from __future__ import annotations

from flow.aspects import nearest_aspect
from flow.config import FlowConfig

EXTEND_PREFIX = "(extend) "
LAST_PREFIX = "(last) "
VIDEO_TO_VIDEO_PREFIX = "(v2v) "


def format_prompt(
    caption: str,
    *,
    fps: float | None = None,
    noise_std: float | None = None,
    aspect_ratio: str | None = None,
    prefix: str = "",
) -> str:
    r"""The prompt as the released models were trained to read it.

    Args:
        caption: what is to be seen; may be empty (the null prompt is the formatted empty caption).
        fps: frames per second; 0 says "image", None leaves the line out.
        noise_std: the flow's σ, said in thousandths; None leaves the line out.
        aspect_ratio: such as "16:9"; None leaves the line out.
        prefix: a task prefix, put before the caption.

    >>> format_prompt("a cat", fps=16, noise_std=0.5, aspect_ratio="1:1")
    'Noise Level 500:\nA video with 16 fps:\na cat\n\n in a 1:1 aspect ratio.\n'
    """
    text = prefix + caption
    if fps is not None:
        kind = "An image" if fps == 0 else f"A video with {fps:g} fps"
        text = f"{kind}:\n{text}\n"
    if noise_std is not None:
        text = f"Noise Level {round(noise_std * 1000)}:\n{text}"
    if aspect_ratio is not None:
        text = f"{text}\n in a {aspect_ratio} aspect ratio.\n"
    return text


CAPTION = "{caption}"
"""Stands for the caption in the form of a prompt."""


def fill_form(form: str, caption: str) -> str:
    r"""A prompt from its form, which is the prompt of the caption `CAPTION`.

    >>> fill_form(format_prompt(CAPTION, fps=0), "a {caption}")
    'An image:\na {caption}\n'
    """
    return form.replace(CAPTION, caption)


def prompt_for(
    caption: str,
    config: FlowConfig,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    prefix: str = "",
) -> str:
    """What a model of this configuration reads for one clip, in training and everywhere else.

    One frame is an image, whoever asks for it; a shape is called by the nearest of the names that
    the released models know.

    Args:
        num_frames: video frames of the whole clip; 1 is an image.
        height, width: pixels.
        fps: frames per second of the clip; not said of an image.
        prefix: a task prefix, such as `EXTEND_PREFIX`.
    """
    is_image = num_frames == 1 or not config.video
    return format_prompt(
        caption,
        fps=(0 if is_image else fps) if config.prompt_fps else None,
        noise_std=config.noise_std if config.prompt_noise else None,
        aspect_ratio=nearest_aspect(height, width) if config.prompt_aspect else None,
        prefix=prefix,
    )
