"""What Ray Data measured of the operators of a pipeline: while it runs, and at its end.

Reads the objects that it is given, and imports nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.progress import Busy
from data_prep.resources import StageResources
from data_prep.run import StageFigures


def busy_so_far(pipeline: Any, resources: Mapping[str, StageResources]) -> dict[str, Busy]:
    """What each operator has done up to now; empty where Ray Data does not say."""
    executor = pipeline._current_executor
    if executor is None or executor._topology is None:
        return {}
    operators = [operator for operator in executor._topology if operator.input_dependencies]
    if len(operators) != len(resources):
        return {}  # an engine of ray.data.llm brings operators of its own
    return {
        name: Busy(
            operator.get_actor_info().running or need.workers,
            operator.metrics.block_generation_time,
        )
        for (name, need), operator in zip(resources.items(), operators, strict=True)
    }


def stage_figures(pipeline: Any, resources: Mapping[str, StageResources]) -> Iterator[StageFigures]:
    """What Ray Data measured of each operator; stages and operators are in the same order."""
    summaries, operators = [pipeline.get_stats_summary()], list[Any]()
    while summaries:
        summary = summaries.pop()
        summaries += summary.parents
        operators = [*summary.operators_stats, *operators]
    if len(operators) != len(resources):
        return  # an engine of ray.data.llm brings operators of its own
    for (name, need), operator in zip(resources.items(), operators, strict=True):
        if operator.wall_time is None:
            return
        yield StageFigures(
            name=name,
            workers=need.workers,
            busy_s=operator.wall_time.sum,
            elapsed_s=operator.latest_end_time - operator.earliest_start_time,
            rows=int(operator.output_num_rows.sum),
            bytes_out=int(operator.output_size_bytes.sum),
        )
