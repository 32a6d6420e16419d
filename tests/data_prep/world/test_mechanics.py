"""Momentum and energy stay, velocity is the slope of the way, and what is hidden goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_prep.world.draw import random_scene
from data_prep.world.mechanics import (
    contact_time,
    frame_times,
    in_picture,
    is_hidden,
    track,
    view,
)
from data_prep.world.scene import Scene, SceneKinds

PAIRS = [random_scene(seed, kinds=SceneKinds(two_things=1)) for seed in range(120)]
MEETINGS = [scene for scene in PAIRS if scene.meeting]
BEHIND = [random_scene(seed, kinds=SceneKinds(two_things=0, occluders=1)) for seed in range(40)]
MOVING = [random_scene(seed) for seed in range(60)]
TIMES = frame_times(33, 16.0)


@pytest.mark.parametrize("scene", [*MOVING[:20], *MEETINGS[:5], *BEHIND[:5]], ids=lambda s: s.seed)
def test_positions_are_the_same_at_every_frame_rate(scene: Scene) -> None:
    coarse, fine = frame_times(17, 8.0), frame_times(129, 64.0)
    assert np.array_equal(coarse, fine[::8])
    for of in (in_picture, is_hidden):
        assert np.array_equal(of(scene, coarse), of(scene, fine)[:, ::8])


@pytest.mark.parametrize("scene", [*MOVING, *MEETINGS], ids=lambda s: s.seed)
def test_velocity_is_the_slope_of_the_way(scene: Scene) -> None:
    step = 1e-6
    ahead, behind = (track(scene, TIMES + s).positions_NT2 for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    velocities = track(scene, TIMES).velocities_NT2
    # Where a thing turns round between the two moments there is no slope.
    smooth = np.all(
        track(scene, TIMES + step).velocities_NT2.round(3)
        == track(scene, TIMES - step).velocities_NT2.round(3),
        axis=(0, 2),
    )
    assert smooth.sum() > 25
    assert slope[:, smooth] == pytest.approx(velocities[:, smooth], abs=1e-6)


def test_a_collision_keeps_momentum_and_energy() -> None:
    assert len(MEETINGS) > 20
    for scene in MEETINGS:
        velocities_NT2 = track(scene, TIMES).velocities_NT2
        momentum_T2, energy_T = velocities_NT2.sum(0), (velocities_NT2**2).sum((0, 2))
        assert np.ptp(momentum_T2, axis=0) == pytest.approx(0, abs=1e-15)
        assert np.ptp(energy_T) == pytest.approx(0, abs=1e-15)
        # It does change both things' velocities.
        assert not np.array_equal(velocities_NT2[:, 0], velocities_NT2[:, -1])


def test_things_touch_when_they_collide_and_part_again() -> None:
    for scene in MEETINGS:
        first, second = scene.things
        axis = int(np.argmax(np.abs(np.subtract(first.velocity, second.velocity))))
        contact = contact_time(scene)
        assert abs(contact) < 0.3
        one, other = track(scene, contact + np.array([-0.2, 0.0, 0.2])).positions_NT2
        gaps = np.abs(one - other)[:, axis] - (first.extent[axis] + second.extent[axis])
        assert gaps[1] == pytest.approx(0, abs=1e-12)
        assert min(gaps[0], gaps[2]) > 0.02
        # The middle of the two goes on as it did.
        middle = (one + other) / 2
        assert middle[1] - middle[0] == pytest.approx(middle[2] - middle[1])


@pytest.mark.parametrize("half", [(0.5, 0.5), (0.5, 0.9)], ids=["square", "wide"])
def test_a_bounce_keeps_speed_and_stays_between_the_edges(half: tuple[float, float]) -> None:
    for seed in range(40):
        scene = random_scene(seed, motion="bounce", kinds=SceneKinds(two_things=0))
        path = track(scene, frame_times(601, 60.0), half)
        speeds_T2 = np.abs(path.velocities_NT2[0])
        assert np.ptp(speeds_T2, axis=0) == pytest.approx(0, abs=1e-15)
        reach_2 = np.abs(path.positions_NT2[0]).max(0) + scene.thing.extent
        assert np.all(reach_2 <= np.array(half) + 1e-12)
        axis = int(np.argmax(np.abs(scene.thing.velocity)))
        assert reach_2[axis] == pytest.approx(half[axis], abs=0.02)


def test_a_circling_thing_stays_on_its_circle() -> None:
    for seed in range(20):
        scene = random_scene(seed, motion="circle")
        thing = scene.thing
        turn = 2 * np.pi / abs(thing.turn)
        path_T2 = track(scene, np.linspace(0, turn, 9)).positions_NT2[0]
        assert path_T2[-1] == pytest.approx(path_T2[0])
        middle = path_T2[:-1].mean(0)
        orbit = np.hypot(*thing.velocity) / abs(thing.turn)
        assert np.hypot(*(path_T2 - middle).T) == pytest.approx(orbit)


def test_a_thing_behind_a_bar_comes_out_where_it_should() -> None:
    for scene in BEHIND:
        bar, thing = scene.occluder, scene.thing
        assert bar is not None
        hidden_T = is_hidden(scene, TIMES)[0]
        (during,) = np.nonzero(hidden_T)
        assert 2 <= len(during) <= 8
        assert np.array_equal(during, np.arange(during[0], during[-1] + 1))
        path_T2 = track(scene, TIMES).positions_NT2[0]
        # Seen whole on one side, later on the other, and as far as its velocity carries it.
        off_T = np.abs(path_T2[:, bar.axis] - bar.centre) - thing.extent[bar.axis]
        clear_T = off_T > bar.half_width
        side_T = np.sign(path_T2[:, bar.axis] - bar.centre)
        assert set(side_T[clear_T]) == {-1.0, 1.0}
        way = path_T2[-1] - path_T2[0]
        assert way == pytest.approx(np.array(thing.velocity) * (TIMES[-1] - TIMES[0]))


def test_nothing_is_hidden_without_a_bar() -> None:
    assert not any(is_hidden(scene, TIMES).any() for scene in MOVING if scene.occluder is None)


def test_the_camera_is_at_rest_in_the_middle_of_the_clip() -> None:
    for scene in MOVING:
        seen = view(replace(scene, camera="pan right", camera_rate=0.1), np.array([-1.0, 0, 1.0]))
        assert seen.centre_T2[:, 1].tolist() == [-0.1, 0.0, 0.1]
        zoom = view(replace(scene, camera="zoom in", camera_rate=0.1), np.array([-1.0, 0, 1.0]))
        assert zoom.scale_T[0] * zoom.scale_T[2] == pytest.approx(1)
        assert zoom.scale_T[0] < zoom.scale_T[1] == 1 < zoom.scale_T[2]
