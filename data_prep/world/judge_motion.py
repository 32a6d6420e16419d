"""Which motion a track is: each one's own law is fitted, and the simplest that explains it wins.

    still      a point
    straight   a line, in one of eight directions
    circle     a point that turns at a constant rate
    bounce     a line that is folded at the edges of the picture

Lengths are fractions of the picture's smaller side, seconds are counted from the middle of the
video. Knows nothing of pixels.

Shapes: T frames, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data_prep.world.scene import CLIP_S
from data_prep.world.vocabulary import DIRECTIONS

Floats = npt.NDArray[np.floating]

LEAST_RATE = 0.07
"""Lengths per second: half the slowest motion."""
_QUICK_RATE = 0.21
_QUICK_TURN = 2 * np.pi / 1.6
_QUICK_BOUNCE = 1.9
"""Widths of its room that a bouncing thing crosses in two seconds."""
_NOISE = 0.006
"""Lengths by which a good track errs."""
_MOST_ERROR = 0.035
"""Lengths, root mean square, above which no law explains a track."""
_LEAST_FRAMES = 3


@dataclass(frozen=True)
class Motion:
    """What was read of a track."""

    word: str
    speed: str
    """slowly or quickly; empty for what is still."""
    confidence: float
    """0 to 1; below 0.5 it is not sure."""
    error: float
    """Lengths, root mean square, by which the track differs from the law."""


def read_motion(
    track_T2: Floats, weight_T: Floats, fps: float, room_2: Floats, *, meets: bool = False
) -> Motion | None:
    """The motion of a track; None where too little of it is seen.

    A long track is read in parts of about the length that scenes are made for; most of them have to
    agree.

    Args:
        track_T2: places in the world, NaN where not seen.
        weight_T: how far each is trusted, 0 to 1.
        fps: frames per second.
        room_2: how far up and down, left and right of the middle the thing's middle can go.
        meets: whether there is another thing that it may bounce off.
    """
    parts = max(1, round(len(track_T2) / fps / CLIP_S))
    pieces = zip(np.array_split(track_T2, parts), np.array_split(weight_T, parts), strict=True)
    found = [_read_part(track, weight, fps, room_2, meets) for track, weight in pieces]
    read = [motion for motion in found if motion is not None]
    if not read:
        return None
    words = [motion.word for motion in read]
    best = max(words, key=words.count)
    agreed = [motion for motion in read if motion.word == best]
    most = max(agreed, key=lambda motion: motion.confidence)
    sure = float(np.median([motion.confidence for motion in agreed]))
    agreement = float(np.clip(0.5 + 3 * (len(agreed) / parts - 0.75), 0, 1))
    return replace(most, confidence=min(sure, agreement))


def _read_part(
    track_T2: Floats, weight_T: Floats, fps: float, room_2: Floats, meets: bool
) -> Motion | None:
    """The motion of a track that is not much longer than scenes are."""
    weight_T = np.where(np.isfinite(track_T2[:, 0]), weight_T, 0.0)
    used = weight_T > 0.05
    if used.sum() < _LEAST_FRAMES:
        return None
    time_T = ((np.arange(len(track_T2)) - (len(track_T2) - 1) / 2) / fps)[used]
    path = _Path(time_T, track_T2[used], weight_T[used] / weight_T[used].sum())
    rate_2, straight = path.straight()
    bounce, quick_bounce = path.bounce(room_2)
    if meets:
        bounce, quick_bounce = min((bounce, quick_bounce), path.meeting())
    circle, turn = path.circle()
    way, between = _direction(rate_2)
    rate = float(np.hypot(*rate_2))
    errors = {"still": path.still(), "straight": straight, "circle": circle, "bounce": bounce}
    count = int(used.sum())
    cost = {
        kind: count * np.log(error + _NOISE**2) + terms * np.log(count)
        for (kind, error), terms in zip(errors.items(), (2, 4, 8, 8), strict=True)
    }
    best, second = sorted(cost, key=lambda kind: cost[kind])[:2]
    sure = min(1.0, (cost[second] - cost[best]) / 8)
    if {best, second} == {"still", "straight"}:
        best = "straight" if rate > LEAST_RATE else "still"
        sure = min(1.0, abs(rate - LEAST_RATE) / (0.5 * LEAST_RATE))
    elif best == "straight" and rate < LEAST_RATE:
        best = "still"
    word, speed = best, ""
    if best == "straight":
        word, speed = way, "quickly" if rate > _QUICK_RATE else "slowly"
        sure = min(sure, between)
    elif best == "circle":
        speed = "quickly" if turn > _QUICK_TURN else "slowly"
    elif best == "bounce":
        speed = "quickly" if quick_bounce else "slowly"
    error = float(np.sqrt(errors["straight" if best == "straight" else best]))
    sure *= float(np.clip(1.5 - error / _MOST_ERROR, 0, 1))
    return Motion(word, speed, float(sure), error)


def _direction(rate_2: Floats) -> tuple[str, float]:
    """The nearest direction, and how sure: 0 midway between two."""
    angle = np.arctan2(rate_2[0], rate_2[1])
    off = {
        word: abs(float(np.angle(np.exp(1j * (np.arctan2(*way) - angle)))))
        for word, way in DIRECTIONS.items()
    }
    best = min(off, key=lambda word: off[word])
    return best, min(1.0, (np.pi / 8 - off[best]) / (np.pi / 16) + 0.3)


@dataclass(frozen=True)
class _Path:
    """Seconds, places and weights (their sum is 1) of the frames in which a thing is seen."""

    time_T: Floats
    place_T2: Floats
    weight_T: Floats

    def still(self) -> float:
        """The mean squared error of a point."""
        return self._fit(np.ones((1, len(self.time_T), 1)))[1][0]

    def straight(self) -> tuple[Floats, float]:
        """Lengths per second of the best line, and its error."""
        parts_KTF = np.stack([np.ones_like(self.time_T), self.time_T], 1)[None]
        solved_KF2, error_K = self._fit(parts_KTF)
        return solved_KF2[0, 1], float(error_K[0])

    def _fit(self, parts_KTF: Floats) -> tuple[Floats, Floats]:
        """Least squares of both coordinates on each candidate's functions of time."""
        weighted_KFT = (parts_KTF * self.weight_T[:, None]).transpose(0, 2, 1)
        normal_KFF = weighted_KFT @ parts_KTF + 1e-9 * np.eye(parts_KTF.shape[2])
        solved_KF2 = np.linalg.solve(normal_KFF, weighted_KFT @ self.place_T2)
        left_KT2 = self.place_T2 - parts_KTF @ solved_KF2
        return solved_KF2, (left_KT2**2).sum(2) @ self.weight_T

    def circle(self) -> tuple[float, float]:
        """The error of the best circle, and its turn in radians per second."""
        periods_K = np.geomspace(0.9, 3.0, 24)
        turn_K = 2 * np.pi / np.concatenate([periods_K, -periods_K])
        # Middle + orbit is one complex line in (1, exp(i turn t)).
        z_T = self.place_T2[:, 1] + 1j * self.place_T2[:, 0]
        spin_KT = np.exp(1j * turn_K[:, None] * self.time_T)
        mean, mean_K = self.weight_T @ z_T, spin_KT @ self.weight_T
        off_T, off_KT = z_T - mean, spin_KT - mean_K[:, None]
        power_K = (np.abs(off_KT) ** 2) @ self.weight_T
        orbit_K = (np.conj(off_KT) @ (self.weight_T * off_T)) / (power_K + 1e-9)
        left_KT = np.abs(off_T - orbit_K[:, None] * off_KT) ** 2
        error_K = left_KT @ self.weight_T
        # Wider than the picture's own breadth is a line that bends a little.
        error_K = np.where((np.abs(orbit_K) > 0.06) & (np.abs(orbit_K) < 0.4), error_K, np.inf)
        best = int(error_K.argmin())
        return float(error_K[best]), float(abs(turn_K[best]))

    def meeting(self) -> tuple[float, bool]:
        """The error of the best line with one turn back, and whether it comes quickly."""
        best, quick = np.inf, False
        turns_K = np.quantile(self.time_T, np.linspace(0.15, 0.85, 15))
        after_KT = np.maximum(self.time_T - turns_K[:, None], 0)
        same_KT = np.broadcast_to(self.time_T, after_KT.shape)
        solved_K32, error_K = self._fit(np.stack([np.ones_like(after_KT), same_KT, after_KT], 2))
        for axis in range(2):
            first_K, second_K = solved_K32[:, 1, axis], solved_K32[:, 1:, axis].sum(1)
            back_K = (first_K * second_K < 0) & (np.abs(first_K) > LEAST_RATE)
            back_K &= np.abs(second_K) > LEAST_RATE
            if back_K.any() and (error := float(error_K[back_K].min())) < best:
                best = error
                quick = float(np.abs(first_K[error_K.tolist().index(error)])) > _QUICK_RATE
        return best, quick

    def bounce(self, room_2: Floats) -> tuple[float, bool]:
        """The error of the best folded line, and whether it is quick."""
        best, rooms = np.inf, 0.0
        for axis in range(2):
            # Along the other axis it goes a straight way.
            _, aside = self._one(self.place_T2[:, 1 - axis])
            error, crossed = self._folded(self.place_T2[:, axis], float(room_2[axis]))
            if error + aside < best:
                best, rooms = error + aside, crossed
        return best, rooms > _QUICK_BOUNCE

    def _one(self, place_T: Floats) -> tuple[float, float]:
        """The rate of the best line through one coordinate, and its error."""
        mean_time, mean = self.weight_T @ self.time_T, self.weight_T @ place_T
        time_T, off_T = self.time_T - mean_time, place_T - mean
        rate = (self.weight_T @ (time_T * off_T)) / (self.weight_T @ time_T**2 + 1e-9)
        return float(rate), float(self.weight_T @ (off_T - rate * time_T) ** 2)

    def _folded(self, place_T: Floats, room: float) -> tuple[float, float]:
        """The error of the best way between -room and room, by ever finer grids."""
        rooms = np.linspace(1.1, 3.0, 16)
        # Of a period of four: at time 0 anywhere, in either direction.
        start = np.linspace(0, 4, 24, endpoint=False)
        width_rooms, width_start = rooms[1] - rooms[0], start[1] - start[0]
        best, crossed, first = np.inf, 0.0, 0.0
        for _ in range(3):
            rooms_K, start_K = (a.ravel() for a in np.meshgrid(rooms, start))
            phase_KT = np.mod(start_K[:, None] + rooms_K[:, None] * self.time_T, 4)
            way_KT = room * np.where(phase_KT < 2, phase_KT - 1, 3 - phase_KT)
            error_K = (way_KT - place_T) ** 2 @ self.weight_T
            k = int(error_K.argmin())
            turns = np.ptp(np.floor((start_K[k] + rooms_K[k] * self.time_T) / 2))
            best, crossed, first = float(error_K[k]), float(rooms_K[k]), float(start_K[k])
            if turns == 0:
                best = np.inf
            rooms = crossed + width_rooms * np.linspace(-1, 1, 7)
            start = first + width_start * np.linspace(-1, 1, 7)
            width_rooms, width_start = width_rooms / 3, width_start / 3
        return best, crossed
