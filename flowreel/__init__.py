"""Flowreel from Python: what `import flowreel` offers. Nothing is loaded before it is asked for.

    model.py     a trained model: load it, sample videos, ask how likely a video is
    run.py       the three arrows: prepare, train, serve; each calls `pipeline.stages`
    errors.py    `FlowreelError`, the root of every error that a user can mend
    files.py     files that are there whole or not at all
    locks.py     locks of files, gone with the process that holds them
    version.py   the version's number
    values.py    digests of plain values, nested maps made flat

Every name of `__all__` is fetched from its file at first use (PEP 562), so that `import flowreel`,
which every package does for its errors, costs nothing. `docs/api.md` describes each name.
Read `model.py` first. No package but this one imports `model.py` and `run.py`.

Example:
    >>> import flowreel
    >>> sorted(flowreel.__all__)[:4]
    ['FlowreelError', 'LatentDataset', 'LogProb', 'Model']
    >>> issubclass(flowreel.FlowreelError, Exception)
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowreel.version import VERSION

if TYPE_CHECKING:
    from data_prep.latents.dataset import LatentDataset
    from flowreel.errors import FlowreelError
    from flowreel.model import LogProb, Model, Video, load, log_prob, sample
    from flowreel.run import prepare, serve, train
    from pipeline.recipes import Recipe, load_recipe

__version__ = VERSION

__all__ = [
    "FlowreelError",
    "LatentDataset",
    "LogProb",
    "Model",
    "Recipe",
    "Video",
    "__version__",
    "load",
    "load_recipe",
    "log_prob",
    "prepare",
    "sample",
    "serve",
    "train",
]

# The same as the imports above, for the interpreter; a test holds the two together.
_MODULE_OF = {
    "FlowreelError": "flowreel.errors",
    "LatentDataset": "data_prep.latents.dataset",
    "LogProb": "flowreel.model",
    "Model": "flowreel.model",
    "Recipe": "pipeline.recipes",
    "Video": "flowreel.model",
    "load": "flowreel.model",
    "load_recipe": "pipeline.recipes",
    "log_prob": "flowreel.model",
    "prepare": "flowreel.run",
    "sample": "flowreel.model",
    "serve": "flowreel.run",
    "train": "flowreel.run",
}


def __getattr__(name: str) -> Any:
    """A public name, fetched from its file at first use."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'flowreel' has no attribute {name!r}; see flowreel.__all__")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What completion offers: the public names."""
    return sorted(__all__)
