"""Where things and camera are at any moment: simple mechanics in closed form.

    straight, still   the velocity stays
    circle            the velocity turns at a constant rate
    bounce            elastic at the edges of the picture
    meeting           two things of equal mass meet head-on and exchange their velocities
    occluder          a thing passes behind a bar and moves on as if there were none

Nothing is stepped: a position is a function of scene and time, so it is the same at every frame
rate, and momentum and energy are conserved as exactly as floating point adds. Time 0 is the middle
of a clip. Positions are (down, right) from the picture's middle in lengths of its smaller side.

Shapes: N things, T moments, 2 (down, right). Knows nothing of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.world.scene import Scene, Thing

Floats = npt.NDArray[np.float64]
SQUARE = (0.5, 0.5)
"""Half height and half width of a square picture, in lengths of its smaller side."""


@dataclass(frozen=True)
class Track:
    """The way of each thing through the world, which the camera does not change."""

    positions_NT2: Floats
    """Lengths."""
    velocities_NT2: Floats
    """Lengths per second."""


@dataclass(frozen=True)
class View:
    """What the camera shows: a point `p` of the world is drawn at `scale * (p - centre)`."""

    scale_T: Floats
    centre_T2: Floats
    """The point of the world in the picture's middle."""


def frame_times(num_frames: int, fps: float) -> Floats:
    """Seconds of each frame [T], around 0.

    >>> frame_times(3, 8.0).tolist()
    [-0.125, 0.0, 0.125]
    """
    return (np.arange(num_frames, dtype=np.float64) - (num_frames - 1) / 2) / fps


def track(scene: Scene, times_T: Floats, half: tuple[float, float] = SQUARE) -> Track:
    """Positions and velocities of a scene's things at these seconds.

    Args:
        scene: its things.
        times_T: seconds; 0 is the middle of a clip.
        half: half height and half width of the picture, in lengths, for what bounces off its edges.
    """
    if scene.meeting:
        return _meeting(scene, times_T)
    paths = [_path(thing, times_T, half) for thing in scene.things]
    # A scene may be empty: its background alone.
    form = (len(paths), len(times_T), 2)
    positions_NT2 = np.array([p for p, _ in paths]).reshape(form)
    return Track(positions_NT2, np.array([v for _, v in paths]).reshape(form))


def view(scene: Scene, times_T: Floats) -> View:
    """Where the camera looks at these seconds."""
    scale_T, centre_T2 = np.ones(len(times_T)), np.zeros((len(times_T), 2))
    kind, _, way = scene.camera.partition(" ")
    if kind == "pan":
        centre_T2[:, 1] = (1 if way == "right" else -1) * scene.camera_rate * times_T
    elif kind == "zoom":
        scale_T = np.exp((1 if way == "in" else -1) * scene.camera_rate * times_T)
    return View(scale_T, centre_T2)


def in_picture(scene: Scene, times_T: Floats, half: tuple[float, float] = SQUARE) -> Floats:
    """Where the things are drawn, [N, T, 2]: the track as the camera sees it."""
    seen = view(scene, times_T)
    positions_NT2 = track(scene, times_T, half).positions_NT2
    return seen.scale_T[:, None] * (positions_NT2 - seen.centre_T2)


def is_hidden(scene: Scene, times_T: Floats, half: tuple[float, float] = SQUARE) -> npt.NDArray:
    """Whether a thing is wholly behind the bar, bool [N, T]; never where there is no bar."""
    positions_NT2 = track(scene, times_T, half).positions_NT2
    bar = scene.occluder
    if bar is None:
        return np.zeros(positions_NT2.shape[:2], dtype=bool)
    extents_N = np.array([thing.extent[bar.axis] for thing in scene.things])
    off_NT = np.abs(positions_NT2[..., bar.axis] - bar.centre)
    return np.asarray(off_NT + extents_N[:, None] <= bar.half_width)


def contact_time(scene: Scene) -> float:
    """The second in which the two things of a meeting touch.

    Outlines touch exactly there: the things move along one axis, on one line.
    """
    axis, closing, apart = _approach(scene)
    reach = sum(thing.extent[axis] for thing in scene.things)
    # Before they meet, the second thing is on the side from which it comes.
    return float((-np.sign(closing) * reach - apart) / closing)


def _approach(scene: Scene) -> tuple[int, float, float]:
    """The axis of a meeting, and along it the second thing's velocity and place from the first."""
    assert len(scene.things) == 2
    first, second = scene.things
    difference = np.subtract(second.velocity, first.velocity)
    axis = int(np.argmax(np.abs(difference)))
    return axis, float(difference[axis]), second.centre[axis] - first.centre[axis]


def _meeting(scene: Scene, times_T: Floats) -> Track:
    """Two things before and after their elastic collision; equal masses exchange velocities."""
    contact = contact_time(scene)
    own_N12 = np.array([[thing.velocity] for thing in scene.things])
    start_N12 = np.array([[thing.centre] for thing in scene.things])
    before_T1, after_T1 = (part[:, None] for part in _parts(times_T, contact))
    positions_NT2 = start_N12 + own_N12 * before_T1 + own_N12[::-1] * after_T1
    velocities_NT2 = np.where((times_T > contact)[:, None], own_N12[::-1], own_N12)
    return Track(positions_NT2, velocities_NT2)


def _parts(times_T: Floats, moment: float) -> tuple[Floats, Floats]:
    """Each time as the part until a moment and the part after it."""
    before_T = np.minimum(times_T, moment)
    return before_T, times_T - before_T


def _path(thing: Thing, times_T: Floats, half: tuple[float, float]) -> tuple[Floats, Floats]:
    """Positions and velocities [T, 2] of a thing that meets no other."""
    centre, velocity = np.array(thing.centre), np.array(thing.velocity)
    time_T1 = times_T[:, None]
    if thing.turn:
        angle_T1 = thing.turn * time_T1
        across = np.array([velocity[1], -velocity[0]])
        along_T1, aside_T1 = np.sin(angle_T1) / thing.turn, (1 - np.cos(angle_T1)) / thing.turn
        return (
            centre + along_T1 * velocity + aside_T1 * across,
            np.cos(angle_T1) * velocity + np.sin(angle_T1) * across,
        )
    position_T2, velocity_T2 = centre + velocity * time_T1, velocity + 0 * time_T1
    if thing.motion == "bounce":
        return _between_edges(thing, position_T2, velocity_T2, half)
    return position_T2, velocity_T2


def _between_edges(
    thing: Thing, position_T2: Floats, velocity_T2: Floats, half: tuple[float, float]
) -> tuple[Floats, Floats]:
    """A free path folded at the edges of the picture, which its outline touches.

    Centre and velocity are those in a square picture; a wider one stretches both, so that a scene
    bounces at the same moments at any size.
    """
    square, room = 0.5 - np.array(thing.extent), np.array(half) - np.array(thing.extent)
    phase_T2 = np.mod(position_T2 / square + 1, 4)
    onward_T2 = phase_T2 < 2
    folded_T2 = np.where(onward_T2, phase_T2 - 1, 3 - phase_T2)
    return folded_T2 * room, np.where(onward_T2, 1, -1) * velocity_T2 * (room / square)
