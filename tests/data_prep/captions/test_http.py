"""An endpoint that fails, stalls, lies, recovers: a caption or a named failure for every clip."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import ValidationError

from data_prep.captions.captioner import CaptionerUnavailable, CaptionResult
from data_prep.captions.config import CaptionConfig
from data_prep.captions.http import HttpCaptioner
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip
from pipeline.recipes import RecipeError, load_recipe
from tests.data_prep.chat_endpoint import (
    Endpoint,
    completion,
    described,
    endless,
    pictures,
    serving,
)

CLIPS = [render_clip(random_scene(seed), 9, 8.0, 48, 64) for seed in range(6)]
KEY = "sk-very-secret-123"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as running:
        yield running


BASE = {
    "backend": "http", "model": "some/vlm", "endpoint": "http://127.0.0.1:1/v1",
    "backoff_s": 0.01, "retries": 3, "frames": 3,
}  # fmt: skip


def settings(endpoint: Endpoint | str, **values: Any) -> CaptionConfig:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return CaptionConfig.model_validate({**BASE, "endpoint": url, **values})


def captions(config: CaptionConfig, clips: list[np.ndarray], seed: int = 0) -> list[CaptionResult]:
    captioner = HttpCaptioner(config, seed=seed)
    try:
        return captioner.caption_all(clips)
    finally:
        captioner.close()


def refuse(status: int, **headers: str) -> Any:
    return JSONResponse({"error": {"message": "no"}}, status_code=status, headers=headers)


def test_a_request_is_a_chat_with_the_clips_frames_and_greedy_decoding(endpoint: Endpoint) -> None:
    config = settings(endpoint, prompt="What moves?", max_tokens=17)
    (written,) = captions(config, CLIPS[:1], seed=5)
    (body,) = endpoint.requests
    assert written == CaptionResult(described(body))
    assert (body["model"], body["max_tokens"]) == ("some/vlm", 17)
    assert (body["temperature"], body["seed"]) == (0, 5)
    (message,) = body["messages"]
    assert message["content"][-1] == {"type": "text", "text": "What moves?"}
    shown = pictures(body)
    assert len(shown) == 3
    for picture, index in zip(shown, (0, 4, 8), strict=True):
        difference = np.abs(picture.astype(int) - CLIPS[0][index].astype(int))
        assert difference.mean() < 3  # JPEG
    assert "authorization" not in endpoint.headers[0]


def test_captions_come_back_in_order_with_so_many_requests_at_a_time(endpoint: Endpoint) -> None:
    endpoint.delay_s = 0.05
    together = captions(settings(endpoint, requests_in_flight=3), CLIPS)
    assert endpoint.most_at_once == 3
    endpoint.delay_s = 0.0
    one_by_one = captions(settings(endpoint, requests_in_flight=1), CLIPS)
    assert together == one_by_one
    assert len({written.text for written in together}) == len(CLIPS)
    assert endpoint.most_at_once == 3


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again_until_it_does(endpoint: Endpoint, status: int) -> None:
    endpoint.behave = lambda e, r, body: refuse(status) if e.tries(body) < 3 else None
    written = captions(settings(endpoint), CLIPS)
    assert not any(result.error for result in written)
    assert len(endpoint.requests) == 3 * len(CLIPS)


def test_answers_that_are_no_chat_completion_are_tried_again(endpoint: Endpoint) -> None:
    answers = [Response(b"<html>"), JSONResponse({"choices": []}), JSONResponse([1]), None]
    endpoint.behave = lambda e, r, body: answers[e.tries(body) - 1]
    (written,) = captions(settings(endpoint), CLIPS[:1])
    assert written.text
    assert len(endpoint.requests) == 4


def test_retries_end_and_the_failure_is_recorded_for_that_clip_alone(endpoint: Endpoint) -> None:
    bad: list[dict[str, Any]] = []

    def behave(e: Endpoint, r: Any, body: dict[str, Any]) -> Any:
        if not bad:
            bad.append(body)
        return refuse(502) if body == bad[0] else None

    endpoint.behave = behave
    written = captions(settings(endpoint, requests_in_flight=1), CLIPS)
    assert written[0] == CaptionResult("", "endpoint_error: status 502")
    assert all(result.text for result in written[1:])
    assert endpoint.tries(bad[0]) == 4


def test_pauses_grow_and_the_endpoints_own_wish_comes_first(endpoint: Endpoint) -> None:
    endpoint.behave = lambda e, r, body: refuse(503)
    captions(settings(endpoint, backoff_s=0.1, retries=2), CLIPS[:1])
    first, second, third = endpoint.times_s
    assert second - first >= 0.1
    assert third - second >= 0.2
    endpoint.times_s.clear()
    endpoint.behave = lambda e, r, body: refuse(429, **{"retry-after": "1"})
    captions(settings(endpoint, retries=1), CLIPS[:1])
    assert endpoint.times_s[1] - endpoint.times_s[0] >= 1


@pytest.mark.parametrize(
    ("values", "code"),
    [({"request_timeout_s": 0.3, "retries": 1}, "timeout"), ({"deadline_s": 0.4}, "timeout")],
)
def test_an_endpoint_that_stalls_or_drips_is_left_at_the_deadline(
    endpoint: Endpoint, values: dict[str, Any], code: str
) -> None:
    endpoint.behave = lambda e, r, body: endless()
    (written,) = captions(settings(endpoint, **values), CLIPS[:1])
    assert written.error.startswith(f"{code}: ")
    assert len(endpoint.requests) == values.get("retries", 0) + 1


def test_an_answer_beyond_the_cap_is_not_read_to_its_end(endpoint: Endpoint) -> None:
    endpoint.behave = lambda e, r, body: completion("x" * 5_000_000)
    (written,) = captions(settings(endpoint, max_response_bytes=4096), CLIPS[:1])
    assert written == CaptionResult("", "response_too_large: over 4096 bytes")
    assert len(endpoint.requests) == 1


def test_a_clip_that_is_refused_and_an_empty_answer_are_that_clips_own(endpoint: Endpoint) -> None:
    endpoint.behave = lambda e, r, body: refuse(400)
    (written,) = captions(settings(endpoint), CLIPS[:1])
    assert written.error.startswith("endpoint_refused: status 400")
    endpoint.behave = lambda e, r, body: completion(None)
    assert captions(settings(endpoint), CLIPS[:1])[0].error.startswith("empty_caption")
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_unknown_model_stops_the_run(endpoint: Endpoint, status: int) -> None:
    endpoint.behave = lambda e, r, body: refuse(status)
    with pytest.raises(CaptionerUnavailable, match=f"answered {status}.*captioner.endpoint"):
        captions(settings(endpoint), CLIPS)


def test_nobody_there_is_a_failure_after_the_retries() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        (written,) = captions(settings(url), CLIPS[:1])
    assert written == CaptionResult("", "no_connection: ConnectError")


def test_the_key_is_sent_and_nowhere_else_to_be_seen(
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OUR_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    config = settings(endpoint, api_key_env="OUR_KEY")
    keys_sent: list[str] = []

    def behave(e: Endpoint, r: Any, body: dict[str, Any]) -> Any:
        keys_sent.append(r.headers["authorization"])
        # Some endpoints repeat what they were sent.
        return JSONResponse({"error": f"bad header {keys_sent[-1]}"}, status_code=400)

    endpoint.behave = behave
    (written,) = captions(config, CLIPS[:1])
    assert keys_sent == [f"Bearer {KEY}"]
    endpoint.behave = lambda e, r, body: JSONResponse({"no": KEY}, status_code=401)
    with pytest.raises(CaptionerUnavailable) as caught:
        captions(config, CLIPS[:1])
    spoken = [written.error, str(caught.value), caplog.text, config.model_dump_json()]
    assert "bad header" in spoken[0]
    assert not any(KEY in text for text in spoken)


def test_a_redirect_is_not_followed_with_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_KEY", KEY)
    with serving() as thief:
        elsewhere = f"{thief.url}/chat/completions"
        endpoint.behave = lambda e, r, body: RedirectResponse(elsewhere, status_code=307)
        (written,) = captions(settings(endpoint, api_key_env="OUR_KEY"), CLIPS[:1])
        assert written.error.startswith("endpoint_refused: status 307")
        assert thief.requests == []


def test_a_key_that_is_not_set_is_asked_for_by_name(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUR_KEY", raising=False)
    with pytest.raises(CaptionerUnavailable, match="OUR_KEY"):
        HttpCaptioner(settings(endpoint, api_key_env="OUR_KEY"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"endpoint": "ftp://host/v1"}, "http or https"),
        ({"endpoint": "host:8000"}, "such as http://host:8000/v1"),
        ({"endpoint": f"http://user:{KEY}@host/v1"}, "api_key_env"),
        ({"endpoint": f"http://host/v1?key={KEY}"}, "api_key_env"),
        ({"endpoint": None}, "needs captioner.endpoint"),
        ({"model": None}, "needs captioner.model"),
        ({"api_key_env": KEY}, "api_key_env"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_rule(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        CaptionConfig.model_validate({**BASE, **values})
    assert KEY not in str(caught.value)
    override = f"prepare.captioner={json.dumps({**BASE, **values})}"
    with pytest.raises(RecipeError, match=words) as refusal:
        load_recipe("tiny", [override])
    assert KEY not in str(refusal.value)
