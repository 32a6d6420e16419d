"""Settings of the captioner, and what of them decides a caption.

Knows nothing of how captions are written.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, model_validator

from data_prep.strict import Strict


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        hidden = parts.username or parts.password or parts.query or parts.fragment
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not hidden
    except ValueError:
        return False


class CaptionConfig(Strict):
    """Who writes the synthetic captions, and how. A plain name is a back end with its defaults.

    What decides the words is in `PrepareConfig.caption_digest`. Where an endpoint is, how often it
    is asked and how long it may take are not: they may change between runs of one output.

    >>> CaptionConfig().settings()
    {}
    >>> config = CaptionConfig(backend="http", model="m", endpoint="http://host:8000/v1", frames=2)
    >>> sorted(config.settings())
    ['frames', 'image_prompt', 'max_tokens', 'model', 'prompt', 'revision']
    """

    # A value may hold a secret, such as a key in an endpoint's URL.
    model_config = ConfigDict(hide_input_in_errors=True)

    backend: Literal["auto", "measured", "none", "vlm", "vllm", "http"] = Field(
        default="auto",
        description="measured: read from the pixels of moving shapes, no weights; other video is "
        "refused. auto: measured for moving shapes, none for other video. none: no synthetic "
        "captions; training reads the original ones. vlm: a transformers model in the captioning "
        "actors. vllm: the same on vLLM, through ray.data.llm (GPUs; extra flowreel[vllm]). http: "
        "any OpenAI-compatible chat endpoint.",
    )
    any_video: bool = Field(
        default=False,
        description="Let measured caption video that is not of moving shapes too, of which it says "
        "little that is true.",
    )
    model: str | None = Field(
        default=None, description="Folder or hub id (vlm, vllm), or the endpoint's name for it."
    )
    revision: str | None = Field(
        default=None, description="Hub revision of the model: a commit keeps captions repeatable."
    )
    prompt: str = Field(
        default="Describe this video in one or two plain sentences: who or what is seen, what "
        "happens, where, and how the camera moves. The images are its frames in order.",
        min_length=1,
        description="What the model is asked about a clip.",
    )
    image_prompt: str = Field(
        default="Describe this picture in one or two plain sentences: who or what is seen, and "
        "where.",
        min_length=1,
        description="What the model is asked about a clip of one frame.",
    )
    frames: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Frames shown, evenly spaced, first and last among them.",
    )
    max_tokens: int = Field(default=96, ge=1, le=4096, description="Longest caption, in tokens.")
    batch_size: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Clips in one call (vlm: every call is padded to it; vllm: rows in a batch).",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Precision of the model's weights (vlm, vllm)."
    )
    threads: int = Field(
        default=1, ge=1, le=64, description="CPU threads of a captioning actor (vlm; fixed)."
    )
    endpoint: str | None = Field(
        default=None,
        description="Base URL of the endpoint, such as http://host:8000/v1 (http).",
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable of the Ray workers that holds the endpoint's bearer key; "
        "None sends no key.",
    )
    requests_in_flight: int = Field(
        default=8, ge=1, le=1024, description="Requests of one captioning actor at a time (http)."
    )
    retries: int = Field(
        default=5, ge=0, le=100, description="Tries after the first before a caption is given up."
    )
    backoff_s: float = Field(
        default=1.0, gt=0, description="Seconds before the first retry; doubles, at most 60."
    )
    request_timeout_s: float = Field(default=60.0, gt=0, description="Seconds for one request.")
    deadline_s: float = Field(
        default=300.0, gt=0, description="Seconds for one caption, with all its retries."
    )
    max_response_bytes: int = Field(
        default=1 << 20,
        ge=1024,
        description="Largest answer of the endpoint that is read, in bytes.",
    )
    give_up_after: int = Field(
        default=32,
        ge=1,
        description="Captions that may fail in a row in one actor before the run stops.",
    )
    batch_invariant: bool = Field(
        default=True,
        description="vLLM's batch-invariant kernels, so that a caption does not depend on its "
        "neighbours (H100 or newer); false trades that for speed and older GPUs.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Further engine arguments of vLLM, such as tensor_parallel_size.",
    )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> CaptionConfig:
        if self.any_video and self.backend != "measured":
            raise ValueError(
                f"captioner.any_video is for captioner.backend 'measured', not {self.backend!r}; "
                "leave it out"
            )
        if self.needs_model and not self.model:
            what = "the endpoint's name of it" if self.backend == "http" else "a folder or hub id"
            raise ValueError(f"captioner.backend {self.backend!r} needs captioner.model: {what}")
        if self.backend == "http" and not self.endpoint:
            raise ValueError(
                "captioner.backend 'http' needs captioner.endpoint, such as http://host:8000/v1"
            )
        # These messages do not repeat the value, which may hold a secret.
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "captioner.api_key_env is no name of an environment variable; put the key into one "
                "and give its name here"
            )
        if self.endpoint and not _is_plain_url(self.endpoint):
            raise ValueError(
                "captioner.endpoint must be a plain base URL such as http://host:8000/v1: http or "
                "https, no user, password or query; a key goes into the environment variable that "
                "captioner.api_key_env names"
            )
        return self

    @property
    def needs_model(self) -> bool:
        """Whether a model writes, here or behind an endpoint."""
        return self.backend in ("vlm", "vllm", "http")

    @property
    def only_moving_shapes(self) -> bool:
        """Whether clips of other video get no synthetic caption."""
        return self.backend in ("auto", "measured") and not self.any_video

    def settings(self) -> dict[str, Any]:
        """What decides a caption, given the clip; a model's folder counts by its content."""
        if self.backend == "measured":
            return {"any_video": self.any_video}
        if not self.needs_model:
            return {}
        names = ["model", "revision", "prompt", "image_prompt", "frames", "max_tokens"]
        if self.backend in ("vlm", "vllm"):
            names += ["dtype"]
        # The shape of a call decides which kernels run, and so the last bits.
        names += {"vlm": ["batch_size", "threads"], "vllm": ["batch_invariant", "engine"]}.get(
            self.backend, []
        )
        values = {name: getattr(self, name) for name in names}
        if self.backend != "http" and self.model and Path(self.model).is_dir():
            values["model"] = folder_identity(Path(self.model))
        return values


_SAMPLED_BYTES = 1 << 20


def folder_identity(folder: Path) -> str:
    """What tells one model folder from another without reading all its weights.

    A hash of every file's name and size, of small files whole and of large ones the first and last
    MiB: training changes weights everywhere. Hidden files (download caches) do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        size_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size_bytes}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            if size_bytes > _SAMPLED_BYTES:
                file.seek(max(_SAMPLED_BYTES, size_bytes - _SAMPLED_BYTES))
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]
