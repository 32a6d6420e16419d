"""The judge reads the world back, sharp or after a lossy codec, and says where it is not sure."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep.world.draw import random_scene
from data_prep.world.judge import Reading, judge, judge_things
from data_prep.world.judge_truth import ATTRIBUTES, accuracies, confusions, expected, paired
from data_prep.world.mechanics import frame_times, in_picture, is_hidden
from data_prep.world.render import render_clip
from data_prep.world.scene import EASY, Scene, SceneKinds
from data_prep.world.vocabulary import CAMERAS, COLOURS, MOTIONS, SHAPES, SIZES
from media.frames import Frames

FORMS = ((33, 16.0), (17, 8.0))
"""Frames and frame rates."""
FLIPPED = {"left": "right", "right": "left"}
REVERSED = {**FLIPPED, "up": "down", "down": "up", "in": "out", "out": "in"}
AWAY = (5.0, 5.0)
"""Outside of the picture."""


def lossy(frames: Frames, seed: int) -> Frames:
    """About what a codec of 30 dB leaves: half the resolution, noise, JPEG's blocks and ringing."""
    rng = np.random.default_rng(seed)
    height, width = frames.shape[1:3]
    left = []
    for frame in frames:
        small = Image.fromarray(frame).resize((width // 2, height // 2), Image.Resampling.BOX)
        soft = small.resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(soft) + rng.normal(0, 4, frame.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=30)
        left.append(np.asarray(Image.open(file)))
    return np.stack(left)


def unchanged(frames: Frames, seed: int) -> Frames:
    return frames


def read_back(
    first: int, count: int, spoil: Callable[[Frames, int], Frames]
) -> list[tuple[dict[str, str], Reading]]:
    """Scenes of the whole grammar, with what is read of them."""
    pairs = []
    for seed in range(first, first + count):
        scene = random_scene(seed, split="any")
        frames, fps = FORMS[seed % 2]
        readings = judge_things(spoil(render_clip(scene, frames, fps), seed), fps=fps)
        pairs += paired(scene, readings)
    return pairs


def check(pairs: list[tuple[dict[str, str], Reading]], bar: float) -> None:
    wrong = {
        name: [(pair, n) for pair, n in of.most_common() if pair[0] != pair[1]]
        for name, of in confusions(pairs).items()
    }
    shares = accuracies(pairs)
    assert min(shares.values()) >= bar, f"{shares}; read as others: {wrong}"


@pytest.mark.parametrize(("spoil", "bar"), [(unchanged, 0.95), (lossy, 0.92)])
def test_scenes_are_read_back(spoil: Callable[[Frames, int], Frames], bar: float) -> None:
    check(read_back(300_000, 40, spoil), bar)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "bar"), [(unchanged, 0.97), (lossy, 0.95)])
def test_a_thousand_scenes_are_read_back(
    spoil: Callable[[Frames, int], Frames], bar: float
) -> None:
    check(read_back(400_000, 1000, spoil), bar)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), [
    *(("colour", word) for word in COLOURS), *(("shape", word) for word in SHAPES),
    *(("size", word) for word in SIZES), *(("motion", word) for word in MOTIONS),
    *(("camera", word) for word in CAMERAS),
])  # fmt: skip
def test_every_word_is_read_back(name: str, word: str) -> None:
    right = 0
    for seed in range(500_000, 500_030):
        scene = random_scene(seed, split="any", **{name: word})
        frames, fps = FORMS[seed % 2]
        readings = judge_things(lossy(render_clip(scene, frames, fps), seed), fps=fps)
        right += getattr(paired(scene, readings)[0][1], name) == word
    assert right >= 27


@pytest.mark.parametrize("size", [(64, 64), (64, 112), (128, 128), (160, 96)])
def test_size_and_breadth_of_the_picture_do_not_matter(size: tuple[int, int]) -> None:
    for seed in range(6):
        scene = random_scene(600_000 + seed, split="any", kinds=SceneKinds(two_things=0))
        check(paired(scene, judge_things(render_clip(scene, 17, 8.0, *size), fps=8.0)), 1.0)


def words_of(reading: Reading) -> dict[str, str | None]:
    return {name: getattr(reading, name) for name in ATTRIBUTES}


def swapped(word: str | None, names: dict[str, str]) -> str | None:
    """A word of motion or camera with its directions exchanged."""
    if word is None:
        return None
    for mark in ("-", " "):
        if mark in word:
            return mark.join(names.get(part, part) for part in word.split(mark))
    return names.get(word, word)


@pytest.mark.parametrize("seed", range(700_000, 700_008))
def test_mirrored_reversed_and_enlarged_clips_are_read_so(seed: int) -> None:
    scene = random_scene(seed, split="any")
    clip = lossy(render_clip(scene, 17, 8.0), seed)
    read = judge(clip, fps=8.0)
    assert words_of(judge(clip, fps=8.0)) == words_of(read)
    mirrored = words_of(judge(clip[:, :, ::-1], fps=8.0))
    backwards = words_of(judge(clip[::-1], fps=8.0))
    for other, names in ((mirrored, FLIPPED), (backwards, REVERSED)):
        turned = {"motion": swapped(read.motion, names), "camera": swapped(read.camera, names)}
        assert other == words_of(read) | turned
    enlarged = judge(clip.repeat(2, axis=1).repeat(2, axis=2), fps=8.0)
    assert words_of(enlarged) == words_of(read)
    assert enlarged.radius == pytest.approx(read.radius)


@pytest.mark.parametrize("shift", [-25, 25])
def test_brightness_and_mild_noise_do_not_matter(shift: int) -> None:
    for seed in range(5):
        scene = random_scene(800_000 + seed, split="any", kinds=SceneKinds(two_things=0))
        clip = render_clip(scene, 17, 8.0) + np.random.default_rng(seed).normal(shift, 8.0)
        read = judge(np.clip(clip, 0, 255).astype(np.uint8), fps=8.0)
        assert words_of(read) == expected(scene)[0]


