"""The captioner that writes nothing: training then reads the original captions.

Knows nothing of Ray or files.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.captions.captioner import CaptionResult
from media.frames import Frames


class NoCaptioner:
    """Says of every clip that no synthetic caption is wanted.

    >>> import numpy as np
    >>> NoCaptioner().caption_all([np.zeros((5, 32, 32, 3), np.uint8)])[0].error
    'no_captioner: captioner.backend is none'
    """

    name = "none"

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """No caption for any clip."""
        return [CaptionResult.failed("no_captioner", "captioner.backend is none") for _ in clips]

    def close(self) -> None:
        """Do nothing: it holds nothing."""
