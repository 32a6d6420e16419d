"""The prompt as a model reads it. Knows the template; nothing of text encoders, torch or files."""

from __future__ import annotations

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
