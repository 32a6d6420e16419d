"""The weights that ship with Flowreel: where they lie, and what to do where they do not.

Knows a folder. Knows nothing of models.
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
