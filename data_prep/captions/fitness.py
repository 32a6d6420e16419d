"""Which samples a back end is fit to caption: `measured` knows moving shapes and nothing else.

Of a real video it would write "A red circle moves left", and training would learn that four times
out of five. So a sample without the mark of the moving-shapes world gets no synthetic caption, and
a run that was told to use `measured` is refused where its first samples have no mark. Knows nothing
of Ray or of how captions are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from data_prep.captions.captioner import CaptionerUnfit, CaptionResult
from data_prep.captions.config import CaptionConfig
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import Sample, read_shard
from data_prep.world.shards import is_moving_shapes

_SHARDS_OPENED = 3
"""So many shards are opened for their first sample before a run begins."""


def refusal(config: CaptionConfig, metadata: Mapping[str, Any]) -> CaptionResult | None:
    """Why a sample of this json gets no synthetic caption; None where the back end is asked.

    >>> refusal(CaptionConfig(), {"caption": "A planet."}).error
    'not_moving_shapes: captioner measured writes of moving shapes only'
    >>> refusal(CaptionConfig(backend="measured", any_video=True), {}) is None
    True
    """
    if not config.only_moving_shapes or is_moving_shapes(metadata):
        return None
    return CaptionResult.failed(
        "not_moving_shapes", "captioner measured writes of moving shapes only"
    )


def check_fitness(config: CaptionConfig, sources: Iterable[str]) -> None:
    """Refuse `measured` where the first sample of the first shards is of other video.

    `auto` is never refused, and neither is data of both kinds: its samples are judged one by one.

    Args:
        config: the captioner's settings.
        sources: path or URI of every shard that is left to do.

    Raises:
        CaptionerUnfit: none of the samples looked at is of moving shapes.
        StorageError: the disk or the store fails.
    """
    if config.backend != "measured" or config.any_video:
        return
    firsts = [(source, _first_sample(source)) for source in islice(sources, _SHARDS_OPENED)]
    seen = [(source, sample) for source, sample in firsts if sample is not None]
    if not seen or any(is_moving_shapes(sample.metadata) for _, sample in seen):
        return
    source, sample = seen[0]
    raise CaptionerUnfit(
        f"captioner.backend is measured, which writes of moving shapes only, and {source} "
        f"({sample.key}) is other video; choose auto or none (training then reads the original "
        "captions), vlm, vllm or http (a model writes), or set captioner.any_video=true"
    )


def _first_sample(source: str) -> Sample | None:
    """The first sample of a shard that has media; None where there is none."""
    try:
        return next((sample for sample in read_shard(source) if sample.media), None)
    except ShardError:
        return None  # the run itself says what is wrong with it