def test_a_track_is_where_the_thing_was_drawn() -> None:
    for seed in range(8):
        scene = random_scene(900_000 + seed, split="any", kinds=SceneKinds(two_things=0))
        read = judge(render_clip(scene, 17, 8.0), fps=8.0)
        times = frame_times(17, 8.0)
        assert read.track_T2 is not None
        assert read.area_T is not None
        whole = np.abs(read.area_T - 1) < 0.03
        error = np.hypot(*(read.track_T2 - in_picture(scene, times)[0]).T)[whole]
        assert np.median(error) < 0.01
        assert np.isnan(read.track_T2[is_hidden(scene, times)[0]]).all()
        assert read.radius == pytest.approx(scene.thing.radius, rel=0.06)


# What it must not invent.


def thing_scene(seed: int, **fixed: str) -> Scene:
    return random_scene(seed, kinds=EASY, split="any", **fixed)


def with_thing(scene: Scene, **changes: object) -> Scene:
    return replace(scene, things=(replace(scene.thing, **changes),))  # type: ignore[arg-type]


def clip_of(scene: Scene) -> Frames:
    return render_clip(scene, 33, 16.0)


def without(scene: Scene) -> Frames:
    """The scene's background alone."""
    return clip_of(with_thing(scene, centre=AWAY))


@pytest.mark.parametrize("noise", [0.0, 12.0])
def test_a_clip_without_a_thing_is_not_sure_of_one(noise: float) -> None:
    for seed in range(3):
        plain = np.full((17, 64, 64, 3), 115) + np.random.default_rng(seed).normal(0, noise)
        for clip in (plain.astype(np.uint8), without(thing_scene(seed))):
            words = words_of(judge(clip, fps=16.0))
            assert [words[name] for name in ATTRIBUTES[:4]] == [None] * 4


def test_a_thing_that_changes_colour_has_no_sure_colour() -> None:
    for seed, (one, other) in enumerate([("red", "orange"), ("blue", "yellow"), ("cyan", "pink")]):
        scene = thing_scene(seed, colour=one)
        clip = clip_of(scene)
        clip[16:] = clip_of(with_thing(scene, colour=other))[16:]
        assert judge(clip, fps=16.0).colour is None
        assert judge(clip, fps=16.0).shape == scene.thing.shape


@pytest.mark.parametrize("part", [slice(16, None), slice(None, None, 2)], ids=["half", "turns"])
def test_a_thing_of_two_shapes_has_no_sure_shape(part: slice) -> None:
    for seed, (one, other) in enumerate([("cross", "ring"), ("circle", "square")]):
        scene = thing_scene(seed, shape=one)
        clip = clip_of(scene)
        clip[part] = clip_of(with_thing(scene, shape=other))[part]
        read = judge(clip, fps=16.0)
        assert read.shape is None
        assert read.colour == scene.thing.colour


def blob(seed: int) -> Frames:
    """A random outline in the middle, the same in every frame."""
    rng = np.random.default_rng(seed)
    scene = thing_scene(seed)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8))
    field = np.asarray(noise.filter(ImageFilter.GaussianBlur(3))).astype(np.float64)
    y, x = np.mgrid[:64, :64] - 31.5
    field = field / field.std() - np.hypot(y, x) ** 2 / 200
    cover = np.clip((field - np.quantile(field, 0.92)) * 6 + 0.5, 0, 1)[..., None]
    mixed = without(scene) * (1 - cover) + np.array(COLOURS[scene.thing.colour]) * cover
    return mixed.astype(np.uint8)


def test_an_outline_of_no_shape_has_no_sure_shape() -> None:
    assert sum(judge(blob(seed), fps=16.0).shape is not None for seed in range(8)) <= 1


def test_a_thing_that_vanishes_or_jumps_has_no_sure_motion() -> None:
    for seed in range(3):
        scene = thing_scene(seed)
        gone = clip_of(scene)
        gone[13:] = without(scene)[13:]
        assert judge(gone, fps=16.0).motion is None
        rng = np.random.default_rng(seed)
        places = [tuple(rng.uniform(-0.3, 0.3, 2)) for _ in range(33)]
        still = [with_thing(scene, centre=p, velocity=(0.0, 0.0), motion="still") for p in places]
        jumps = np.concatenate([render_clip(s, 1, 1.0) for s in still])
        assert judge(jumps, fps=16.0).motion is None


def test_what_lies_between_two_words_is_neither() -> None:
    scene = thing_scene(1, motion="right", shape="circle", size="small")
    between = (0.2 * np.sin(np.pi / 8), 0.2 * np.cos(np.pi / 8))
    aslant = with_thing(scene, centre=(0.0, 0.0), velocity=between)
    assert judge(clip_of(aslant), fps=16.0).motion is None
    half = with_thing(scene, radius=(SIZES["small"] * SIZES["medium"]) ** 0.5)
    assert judge(clip_of(half), fps=16.0).size is None


@pytest.mark.parametrize("motion", ["still", "circle", "bounce"])
def test_a_long_video_is_read_as_a_short_one_is(motion: str) -> None:
    scene = random_scene(5, motion=motion, camera="static", split="any")
    words = expected(scene)[0]
    assert words_of(judge(lossy(render_clip(scene, 97, 16.0), 0))) == words


def test_a_picture_has_no_motion_and_no_camera() -> None:
    scene = thing_scene(4)
    read = judge(clip_of(scene)[16:17])
    assert (read.colour, read.shape) == (scene.thing.colour, scene.thing.shape)
    assert read.motion is None
    assert read.camera is None
