"""Put a trained model where commands look for the weights that ship.

    flowreel demo --recipe shapes --out runs/shapes
    python -m tools.ship runs/shapes/train
    flowreel evaluate --out runs/shapes/evaluation
    python -m tools.ship runs/shapes/train --evaluation runs/shapes/evaluation

`made.json` says how the weights came about, `evaluation.json` what they are worth. Knows folders.
Knows nothing of models.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from flowreel.files import write_json
from pipeline.recipes import load_recipe
from pipeline.shipped import SHIPPED_MODEL
from training.record.history import read_history

COMMAND = "flowreel demo --recipe {recipe}"


def how_made(run: Path, recipe: str, steps: int) -> dict[str, Any]:
    """What the history and the settings of a run say of its weights."""
    settings = json.loads((run / "train.json").read_text())
    history = read_history(run / "history.jsonl")
    held_out = [r["held_out_nats_per_dim"] for r in history if "held_out_nats_per_dim" in r]
    return {
        "command": COMMAND.format(recipe=recipe),
        "steps": steps,
        "training_hours": round(sum(r["step_s"] for r in history) / 3600, 2),
        "machine": platform.machine(),
        "held_out_nats_per_dim": held_out[-1] if held_out else None,
        "noise_floor_nats_per_dim": history[-1]["noise_floor"],
        "dataset_samples": settings["dataset"]["samples"],
        "codec_digest": settings["dataset"]["codec_digest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument("--recipe", default="shapes", help="name of the recipe that it was run by")
    parser.add_argument("--evaluation", type=Path, help="what `flowreel evaluate --out` left")
    arguments = parser.parse_args()
    recipe = load_recipe(str(arguments.run / "recipe.yaml"))
    if arguments.evaluation is None:
        if SHIPPED_MODEL.exists():
            shutil.rmtree(SHIPPED_MODEL)
        shutil.copytree(arguments.run / "model", SHIPPED_MODEL)
        shutil.copy(arguments.run / "recipe.yaml", SHIPPED_MODEL)
        made = how_made(arguments.run, arguments.recipe, recipe.train.steps)
        write_json(SHIPPED_MODEL / "made.json", made)
    else:
        values = json.loads((arguments.evaluation / "evaluation.json").read_text())
        # By name: where it lay on the machine that measured it says nothing.
        values["about"]["model"] = SHIPPED_MODEL.name
        write_json(SHIPPED_MODEL / "evaluation.json", values)
    print(f"{SHIPPED_MODEL}: {sum(p.stat().st_size for p in SHIPPED_MODEL.rglob('*'))} bytes")


if __name__ == "__main__":
    main()
