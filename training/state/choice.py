"""Which checkpoint a run goes on from: the newest that is whole, alike on all workers.

Every file is held against its digest before anything is loaded, each worker its share of them. A
damaged checkpoint is set aside under another name, `damaged_N`, and nothing is deleted. Knows
nothing of what a checkpoint holds.

    FlowreelError, RuntimeError
    └── DamagedCheckpoints    there are checkpoints, and none of them is whole
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from flowreel.errors import FlowreelError, FlowreelWarning
from training.state.checkpoint import Checkpoint, CheckpointMismatch, markers, read_checkpoint
from training.state.group import HostGroup
from training.state.whole import Damaged, damage_in

ASIDE = "damaged_"


class DamagedCheckpoints(FlowreelError, RuntimeError):
    """A run's checkpoints are all damaged; the message names what is wrong with each."""


class CheckpointWarning(FlowreelWarning):
    """A checkpoint is damaged, or could not be written; training goes on."""


@dataclass(frozen=True)
class Choice:
    """What a run goes on from.

    Attributes:
        checkpoint: the newest whole one; None for a fresh run.
        damage: a sentence on each newer one that was set aside.
    """

    checkpoint: Checkpoint | None
    damage: tuple[str, ...] = ()


def choose_checkpoint(root: Path, group: HostGroup) -> Choice:
    """The newest whole checkpoint in a folder; newer ones that are damaged are set aside, and said.

    All workers call it, and all get worker 0's choice.

    Raises:
        DamagedCheckpoints: there are some, and none is whole. All stay where they are.
        CheckpointMismatch: one of them is of another format.
    """
    damage: list[tuple[Path, str]] = []
    whole: Checkpoint | None = None
    for marker in reversed(group.of_first(markers(root))):
        checkpoint, wrong = _look_at(marker, group)
        if wrong is None:
            whole = checkpoint
            break
        damage.append((marker.parent, wrong))
    aside = group.of_first(sorted(path.name for path in root.glob(f"{ASIDE}*")))
    if whole is None and (damage or aside):
        listed = [f"{folder.name}: {wrong}" for folder, wrong in damage]
        listed += [f"{name}: set aside before" for name in aside]
        raise DamagedCheckpoints(
            f"no checkpoint in {root} is whole ({'; '.join(listed)}). Put a copy of one back, or "
            f"train into another folder; to begin anew here, remove {root}"
        )
    told = tuple(
        f"{folder} is damaged ({wrong}): set aside as {ASIDE}{folder.name.removeprefix('step_')}, "
        f"going on from {whole.path.name}"
        for folder, wrong in damage
        if whole is not None
    )
    if group.is_first:
        for folder, _ in damage:
            folder.rename(_free_name(folder))
        for sentence in told:
            warnings.warn(sentence, CheckpointWarning, stacklevel=2)
    group.of_first(None)  # nobody goes on before they are out of the way
    return Choice(whole, told)


def _look_at(marker: Path, group: HostGroup) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint of a marker, and what is wrong with it; alike on all workers."""
    checkpoint: Checkpoint | None = None
    wrong: str | None = None
    refusal: CheckpointMismatch | None = None
    if group.is_first:
        try:
            checkpoint = read_checkpoint(marker)
        except Damaged as error:
            wrong = str(error)
        except CheckpointMismatch as error:
            refusal = error
    checkpoint, wrong, refusal = group.of_first((checkpoint, wrong, refusal))
    if refusal is not None:
        raise refusal
    if checkpoint is None:
        return None, wrong
    share = sorted(checkpoint.files)[group.rank :: group.world]
    own = damage_in(checkpoint.path, {name: checkpoint.files[name] for name in share})
    return checkpoint, next((text for text in group.of_all(own) if text is not None), None)


def _free_name(folder: Path) -> Path:
    """`damaged_N`, or `damaged_N_2` and so on where that is taken."""
    number = folder.name.removeprefix("step_")
    candidates = (f"{ASIDE}{number}{suffix}" for suffix in ("", *(f"_{n}" for n in range(2, 100))))
    return next(p for name in candidates if not (p := folder.with_name(name)).exists())
