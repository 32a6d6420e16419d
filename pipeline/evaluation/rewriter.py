"""Prompts in more words: what a benchmark asks in five, a model may want to read in thirty.

By any OpenAI-compatible chat endpoint, or by a language model of transformers in this process. The
key of an endpoint is read from the environment and written nowhere. Knows nothing of videos.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import httpx

from flowreel.errors import FlowreelError

REQUEST = (
    "Rewrite this prompt of a short video as one detailed English sentence. Keep everything that "
    "it says, add how things look and move, and answer with the sentence alone.\n\n{prompt}"
)
KEY_VARIABLE = "FLOWREEL_REWRITER_KEY"
TRIES, PAUSE_S, TIMEOUT_S = 4, 1.0, 120.0
MAX_NEW_TOKENS = 120

Rewriter = Callable[[str], str]


class RewriterError(FlowreelError, RuntimeError):
    """A rewriter that cannot be reached or loaded, or that answers with nothing."""


def rewriter_of(where: str, model: str | None) -> Rewriter:
    """The rewriter at an address, or of a folder or hub id.

    Args:
        where: `http://host:port/v1` of a chat endpoint, or a causal language model of transformers.
        model: the endpoint's model; only endpoints need one.

    Raises:
        RewriterError: an endpoint without a model, or a model that cannot be loaded.
    """
    if not where.startswith(("http://", "https://")):
        return local_rewriter(where)
    if not model:
        raise RewriterError(
            f"--rewriter {where} is an endpoint, which serves several models: name one with "
            "--rewriter-model"
        )
    return endpoint_rewriter(where, model)


def endpoint_rewriter(url: str, model: str) -> Rewriter:
    """Ask a chat endpoint; what may pass (no connection, 429, 5xx) is tried again a few times."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    headers = {"authorization": f"Bearer {key}"} if key else {}

    def rewrite(prompt: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": REQUEST.format(prompt=prompt)}],
            "max_tokens": MAX_NEW_TOKENS,
            "temperature": 0,
        }
        failure = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                answer = httpx.post(
                    f"{url.rstrip('/')}/chat/completions",
                    json=body,
                    headers=headers,
                    timeout=TIMEOUT_S,
                )
            except httpx.TransportError as error:
                failure = type(error).__name__
                continue
            if answer.status_code == 200:
                return _sentence(_content(answer, url), url)
            failure = f"status {answer.status_code}"
            if answer.status_code != 429 and answer.status_code < 500:
                break
        raise RewriterError(
            f"the rewriter at {url} gave no answer ({failure}); check the address, "
            f"--rewriter-model {model} and the key in {KEY_VARIABLE}, and run again: what was "
            "rewritten is kept"
        )

    return rewrite


def _content(answer: httpx.Response, url: str) -> Any:
    try:
        return answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise RewriterError(
            f"the rewriter at {url} answered with no chat completion; give the address of an "
            "OpenAI-compatible endpoint, up to and with /v1"
        ) from error


def local_rewriter(source: str) -> Rewriter:
    """A causal language model of transformers, with its own chat template where it has one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).eval()
    except (OSError, ValueError) as error:
        raise RewriterError(
            f"no language model at --rewriter {source} ({str(error).splitlines()[0]}); give a "
            "folder or hub id of one, or the address of an endpoint"
        ) from error

    @torch.inference_mode()
    def rewrite(prompt: str) -> str:
        text = REQUEST.format(prompt=prompt)
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        # A template writes the first token itself; the tokenizer would write it again.
        asked = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        made = model.generate(
            **asked,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        new = made[0, asked["input_ids"].shape[1] :]
        return _sentence(tokenizer.decode(new, skip_special_tokens=True), source)

    return rewrite


def _sentence(text: Any, source: str) -> str:
    """The answer on one line."""
    words = " ".join(text.split()).strip('"') if isinstance(text, str) else ""
    if not words:
        raise RewriterError(f"the rewriter {source} answered with no text; choose another model")
    return words
