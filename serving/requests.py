"""What a client may ask for, its limits, and every way it can be refused. Knows nothing of HTTP
routes, Ray or tensors.

Two shapes of one request: `CreateVideo` is what a client writes (the OpenAI Videos dialect with
four fields more); `Generation` is what the stages read, complete and within the limits. Everything
here survives pickling.

    ServingError                 status, type, code, param: becomes OpenAI's error body
    ├── InvalidRequest           400  a field is wrong
    │   └── FrameCountError      400  a number of frames the codec cannot make
    ├── NotFound                 404  no such video, or no such route
    ├── NotReady                 409  the video is not finished (or never will be)
    ├── UploadTooLarge           413  the body is over the cap
    ├── QueueFull                429  come back after `retry_after_s`
    ├── StageFailed              500  a stage died or raised while it worked for the request
    ├── StagesNotReady           503  the stages do not answer yet
    └── DeadlineExceeded         504  not finished within the deadline
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flowreel.errors import FlowreelError
from serving.config import Limits, Schedule

TEMPORAL_FACTOR = 4
"""Video frames per latent frame after the first, as in Wan2.2's codec and all of its form."""
CELL_PIXELS = 16
"""Pixels per latent row and column, likewise; a model's config.json may say otherwise."""


class ServingError(FlowreelError):
    """The root: a refusal with an HTTP status and the four fields of OpenAI's error body."""

    status = 500
    type = "server_error"
    code = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (type(self), self.message, self.param, self.retry_after_s)

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`, as OpenAI writes it."""
        return error_body(self.message, self.type, self.param, self.code)


def _rebuild_error(
    kind: type[ServingError], message: str, param: str | None, retry_after_s: int | None
) -> ServingError:
    return kind(message, param=param, retry_after_s=retry_after_s)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InvalidRequest(ServingError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class FrameCountError(InvalidRequest):
    code = "invalid_frame_count"


class NotFound(ServingError):
    status, type, code = 404, "invalid_request_error", "not_found"


class NotReady(ServingError):
    status, type, code = 409, "invalid_request_error", "video_not_ready"


class UploadTooLarge(ServingError):
    status, type, code = 413, "invalid_request_error", "upload_too_large"


class QueueFull(ServingError):
    status, type, code = 429, "rate_limit_error", "queue_full"


class StageFailed(ServingError):
    code = "stage_failed"


class StagesNotReady(ServingError):
    status, code = 503, "not_ready"


class DeadlineExceeded(ServingError):
    status, code = 504, "deadline_exceeded"


@dataclass(frozen=True)
class ModelFacts:
    """What the Api must know of the served model; read from its config alone, without its weights.

    Attributes:
        name: the id under which it is listed and asked for.
        num_frames: frames of a training clip (4k+1); longer videos are made by sliding context. 1: it makes images.
        height, width: pixels.
        fps: frames per second.
        cell_pixels: pixels per latent row and column.
    """

    name: str
    num_frames: int
    height: int
    width: int
    fps: float
    cell_pixels: int = CELL_PIXELS

    @property
    def size(self) -> str:
        """`WIDTHxHEIGHT`, as OpenAI writes it."""
        return f"{self.width}x{self.height}"

    @property
    def aspect_ratio(self) -> str:
        """The aspect as the prompt template names it: the nearest of the buckets.

        >>> ModelFacts("m", 81, 480, 848, 16.0).aspect_ratio
        '16:9'
        """
        ratio = self.width / self.height
        near = min(ASPECTS, key=lambda a: abs(ratio / (a[0] / a[1]) - 1))
        if abs(ratio / (near[0] / near[1]) - 1) < 0.05:
            return f"{near[0]}:{near[1]}"
        divisor = gcd(self.width, self.height)
        return f"{self.width // divisor}:{self.height // divisor}"


ASPECTS = ((1, 1), (2, 3), (3, 2), (16, 9), (9, 16), (4, 5), (5, 4), (21, 9), (9, 21))


class CreateVideo(BaseModel):
    """Body of `POST /v1/videos`. `num_frames`, `guidance`, `seed` and `schedule` are ours, the rest
    is OpenAI's.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="what is to be seen")
    model: str | None = Field(default=None, description="the served model's id; others are refused")
    seconds: float | None = Field(default=None, gt=0, description="length: (frames - 1) / fps")
    size: str | None = Field(default=None, description="WIDTHxHEIGHT; only the model's own")
    num_frames: int | None = Field(default=None, description="length in frames: 4k+1")
    guidance: float | None = Field(
        default=None, ge=0, description="guidance weight w; 0 turns it off"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=1 << 63, description="noise seed; drawn if absent"
    )
    schedule: Schedule = Field(default="jacobi", description="how the deep block is inverted")


class Generation(BaseModel):
    """One video to make: complete, within limits, and enough to make it again frame for frame.

    A given first frame travels beside it, as uint8 [H, W, 3]; `given_first_frame` says that there
    is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str
    prompt: str
    num_frames: int = Field(description="video frames, 4k+1")
    guidance: float = Field(default=2.5, ge=0)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    schedule: Schedule = "jacobi"
    given_first_frame: bool = False

    @field_validator("num_frames")
    @classmethod
    def _whole_latent_frames(cls, num_frames: int) -> int:
        check_frames(num_frames)
        return num_frames

    @property
    def latent_frames(self) -> int:
        """Latent frames: 1 + (frames - 1) / 4."""
        return 1 + (self.num_frames - 1) // TEMPORAL_FACTOR

    @classmethod
    def admit(
        cls,
        body: CreateVideo,
        facts: ModelFacts,
        limits: Limits,
        *,
        request_id: str,
        seed: int,
        given_first_frame: bool = False,
    ) -> Self:
        """The request that a body asks for.

        Args:
            seed: used where the body names none.

        Raises:
            InvalidRequest: something in the body is over a limit, or is not what the model can
                make.
        """
        if len(body.prompt) > limits.prompt_chars:
            raise InvalidRequest(
                f"The prompt has {len(body.prompt)} characters; "
                f"at most {limits.prompt_chars} are allowed.",
                param="prompt",
            )
        if body.model is not None and body.model != facts.name:
            raise InvalidRequest(
                f"Model {body.model!r} is not served here; the one that is: {facts.name!r}.",
                param="model",
            )
        if body.size is not None and body.size != facts.size:
            raise InvalidRequest(
                f"Size {body.size!r} is not available; this model makes {facts.size!r} only.",
                param="size",
            )
        guidance = limits.default_guidance if body.guidance is None else body.guidance
        if guidance > limits.max_guidance:
            raise InvalidRequest(
                f"Guidance {guidance:g} is out of range; allowed: 0 to {limits.max_guidance:g}.",
                param="guidance",
            )
        return cls(
            request_id=request_id,
            prompt=body.prompt,
            num_frames=_asked_frames(body, facts, limits),
            guidance=guidance,
            seed=seed if body.seed is None else body.seed,
            schedule=body.schedule,
            given_first_frame=given_first_frame,
        )


def _asked_frames(body: CreateVideo, facts: ModelFacts, limits: Limits) -> int:
    if body.num_frames is not None:
        num_frames, param = body.num_frames, "num_frames"
    elif body.seconds is not None:
        num_frames, param = round(body.seconds * facts.fps) + 1, "seconds"
    else:
        num_frames, param = facts.num_frames, "num_frames"
    # A context to slide needs a window of two latent frames at least.
    longest = limits.max_frames if facts.num_frames > TEMPORAL_FACTOR else 1
    check_frames(num_frames, longest, fps=facts.fps, param=param)
    if body.num_frames is not None and body.seconds is not None:
        meant = (num_frames - 1) / facts.fps
        if abs(meant - body.seconds) > 0.5 / facts.fps:
            raise InvalidRequest(
                f"seconds {body.seconds:g} and num_frames {num_frames} disagree: {num_frames} "
                f"frames at {facts.fps:g} fps are {meant:g} s. Give one of the two.",
                param="seconds",
            )
    return num_frames


def check_frames(
    num_frames: int,
    max_frames: int | None = None,
    *,
    fps: float | None = None,
    param: str = "num_frames",
) -> None:
    """Refuse a frame count that is not 4k+1 or is over the cap, naming the nearest that is allowed.

    Raises:
        FrameCountError: with the count got, the rule and the nearest allowed count.
    """
    step = TEMPORAL_FACTOR
    near = max(1, (2 * num_frames + step - 2) // (2 * step) * step + 1)
    rule = f"counts are {step}k+1"
    if max_frames is not None:
        top = (max_frames - 1) // step * step + 1
        near = min(near, top)
        rule += f", from 1 to {top}"
    if num_frames == near:
        return
    seconds = "" if fps is None else f" (seconds={(near - 1) / fps:g} at {fps:g} fps)"
    raise FrameCountError(
        f"{num_frames} frames cannot be made: {rule}; the nearest allowed is {near}{seconds}.",
        param=param,
    )


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first complaint of pydantic, as an error of ours."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    problem = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    where = f"{param}: " if param else ""
    refused = InvalidRequest(f"{where}{problem}.", param=param)
    if first["type"] == "missing":
        refused = InvalidRequest(f"The required field {param!r} is missing.", param=param)
    return refused
