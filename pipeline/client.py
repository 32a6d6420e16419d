"""A client of the video service, as any user would write one: plain HTTP, no Ray.

The demo makes its videos through this, so what it shows went through everybody's door.
"""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from flowreel.errors import FlowreelError
from flowreel.files import write_whole
from media.frames import Frames
from media.write import encode_png
from pipeline.report import Sample

POLL_S = 0.1


class RequestFailed(FlowreelError, RuntimeError):
    """The service refused a request or failed it; the message is the service's own."""


@dataclass(frozen=True)
class Request:
    """A video to ask for.

    Attributes:
        kind: how it comes about, for the report.
        prompt: what is to be seen.
        num_frames: video frames, as many as the model's codec takes.
        seed: of the noise.
        image: first frame to continue, uint8 [H, W, 3].
    """

    kind: str
    prompt: str
    num_frames: int
    seed: int
    image: Frames | None = None

    @property
    def file_name(self) -> str:
        """Where the video goes, told by what it is."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")
        return f"{self.kind.replace(' ', '-')}-{self.seed:03d}-{words[:48]}.mp4"


@dataclass(frozen=True)
class Video:
    """A finished request: its mp4 in `sample`, its lossless frames, the spans of its replicas."""

    sample: Sample
    spans: list[dict[str, Any]]

    @property
    def frames(self) -> Frames:
        return self.sample.frames


class VideoClient:
    """Talks to one server.

    Example:
        with VideoClient("http://127.0.0.1:8000") as client:
            client.make(Request("text to video", "a red circle", 17, 0), Path("."))
    """

    def __init__(self, url: str, *, deadline_s: float = 600.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=30.0)
        self._deadline_s = deadline_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._http.close()

    def make(self, request: Request, out: Path) -> Video:
        """Ask, wait, and fetch: the mp4 is written to `out`.

        Raises:
            RequestFailed: refused, failed, or not done in time.
        """
        video_id = self._create(request)
        self._wait(video_id)
        path = out / request.file_name
        write_whole(path, self._get(f"/v1/videos/{video_id}/content").content)
        frames = np.load(
            io.BytesIO(self._get(f"/v1/videos/{video_id}/frames").content), allow_pickle=False
        )
        spans = self._get(f"/v1/videos/{video_id}/timeline").json()["spans"]
        return Video(Sample(request.prompt, request.kind, path, frames), spans)

    def _create(self, request: Request) -> str:
        fields = {"prompt": request.prompt, "num_frames": request.num_frames, "seed": request.seed}
        if request.image is None:
            answer = self._http.post("/v1/videos", json=fields)
        else:
            answer = self._http.post(
                "/v1/videos",
                data={key: str(value) for key, value in fields.items()},
                files={"input_reference": ("first.png", encode_png(request.image), "image/png")},
            )
        return str(self._checked(answer).json()["id"])

    def _wait(self, video_id: str) -> None:
        give_up = time.monotonic() + self._deadline_s
        while time.monotonic() < give_up:
            video = self._get(f"/v1/videos/{video_id}").json()
            if video["status"] == "completed":
                return
            if video["status"] in ("failed", "cancelled"):
                raise RequestFailed(f"video {video_id} {video['status']}: {video.get('error')}")
            time.sleep(POLL_S)
        raise RequestFailed(f"video {video_id} was not done within {self._deadline_s:g} s")

    def _get(self, path: str) -> httpx.Response:
        return self._checked(self._http.get(path))

    @staticmethod
    def _checked(answer: httpx.Response) -> httpx.Response:
        if answer.is_error:
            raise RequestFailed(
                f"{answer.request.method} {answer.request.url}: {answer.status_code} "
                f"{answer.text[:300]}"
            )
        return answer
