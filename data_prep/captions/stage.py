"""The captioning stage: frames → synthetic caption. The original caption stays beside it.

Knows nothing of the back ends, or of Ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from data_prep.captions.captioner import CaptionerUnavailable, CaptionResult
from data_prep.captions.choose import build_captioner
from data_prep.captions.fitness import refusal
from data_prep.config import PrepareConfig
from data_prep.row import Row, frames_of, is_final, join_windows, split_windows, wants_caption
from media.frames import Frames

log = logging.getLogger("flowreel.prepare")


class CaptionStage:
    """Frames → synthetic caption.

    A clip that cannot be captioned goes on without a caption, and its error is recorded; a later
    `--only captions` tries it again. If many in a row fail, it is not the clips: the run stops.

    >>> from data_prep.captions.config import CaptionConfig
    >>> stage = CaptionStage(PrepareConfig(captioner=CaptionConfig(backend="measured")))
    >>> black = {"frames": bytes(5 * 32 * 32 * 3), "frames_shape": [5, 32, 32, 3]}
    >>> row = {"status": "", "number": 0, "synthetic": None, "metadata": "{}", **black}
    >>> row = stage.process(row)
    >>> row["synthetic"], row["captioner"], row["caption_error"]
    ('', 'measured', 'not_moving_shapes: captioner measured writes of moving shapes only')
    """

    def __init__(self, config: PrepareConfig, device: str = "cpu") -> None:
        self.config = config.captioner
        self.captioner = build_captioner(
            config.captioner, device, seed=config.seed, fps=config.bucket.fps
        )
        self.give_up_after = config.captioner.give_up_after
        self.failures_in_a_row = 0

    def process(self, row: Row) -> Row:
        """Fill in `synthetic`, who wrote it, and `caption_error`. Raises as `process_all`."""
        return self.process_all([row])[0]

    def process_all(self, rows: Sequence[Row]) -> list[Row]:
        """The same for several rows at once; decided and closing rows pass through.

        Raises:
            CaptionerUnavailable: `give_up_after` clips in a row got no caption.
        """
        samples = [split_windows(row) for row in rows]
        samples = [[self._unless_refused(part) for part in parts] for parts in samples]
        without = [part for parts in samples for part in parts if wants_caption(part)]
        captions = iter(self._captions([frames_of(part) for part in without]))
        rows_after = []
        for parts in samples:
            for place, part in enumerate(parts):
                if wants_caption(part):
                    parts[place] = with_caption(part, next(captions), self.captioner.name)
                    self._count(parts[place])
            rows_after.append(join_windows(parts))
        return rows_after

    def close(self) -> None:
        """Close the captioner."""
        self.captioner.close()

    def _captions(self, clips: list[Frames]) -> list[CaptionResult]:
        """One result a clip; if a call breaks, each of its clips is tried alone."""
        try:
            return self.captioner.caption_all(clips) if clips else []
        except CaptionerUnavailable:
            raise
        except Exception as error:  # one clip must not take its neighbours with it
            log.warning("%s failed on %d clips", self.captioner.name, len(clips), exc_info=True)
            if len(clips) == 1:
                detail = f"{type(error).__name__}: {error}"
                return [CaptionResult.failed("internal_error", detail)]
            return [result for frames in clips for result in self._captions([frames])]

    def _unless_refused(self, row: Row) -> Row:
        """The row; with the reason where the captioner is not fit for it."""
        if not (self.config.only_moving_shapes and wants_caption(row)):
            return row
        refused = refusal(self.config, json.loads(row["metadata"]))
        return row if refused is None else with_caption(row, refused, self.captioner.name)

    def _count(self, row: Row) -> None:
        error = row["caption_error"]
        if is_final(error):
            return
        self.failures_in_a_row = self.failures_in_a_row + 1 if error else 0
        if self.failures_in_a_row >= self.give_up_after:
            raise CaptionerUnavailable(
                f"{self.failures_in_a_row} captions in a row failed, the last with {error!r}; see "
                f"to the captioner ({self.captioner.name}) and run the same command again, or "
                "raise captioner.give_up_after"
            )


def with_caption(row: Row, result: CaptionResult, captioner: str) -> Row:
    """The row with what a captioner of that name made of it."""
    return {
        **row,
        "synthetic": result.text,
        "captioner": captioner,
        "caption_error": result.error or None,
    }
