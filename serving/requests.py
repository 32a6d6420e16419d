"""What a client may ask for, and whether a model can make it.

One request has two shapes. `CreateVideo` is what a client writes: the OpenAI Videos dialect with
four fields more. `Generation` is what the sessions read: complete, and within the limits of the
service and of the model (`ModelFacts`). All of it survives pickling. The errors are those of
`serving.errors`. Knows nothing of HTTP, Ray, files or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flow.codec_factors import CodecFactors
from flow.sample_spec import Schedule
from serving.config import Limits
from serving.errors import FrameCountError, InvalidRequest


@dataclass(frozen=True)
class ModelFacts:
    """What the Api must know of the served model; read from its config alone, without its weights.

    Attributes:
        name: the id under which it is listed and asked for.
        num_frames: video frames of a training clip; a longer video is made by sliding context.
            1: the model makes images.
        height, width: pixels.
        fps: frames per second.
        factors: what one latent of the model stands for.

    >>> from flow.codec_factors import WAN_FACTORS
    >>> ModelFacts("tiny", num_frames=17, height=48, width=64, fps=8.0, factors=WAN_FACTORS).size
    '64x48'
    """

    name: str
    num_frames: int
    height: int
    width: int
    fps: float
    factors: CodecFactors

    @property
    def size(self) -> str:
        """`WIDTHxHEIGHT`, as OpenAI writes it."""
        return f"{self.width}x{self.height}"


class CreateVideo(BaseModel):
    """Body of `POST /v1/videos`.

    The fields `num_frames`, `guidance`, `seed` and `schedule` are ours; the rest is OpenAI's.

    >>> CreateVideo(prompt="a red square", seconds=2).schedule
    'jacobi'
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="what is to be seen")
    model: str | None = Field(default=None, description="the served model's id; others are refused")
    seconds: float | None = Field(default=None, gt=0, description="length: (frames - 1) / fps")
    size: str | None = Field(default=None, description="WIDTHxHEIGHT; only the model's own")
    num_frames: int | None = Field(
        default=None, description="length in frames: one more than a multiple of the codec's step"
    )
    guidance: float | None = Field(
        default=None, ge=0, description="guidance weight w; 0 turns it off"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=1 << 63, description="noise seed; drawn if absent"
    )
    schedule: Schedule = Field(default="jacobi", description="how the deep block is inverted")


class Generation(BaseModel):
    """One video to make: complete, and enough to make it again frame for frame.

    A first frame that the client gives travels beside it, as uint8 [H, W, 3]; `given_first_frame`
    says that there is one.

    >>> from flow.codec_factors import WAN_FACTORS
    >>> facts = ModelFacts("tiny", num_frames=17, height=64, width=64, fps=8.0, factors=WAN_FACTORS)
    >>> body = CreateVideo(prompt="a red square", seconds=4)
    >>> request = Generation.admit(body, facts, Limits(), request_id="video_1", seed=5)
    >>> request.num_frames, request.guidance, request.latent_frames(facts.factors)
    (33, 2.5, 9)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_id: str
    prompt: str
    num_frames: int = Field(description="video frames")
    guidance: float = Field(default=2.5, ge=0)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    schedule: Schedule = "jacobi"
    given_first_frame: bool = False

    def latent_frames(self, factors: CodecFactors) -> int:
        """Latent frames of this video in a model of these factors.

        The request itself holds none of them: it may wait in the queue of a service that comes back
        with another model.

        Raises:
            FrameCountError: no whole number of latent frames makes this video.
        """
        check_frames(self.num_frames, factors)
        return factors.latent_frames(self.num_frames)

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
            body: what the client wrote.
            facts: the model that is to make it.
            limits: what the service admits.
            request_id: the video's id.
            seed: used where the body names none.
            given_first_frame: whether the client sent an image.

        Raises:
            InvalidRequest: something in the body is over a limit, or the model cannot make it.
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
            num_frames=_frames_asked_for(body, facts, limits),
            guidance=guidance,
            seed=seed if body.seed is None else body.seed,
            schedule=body.schedule,
            given_first_frame=given_first_frame,
        )


def _frames_asked_for(body: CreateVideo, facts: ModelFacts, limits: Limits) -> int:
    """Video frames that a body asks for, by `num_frames`, by `seconds`, or by naming neither."""
    if body.num_frames is not None:
        num_frames, param = body.num_frames, "num_frames"
    elif body.seconds is not None:
        num_frames, param = round(body.seconds * facts.fps) + 1, "seconds"
    else:
        num_frames, param = facts.num_frames, "num_frames"
    # A longer video reads latent frames again and adds new ones, so a training clip must have two.
    max_frames = limits.max_frames if facts.num_frames > facts.factors.time else 1
    check_frames(num_frames, facts.factors, max_frames=max_frames, fps=facts.fps, param=param)
    if body.num_frames is not None and body.seconds is not None:
        seconds = (num_frames - 1) / facts.fps
        if abs(seconds - body.seconds) > 0.5 / facts.fps:
            raise InvalidRequest(
                f"seconds {body.seconds:g} and num_frames {num_frames} disagree: {num_frames} "
                f"frames at {facts.fps:g} fps are {seconds:g} s. Give one of the two.",
                param="seconds",
            )
    return num_frames


def check_frames(
    num_frames: int,
    factors: CodecFactors,
    *,
    max_frames: int | None = None,
    fps: float | None = None,
    param: str = "num_frames",
) -> None:
    """Refuse a frame count that the codec cannot make, or that is over the cap.

    Args:
        num_frames: video frames.
        factors: of the model's codec.
        max_frames: the cap on video frames.
        fps: frames per second; with it, the message names the length in seconds too.
        param: the field of the request that said so.

    Raises:
        FrameCountError: with the count got, the rule and the nearest count that is allowed.

    >>> from flow.codec_factors import WAN_FACTORS
    >>> check_frames(16, WAN_FACTORS, max_frames=35)
    Traceback (most recent call last):
    ...
    serving.errors.FrameCountError: 16 frames cannot be made: counts are 4k+1, from 1 to 33; the \
nearest allowed is 17.
    """
    below, above = factors.near_frames(num_frames)
    # Half-way between two counts the longer one is nearest.
    near = below if num_frames - below < above - num_frames else above
    rule = f"counts are {factors.time}k+1" if factors.time > 1 else "counts are whole numbers"
    if max_frames is not None:
        highest, _ = factors.near_frames(max_frames)
        near = min(near, highest)
        rule += f", from 1 to {highest}"
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
    if first["type"] == "missing":
        return InvalidRequest(f"The required field {param!r} is missing.", param=param)
    problem = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    where = f"{param}: " if param else ""
    return InvalidRequest(f"{where}{problem}.", param=param)
