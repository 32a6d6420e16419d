"""Every way in which the service refuses a request or fails a video, as one tree.

    FlowreelError
    └── ServingError            500  server_error          a fault of the service
        ├── InvalidRequest      400  invalid_value         a field is wrong
        │   └── FrameCountError 400  invalid_frame_count   the model cannot make so many frames
        ├── NotFound            404  not_found             there is no such video
        ├── NotReady            409  video_not_ready       the video is not finished, or failed
        ├── UploadTooLarge      413  upload_too_large      the body is over the cap
        ├── QueueFull           429  queue_full            come back after `retry_after_s`
        ├── ReplicaFailed       500  stage_failed          a replica died or raised at its work
        ├── ResultNotWritten    500  result_not_written    the finished video could not be stored
        ├── VideoInterrupted    500  interrupted           the service stopped at its work
        ├── ReplicasNotReady    503  not_ready             the replicas do not answer yet
        └── DeadlineExceeded    504  deadline_exceeded     not finished within the deadline

A client sees an error in one of two places: as the body of an answer with the status in the second
column, or as `error` of a failed video. The code in the third column is in both; it is a promise to
clients, and stays when a class is renamed. Every error survives pickling, as it must to leave a
replica. Knows nothing of Ray, models or tensors.
"""

from __future__ import annotations

from typing import Any

from flowreel.errors import FlowreelError


class ServingError(FlowreelError):
    """The root: an HTTP status and the four fields of OpenAI's error body.

    >>> error = QueueFull("16 videos are waiting, which is all that may.", retry_after_s=8)
    >>> error.status, error.body()["error"]["code"]
    (429, 'queue_full')
    """

    status = 500
    type = "server_error"
    code = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        """Take what the client reads.

        Args:
            message: what was got, the rule, and the next step.
            param: the field of the request that is at fault.
            retry_after_s: seconds after which the same request may be accepted.
        """
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is unpickled as `type(*args)` by default, which would lose both keywords.
        return _rebuild_error, (type(self), self.message, self.param, self.retry_after_s)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`."""
        return error_body(self.message, self.type, self.param, self.code)


def _rebuild_error(
    kind: type[ServingError], message: str, param: str | None, retry_after_s: int | None
) -> ServingError:
    return kind(message, param=param, retry_after_s=retry_after_s)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body, for a refusal that has no class here (an unknown route)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InvalidRequest(ServingError):
    """A field of the request is wrong; `param` names it."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class FrameCountError(InvalidRequest):
    """A number of frames that the model cannot make; the message names the nearest that it can."""

    code = "invalid_frame_count"


class NotFound(ServingError):
    """There is no such video, or none of this kind of file of it."""

    status, type, code = 404, "invalid_request_error", "not_found"


class NotReady(ServingError):
    """The video is not in the state that the request needs."""

    status, type, code = 409, "invalid_request_error", "video_not_ready"


class UploadTooLarge(ServingError):
    """The body of the request is over the cap."""

    status, type, code = 413, "invalid_request_error", "upload_too_large"


class QueueFull(ServingError):
    """As many videos wait as may; `retry_after_s` says when to come back."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class ReplicaFailed(ServingError):
    """A replica died or raised while it worked for the video."""

    code = "stage_failed"


class ResultNotWritten(ServingError):
    """The video was made, and could not be encoded or stored."""

    code = "result_not_written"


class VideoInterrupted(ServingError):
    """The service stopped while the video was being made."""

    code = "interrupted"


class ReplicasNotReady(ServingError):
    """Not every replica answers yet."""

    status, code = 503, "not_ready"


class DeadlineExceeded(ServingError):
    """The video was not finished within the deadline."""

    status, code = 504, "deadline_exceeded"
