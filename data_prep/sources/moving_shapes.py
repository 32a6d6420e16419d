"""The synthetic world: coloured shapes that move over textured backgrounds, as Panda-70M's clips.

Every picture is a pure function of a `ShapeSpec`, and every spec of a seed, so that the demo, the
codec's training and the tests see the same world and download nothing. Knows nothing of codecs,
latents or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.progress import Progress
from data_prep.sources.samples import write_shard
from media.frames import Frames
from media.write import encode_mp4, encode_png

# Six saturated colours, far apart in hue, so that a colour can be read back from blurred pixels.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 38, 38),
    "yellow": (232, 208, 40),
    "green": (40, 185, 60),
    "cyan": (40, 200, 215),
    "blue": (48, 72, 230),
    "magenta": (215, 50, 205),
}
SHAPES = ("circle", "square", "triangle")
# Unit velocities in pixels as (down, right).
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}
TONES: dict[str, float] = {"dark": 0.18, "grey": 0.45, "light": 0.75}
TEXTURES = ("smooth", "striped", "shaded")

_CAPTIONS = (
    "A {colour} {shape} moves {motion} over a {tone} {texture} background.",
    "The {colour} {shape} drifts {motion} in front of something {tone} and {texture}.",
    "{tone} {texture} backdrop, a {colour} {shape} going {motion}.",
)
_IMAGE_CAPTIONS = (
    "A {colour} {shape} over a {tone} {texture} background.",
    "A picture of a {colour} {shape} on something {tone} and {texture}.",
)


@dataclass(frozen=True)
class ShapeSpec:
    """One scene. Lengths are fractions of the picture's smaller side.

    >>> random_spec(3, colour="red", shape="circle", motion="left").caption()
    'A red circle moves left over a grey shaded background.'
    """

    colour: str
    shape: str
    motion: str
    tone: str
    texture: str
    radius: float
    centre: tuple[float, float]
    """(row, column) of the shape's middle, halfway through the clip."""
    speed: float
    """Lengths per second."""
    seed: int

    def caption(self) -> str:
        """The caption that a person would write, in one of a few wordings."""
        return _CAPTIONS[self.seed % len(_CAPTIONS)].format(**asdict(self))

    def image_caption(self) -> str:
        """The caption of a still picture: it tells of no motion."""
        return _IMAGE_CAPTIONS[self.seed % len(_IMAGE_CAPTIONS)].format(**asdict(self))


def random_spec(seed: int, **fixed: str) -> ShapeSpec:
    """The scene of a seed; `fixed` pins colour, shape, motion, tone or texture.

    >>> random_spec(3, colour="red").colour
    'red'
    """
    rng = np.random.default_rng([seed, 2511])

    def pick(name: str, options: tuple[str, ...]) -> str:
        drawn = options[int(rng.integers(len(options)))]
        return fixed.get(name, drawn)

    return ShapeSpec(
        colour=pick("colour", tuple(COLOURS)),
        shape=pick("shape", SHAPES),
        motion=pick("motion", tuple(MOTIONS)),
        tone=pick("tone", tuple(TONES)),
        texture=pick("texture", TEXTURES),
        radius=float(rng.uniform(0.17, 0.24)),
        centre=(float(rng.uniform(0.4, 0.6)), float(rng.uniform(0.4, 0.6))),
        speed=float(rng.uniform(0.16, 0.28)),
        seed=seed,
    )


def is_moving_shapes(metadata: Mapping[str, Any]) -> bool:
    """Whether a sample's json is one that `write_world` wrote: it names the whole scene.

    >>> is_moving_shapes({"scene": asdict(random_spec(0))}), is_moving_shapes({"scene": "a lake"})
    (True, False)
    """
    scene = metadata.get("scene")
    return isinstance(scene, dict) and {field.name for field in fields(ShapeSpec)} <= scene.keys()


