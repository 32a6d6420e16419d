"""Which model a command uses where none is named, and which recipe where none is.

Knows folders. Knows nothing of models or of what recipes say.
"""

from __future__ import annotations

from pathlib import Path

from flowreel.errors import FlowreelError

SHIPPED_MODEL = Path(__file__).parent / "assets" / "moving_shapes"


class NoShippedModelError(FlowreelError, ValueError):
    """No model was named, and none ships with this copy of Flowreel."""


def shipped_model() -> Path:
    """The model folder that commands use where none is named.

    Raises:
        NoShippedModelError: it is not there.
    """
    if not (SHIPPED_MODEL / "config.json").is_file():
        raise NoShippedModelError(
            f"no model is named, and no weights lie in {SHIPPED_MODEL}: name a model folder, such "
            "as the runs/demo/train/model of `flowreel demo`"
        )
    return SHIPPED_MODEL


def recipe_beside(folder: Path) -> str:
    """The recipe that a model was made by: in its folder or in its run's, else the default.

    `flowreel train --out RUN` leaves RUN/model and RUN/recipe.yaml, a demo RUN/train/model.
    """
    whole = folder.resolve()
    for place in (whole, whole.parent, whole.parent.parent):
        if (place / "recipe.yaml").is_file():
            return str(place / "recipe.yaml")
    return "tiny"
