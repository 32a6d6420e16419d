"""The world as shards of video and images, laid out as Panda-70M's downloader does.

Knows nothing of codecs, latents or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.progress import Progress
from data_prep.sources.samples import write_shard
from data_prep.world.captions import caption, image_caption
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip, render_image
from data_prep.world.scene import SceneKinds, is_scene
from media.write import encode_mp4, encode_png


def is_moving_shapes(metadata: Mapping[str, Any]) -> bool:
    """Whether a sample's json is one that `write_world` wrote: it names the whole scene.

    >>> is_moving_shapes({"scene": asdict(random_scene(0))}), is_moving_shapes({"scene": "a lake"})
    (True, False)
    """
    return is_scene(metadata.get("scene"))


@dataclass(frozen=True)
class _Form:
    """What every clip of a call has in common."""

    seed: int
    kinds: SceneKinds
    height: int
    width: int
    frames: int
    fps: float

    def samples(self, first: int, count: int, *, images: bool) -> Iterator[dict[str, Any]]:
        """Samples number `first` and on, as `write_shard` takes them."""
        # In the middle of its clip what passes behind a bar is hidden: no picture of it.
        kinds = replace(self.kinds, occluders=0.0) if images else self.kinds
        for index in range(first, first + count):
            scene_seed = self.seed * 1_000_003 + index + (500_000 if images else 0)
            scene = random_scene(scene_seed, kinds=kinds)
            key = f"{'i' if images else ''}{index:07d}_{scene_seed % 100_000:05d}"
            text = image_caption(scene) if images else caption(scene)
            record = {
                "videoid": f"shapes{scene_seed}",
                "url": "",
                "caption": text,
                "key": key,
                "status": "success",
                "error_message": None,
                "yt_meta_dict": None,
                "scene": asdict(scene),
            }
            sample: dict[str, Any] = {"__key__": key, "txt": text, "json": record}
            if images:
                sample["png"] = encode_png(render_image(scene, self.height, self.width))
            else:
                clip = render_clip(scene, self.frames, self.fps, self.height, self.width)
                sample["mp4"] = encode_mp4(clip, fps=self.fps)
            yield sample


def write_world(
    out: Path,
    num_clips: int,
    num_images: int,
    *,
    clips_per_shard: int = 64,
    seed: int = 0,
    kinds: SceneKinds | None = None,
    height: int = 64,
    width: int = 64,
    frames: int = 36,
    fps: float = 16.0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write shards of the world to `out` and return their paths.

    `NNNNN.tar` holds clips (H.264) as mp4, txt and json, `images-NNNNN.tar` images as png, txt and
    json; the json holds the scene, which `scene_from` reads. A scene of a seed is the same at any
    size. Combinations of colour, shape and motion are seen ones (`data_prep.world.split`). A shard
    that stands is left alone: its content is a function of its name and the arguments.

    Args:
        out: folder of the shards.
        num_clips, num_images: how many of each.
        clips_per_shard: samples in each shard but the last ones.
        seed: another one writes another world of the same kind.
        kinds: which scenes; by default all.
        height, width: pixels.
        frames, fps: length and frame rate of the clips; two seconds show a scene whole.
        progress: called after each shard with the samples written and their total.

    Raises:
        StorageError: the disk fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    form = _Form(seed, kinds or SceneKinds(), height, width, frames, fps)
    paths: list[Path] = []
    samples = 0
    for images, total in ((False, num_clips), (True, num_images)):
        for shard, first in enumerate(range(0, total, clips_per_shard)):
            path = out / f"{'images-' if images else ''}{shard:05d}.tar"
            count = min(clips_per_shard, total - first)
            if not path.exists():
                write_shard(path, form.samples(first, count, images=images))
            paths.append(path)
            samples += count
            if progress is not None:
                progress(samples, num_clips + num_images)
    return paths