def _background(spec: ShapeSpec, height: int, width: int) -> np.ndarray:
    """A still texture of low contrast and hardly any colour, fp32 [H, W, 3] in 0..1."""
    rng = np.random.default_rng([spec.seed, 7])
    rows, columns = np.mgrid[0:height, 0:width] / min(height, width)
    field = np.zeros((height, width))
    if spec.texture == "striped":
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        wave = np.cos(angle) * rows + np.sin(angle) * columns
        field += 0.05 * np.sin(2 * np.pi * rng.uniform(2.0, 3.5) * wave + phase)
    elif spec.texture == "shaded":
        angle = rng.uniform(0, 2 * np.pi)
        field += 0.22 * (np.cos(angle) * (rows - 0.5) + np.sin(angle) * (columns - 0.5))
    # A few long waves make every background its own.
    for _ in range(3):
        frequency = rng.uniform(-1.6, 1.6, size=2)
        wave = frequency[0] * rows + frequency[1] * columns
        field += 0.022 * np.sin(2 * np.pi * (wave + rng.uniform()))
    tint = rng.uniform(-0.02, 0.02, size=3)
    return np.clip(TONES[spec.tone] + field[..., None] + tint, 0, 1).astype(np.float32)


def _coverage(spec: ShapeSpec, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1 in [H, W]; edges are one pixel soft."""
    side = min(height, width)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    y, x = rows - centre[0] * side, columns - centre[1] * side
    radius = spec.radius * side
    if spec.shape == "circle":
        inside = radius - np.hypot(y, x)
    elif spec.shape == "square":
        inside = 0.89 * radius - np.maximum(np.abs(y), np.abs(x))
    else:
        # Upright triangle with the centroid in the middle: a base edge and two slopes.
        reach = 1.3 * radius
        base = reach * 0.55 - y
        slope = np.sqrt(3) / 2
        left, right = y * 0.5 + x * slope, y * 0.5 - x * slope
        inside = np.minimum(base, np.minimum(left, right) + reach * 0.55)
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


def render_clip(
    spec: ShapeSpec, num_frames: int, fps: float, height: int = 64, width: int = 64
) -> Frames:
    """Frames of a scene as uint8 [T, H, W, 3].

    >>> render_clip(random_spec(0), 5, 8.0).shape
    (5, 64, 64, 3)
    """
    background = _background(spec, height, width)
    colour = np.asarray(COLOURS[spec.colour], dtype=np.float32) / 255
    velocity = np.asarray(MOTIONS[spec.motion]) * spec.speed
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        centre = np.asarray(spec.centre) + velocity * (t - (num_frames - 1) / 2) / fps
        cover = _coverage(spec, centre, height, width)[..., None]
        picture = background * (1 - cover) + colour * cover
        frames[t] = np.round(picture * 255).astype(np.uint8)
    return frames


def render_image(spec: ShapeSpec, height: int = 64, width: int = 64) -> Frames:
    """The scene halfway through its clip, uint8 [H, W, 3]."""
    return render_clip(spec, 1, 1.0, height, width)[0]


def _samples(first: int, count: int, *, images: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Samples number `first` and on, as `write_shard` takes them."""
    for index in range(first, first + count):
        scene_seed = seed * 1_000_003 + index + (500_000 if images else 0)
        spec = random_spec(scene_seed)
        key = f"{'i' if images else ''}{index:07d}_{scene_seed % 100_000:05d}"
        caption = spec.image_caption() if images else spec.caption()
        record = {
            "videoid": f"shapes{scene_seed}",
            "url": "",
            "caption": caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "yt_meta_dict": None,
            "scene": asdict(spec),
        }
        sample: dict[str, Any] = {"__key__": key, "txt": caption, "json": record}
        if images:
            sample["png"] = encode_png(render_image(spec))
        else:
            sample["mp4"] = encode_mp4(render_clip(spec, 36, 16.0), fps=16.0)
        yield sample


def write_world(
    out: Path,
    num_clips: int,
    num_images: int,
    *,
    clips_per_shard: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write shards of the world to `out` and return their paths.

    `NNNNN.tar` holds clips (36 frames of 64×64 at 16 fps, H.264) as mp4, txt and json, laid out as
    Panda-70M's downloader does; `images-NNNNN.tar` holds images as png, txt and json. A shard that
    stands is left alone: its content is a function of its name and the arguments.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    samples = 0
    for images, total in ((False, num_clips), (True, num_images)):
        for shard, first in enumerate(range(0, total, clips_per_shard)):
            path = out / f"{'images-' if images else ''}{shard:05d}.tar"
            count = min(clips_per_shard, total - first)
            if not path.exists():
                write_shard(path, _samples(first, count, images=images, seed=seed))
            paths.append(path)
            samples += count
            if progress is not None:
                progress(samples, num_clips + num_images)
    return paths
