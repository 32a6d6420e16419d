"""What is said of a scene: whole English sentences by a small grammar, in several wordings.

The canonical wording is the one that prompts have. The others say the same in other words, and a
picture's captions tell of no motion. Knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Callable

from data_prep.world.scene import Scene, Thing

_WAYS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
_SIZE_WORDS = {"small": "little", "medium": "medium-sized", "large": "big"}
_CAMERA_MOVES = {
    "pan left": "pans left",
    "pan right": "pans right",
    "zoom in": "zooms in",
    "zoom out": "zooms out",
}
_CAMERA_GOES_ON = {
    "pan left": "panning to the left",
    "pan right": "panning to the right",
    "zoom in": "zooming in",
    "zoom out": "zooming out",
}


def canonical(scene: Scene) -> str:
    """The wording of prompts, which names everything once.

    >>> from data_prep.world.draw import random_scene
    >>> canonical(random_scene(1, colour="red", motion="bounce", camera="static"))
    'A medium red cross bounces slowly over a light striped background.'
    """
    return f"{_doing(scene, _finite)} over {_place(scene)}{_camera(scene)}."


def caption(scene: Scene) -> str:
    """One of the wordings, by the scene's seed; two in five are the canonical one."""
    return _WORDINGS[scene.seed % len(_WORDINGS)](scene)


def image_caption(scene: Scene) -> str:
    """A caption of the picture in the middle of the clip, by the scene's seed."""
    return _IMAGE_WORDINGS[scene.seed % len(_IMAGE_WORDINGS)](scene)


def canonical_image(scene: Scene) -> str:
    """The canonical wording without motion."""
    return f"{_listed(scene)} over {_place(scene)}."


def _name(thing: Thing) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def _other_name(thing: Thing) -> str:
    return f"{_SIZE_WORDS[thing.size]} {thing.colour} {thing.shape}"


def _listed(scene: Scene, name: Callable[[Thing], str] = _name) -> str:
    return " and ".join(
        f"{'a' if number else 'A'} {name(thing)}" for number, thing in enumerate(scene.things)
    )


def _finite(thing: Thing) -> str:
    """The verb in the simple present."""
    if thing.motion == "still":
        return "stays still"
    if thing.motion == "circle":
        return f"moves {thing.speed} in a circle"
    if thing.motion == "bounce":
        return f"bounces {thing.speed}"
    return f"moves {thing.motion} {thing.speed}"


def _going_on(thing: Thing) -> str:
    """The verb as something that goes on, after "is"."""
    if thing.motion == "still":
        return "standing still"
    if thing.motion == "circle":
        return f"going {thing.speed} around in a circle"
    if thing.motion == "bounce":
        return f"bouncing {thing.speed} from edge to edge"
    if "-" in thing.motion:
        up, left = thing.motion.split("-")
        return f"moving {thing.speed} {up} and {_WAYS[left]}"
    return f"moving {thing.speed} {_WAYS[thing.motion]}"


def _doing(scene: Scene, verb: Callable[[Thing], str]) -> str:
    """Subject and verb of each thing, as a clause."""
    if scene.meeting:
        return f"{_listed(scene)} bounce off each other"
    parts = [
        f"{'a' if number else 'A'} {_name(thing)} {verb(thing)}"
        for number, thing in enumerate(scene.things)
    ]
    return " and ".join(parts) + (" behind a grey bar" if scene.occluder else "")


def _place(scene: Scene) -> str:
    return f"a {scene.tone} {scene.texture} background"


def _camera(scene: Scene) -> str:
    return "" if scene.camera == "static" else f"; the camera {_CAMERA_MOVES[scene.camera]}"


def _place_first(scene: Scene) -> str:
    clause = _doing(scene, _finite)
    return f"Over {_place(scene)}, {clause[0].lower()}{clause[1:]}{_camera(scene)}."


def _in_progress(scene: Scene) -> str:
    if scene.meeting:
        doing = f"{_listed(scene, _other_name)} are bouncing off each other"
    else:
        doing = " and ".join(
            f"{'a' if number else 'A'} {_other_name(thing)} is {_going_on(thing)}"
            for number, thing in enumerate(scene.things)
        )
    bar = " behind a grey bar" if scene.occluder else ""
    moving = scene.camera != "static"
    camera = f" while the camera is {_CAMERA_GOES_ON[scene.camera]}" if moving else ""
    return f"{doing}{bar} in front of a {scene.tone}, {scene.texture} backdrop{camera}."


def _two_sentences(scene: Scene) -> str:
    """First what there is, then what happens."""
    there = f"There {'is' if len(scene.things) == 1 else 'are'} {_lower(_listed(scene))}"
    happens = [f"The {thing.shape} {_finite(thing)}" for thing in scene.things]
    if scene.meeting:
        happens = ["They bounce off each other"]
    bar = " behind a grey bar" if scene.occluder else ""
    moving = scene.camera != "static"
    camera = [f"the camera {_CAMERA_MOVES[scene.camera]}"] if moving else []
    happens = [happens[0], *(_lower(part) for part in happens[1:]), *camera]
    return f"{there} on {_place(scene)}. {' and '.join(happens)}{bar}."


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _picture_of(scene: Scene) -> str:
    things = _lower(_listed(scene, _other_name))
    return f"A picture of {things} in front of a {scene.tone}, {scene.texture} backdrop."


def _there_is(scene: Scene) -> str:
    verb = "is" if len(scene.things) == 1 else "are"
    return f"There {verb} {_lower(_listed(scene))} on {_place(scene)}."


_WORDINGS = (canonical, _place_first, canonical, _in_progress, _two_sentences)
_IMAGE_WORDINGS = (canonical_image, _picture_of, _there_is)
