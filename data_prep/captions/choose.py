"""The back end of a recipe's captioner.

A back end is imported when it is asked for, because two of them are heavy. Knows nothing of how
captions are written.
"""

from __future__ import annotations

from data_prep.captions.captioner import Captioner, CaptionerUnavailable
from data_prep.captions.config import CaptionConfig


def build_captioner(
    config: CaptionConfig, device: str = "cpu", *, seed: int = 0, fps: float = 16.0
) -> Captioner:
    """The captioner of a recipe.

    `vllm` is not built here: it is a stage of Ray Data's own (`data_prep.captions.on_ray`).

    >>> build_captioner(CaptionConfig(backend="measured")).name
    'measured'

    Args:
        config: the settings.
        device: torch device of a `vlm`.
        seed: the run's seed, which is sent to an endpoint.
        fps: frames per second of the clips, for `measured`, which tells speeds.

    Raises:
        CaptionerUnavailable: the model cannot be loaded, or the key is not there.
    """
    if config.backend == "none":
        from data_prep.captions.none import NoCaptioner

        return NoCaptioner()
    if config.backend in ("auto", "measured"):
        from data_prep.captions.measured import MeasuredCaptioner

        return MeasuredCaptioner(fps)
    if config.backend == "vlm":
        from data_prep.captions.vlm import VlmCaptioner

        return VlmCaptioner(config, device)
    if config.backend == "http":
        from data_prep.captions.http import HttpCaptioner

        return HttpCaptioner(config, seed=seed)
    raise CaptionerUnavailable(
        f"captioner.backend {config.backend!r} runs on Ray Data only; here use vlm or http"
    )
