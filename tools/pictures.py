"""Make the README's pictures from the weights that ship, or from another model.

    python -m tools.pictures [--model FOLDER] [--out docs/pictures]

    grid.webp       what the model makes of prompts that nobody chose, animated
    surprise.png    a real clip whose thing changes colour half-way, and where that surprises
    likelihood.png  the same clip's log-likelihood by latent frame, beside the clip left alone

The prompts of the grid are the first of a seeded list, as they come. Knows the Python API and the
world. Knows nothing of training.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import flowreel
from data_prep.world.captions import canonical
from data_prep.world.draw import random_scene
from data_prep.world.prompts import prompts
from data_prep.world.render import render_clip
from data_prep.world.scene import Scene
from flowreel.model import Model
from media.frames import Frames
from pipeline.recipes import Recipe, load_recipe
from pipeline.shipped import recipe_beside, shipped_model

ROWS, COLUMNS = 4, 8
SEED = 2000
"""Of the prompts: none that guidance was tuned on or that `flowreel evaluate` asks."""
SCALE = 2
EDGE = 2
"""Pixels between the cells of a grid."""
DRAWS = 16
"""Noise draws of a likelihood."""


def tiled(videos: list[Frames], columns: int) -> Frames:
    """Videos of one length side by side, uint8 [T, H, W, 3], with a white edge around each."""
    frames, height, width, _ = videos[0].shape
    rows = -(-len(videos) // columns)
    size = (frames, rows * (height + EDGE) + EDGE, columns * (width + EDGE) + EDGE, 3)
    out = np.full(size, 255, np.uint8)
    for number, video in enumerate(videos):
        top = EDGE + number // columns * (height + EDGE)
        left = EDGE + number % columns * (width + EDGE)
        out[:, top : top + height, left : left + width] = video
    return out


def enlarged(frame: np.ndarray) -> Image.Image:
    picture = Image.fromarray(frame)
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.BICUBIC)


def save_grid(model: Model, recipe: Recipe, path: Path) -> None:
    """The grid, played for and back so that it does not jump."""
    asked = prompts(ROWS * COLUMNS, seed=SEED, kinds=recipe.world.kinds)
    videos = [model.sample(p.text, seed=SEED + n).frames for n, p in enumerate(asked)]
    pictures = [enlarged(frame) for frame in tiled(videos, COLUMNS)]
    pictures += pictures[-2:0:-1]
    duration_ms = round(1000 / model.video.fps)
    pictures[0].save(
        path, "WEBP", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0,
        quality=80, method=6,
    )  # fmt: skip
    for number, prompt in enumerate(asked):
        print(f"{number // COLUMNS + 1}.{number % COLUMNS + 1}  {prompt.text}")


def clip_with_a_change(model: Model, recipe: Recipe) -> tuple[Frames, Frames, Scene]:
    """A clip, the same clip with another colour from its middle on, and the scene."""
    scene = random_scene(
        SEED, kinds=recipe.world.kinds, colour="red", shape="circle", motion="right"
    )
    other = replace(scene, things=(replace(scene.thing, colour="blue"),))
    video = model.video
    size = (video.num_frames, video.fps, video.height, video.width)
    calm, late = render_clip(scene, *size), render_clip(other, *size)
    # The first frame of a latent one, so that the change falls between two of them.
    middle = 1 + 4 * (video.num_frames // 8)
    return calm, np.concatenate([calm[:middle], late[middle:]]), scene


def save_surprise(model: Model, recipe: Recipe, folder: Path) -> None:
    """The map by token, and the curve by latent frame."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calm, changed, scene = clip_with_a_change(model, recipe)
    measured = {
        name: model.log_prob(clip, canonical(scene), draws=DRAWS)
        for name, clip in (("as rendered", calm), ("changed", changed))
    }
    # By how much less likely each token became, in nats.
    lost = measured["as rendered"].token_nats - measured["changed"].token_nats
    count = len(lost)
    figure, axes = pyplot.subplots(2, count, figsize=(1.7 * count, 3.6), layout="constrained")
    limit = float(np.abs(lost).max())
    for index in range(count):
        axes[0, index].imshow(changed[min(4 * index, len(changed) - 1)])
        shown = axes[1, index].imshow(lost[index], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[0, index].set_title(f"frame {4 * index + 1}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[1, :], label="nats less likely", shrink=0.8)
    figure.savefig(folder / "surprise.png", dpi=110)
    pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    for name, likelihood in measured.items():
        axis.plot(range(1, count + 1), likelihood.frame_nats, marker="o", label=name)
    axis.set_xlabel("latent frame (of one video frame the first, of four each other one)")
    axis.set_ylabel("log-likelihood, nats")
    axis.set_xticks(range(1, count + 1))
    axis.legend()
    figure.savefig(folder / "likelihood.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="model folder; default: the weights that ship")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    folder = arguments.model or shipped_model()
    recipe = load_recipe(recipe_beside(folder))
    model = flowreel.load(folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_grid(model, recipe, arguments.out / "grid.webp")
    save_surprise(model, recipe, arguments.out)


if __name__ == "__main__":
    main()
