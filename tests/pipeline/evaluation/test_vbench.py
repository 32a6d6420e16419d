"""Samples for VBench: found where its package looks, made once, from what a rewriter says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from media.read import read_video
from pipeline.console import Reporter
from pipeline.evaluation import rewriter as rewriters
from pipeline.evaluation.command import VBenchJob, sample_for_vbench
from pipeline.evaluation.options import Options
from pipeline.evaluation.rewriter import RewriterError, rewriter_of
from pipeline.evaluation.samples import Sampling
from pipeline.evaluation.vbench import VBenchError, read_prompts, run_vbench, write_samples
from serving.loading import LoadedModel
from tests.data_prep.chat_endpoint import completion, serving
from tests.data_prep.vlm_models import tokenizer_with
from tests.serving.conftest import loaded as loaded
from tests.serving.conftest import (
    model_dir as model_dir,
)  # the tiny model folder of the service's tests

ENTRIES: list[dict[str, Any]] = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
]
SAMPLING = Sampling(guidance=1.0, seed=7)


@pytest.fixture
def prompt_list(tmp_path: Path) -> Path:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_videos_are_where_the_package_looks_for_them(loaded: LoadedModel, tmp_path: Path) -> None:
    paths = write_samples(loaded, ENTRIES, tmp_path, SAMPLING, model="m")
    there = {path.name for path in (tmp_path / "videos").iterdir()}
    # Its standard mode: the prompt, a dash, 0 to 4; its custom mode: a map from file to prompt.
    wanted = {f"{entry['prompt_en']}-{i}.mp4" for entry in ENTRIES for i in range(5)}
    assert there == wanted == set(json.loads((tmp_path / "prompts.json").read_text()))
    assert json.loads((tmp_path / "full_info.json").read_text()) == ENTRIES
    lines = json.loads((tmp_path / "manifest.json").read_text())["videos"]
    assert {tmp_path / line["file"] for line in lines} == set(paths)
    assert sorted({line["seed"] for line in lines}) == [7, 8, 9, 10, 11]
    assert read_video(paths[0]).frames.shape == (9, 32, 32, 3)
    assert len({path.read_bytes() for path in paths}) == 10


def test_a_run_goes_on_and_what_was_made_otherwise_is_made_again(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    paths = write_samples(loaded, ENTRIES[:1], tmp_path, SAMPLING, model="m")
    content = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[2].unlink()
    seen: list[tuple[int, int]] = []
    write_samples(
        loaded, ENTRIES[:1], tmp_path, SAMPLING, model="m", progress=lambda *now: seen.append(now)
    )
    assert seen == [(4, 5), (5, 5)]
    assert [path.read_bytes() for path in paths] == content
    kept = [i for i, path in enumerate(paths) if path.stat().st_mtime_ns == times[i]]
    assert kept == [0, 1, 3, 4]
    write_samples(loaded, ENTRIES[:1], tmp_path, Sampling(guidance=5.0, seed=7), model="m")
    assert all(path.read_bytes() != before for path, before in zip(paths, content, strict=True))


def test_the_model_reads_what_an_endpoint_rewrote_once(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriters, "PAUSE_S", 0.0)
    monkeypatch.setenv(rewriters.KEY_VARIABLE, "secret-key")
    plain = write_samples(loaded, ENTRIES[:1], tmp_path / "plain", SAMPLING, model="m")
    with serving() as endpoint:
        endpoint.behave = lambda _endpoint, _request, _body: (
            _status(503) if len(endpoint.requests) == 1 else completion("A large\n red sign. ")
        )
        rewriter = rewriter_of(endpoint.url, "some-model")
        for _ in range(2):
            paths = write_samples(
                loaded, ENTRIES[:1], tmp_path / "more", SAMPLING, model="m", rewriter=rewriter
            )
    # Once refused for a moment, once answered, and the second run asked nothing.
    assert len(endpoint.requests) == 2
    assert endpoint.requests[1]["model"] == "some-model"
    assert ENTRIES[0]["prompt_en"] in endpoint.requests[1]["messages"][0]["content"]
    assert endpoint.headers[1]["authorization"] == "Bearer secret-key"
    kept = json.loads((tmp_path / "more" / "rewritten.json").read_text())
    assert kept == {ENTRIES[0]["prompt_en"]: "A large red sign."}
    assert [path.name for path in paths] == [path.name for path in plain]
    assert paths[0].read_bytes() != plain[0].read_bytes()
    for path in (tmp_path / "more").glob("*.json"):
        assert "secret-key" not in path.read_text()


def _status(code: int) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": "no"}, status_code=code)


def test_a_refusing_endpoint_and_a_missing_model_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rewriters, "PAUSE_S", 0.0)
    with serving() as endpoint:
        endpoint.behave = lambda _endpoint, _request, _body: _status(401)
        with pytest.raises(RewriterError, match="gave no answer \\(status 401\\)"):
            rewriter_of(endpoint.url, "m")("a cat")
        assert len(endpoint.requests) == 1
        endpoint.behave = lambda _endpoint, _request, _body: completion("")
        with pytest.raises(RewriterError, match="answered with no text"):
            rewriter_of(endpoint.url, "m")("a cat")
        with pytest.raises(RewriterError, match="name one with --rewriter-model"):
            rewriter_of(endpoint.url, None)
    with pytest.raises(RewriterError, match="no language model at --rewriter"):
        rewriter_of(str(tmp_path), None)


def test_a_language_model_rewrites_in_this_process(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_with([])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=1024,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewrite = rewriter_of(str(tmp_path), None)
    first = rewrite("a red circle")
    assert first
    assert "\n" not in first
    assert rewrite("a red circle") == first


def test_a_list_that_is_none_and_a_prompt_without_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    for entries, said in (
        ({"a": 1}, "no prompt list of VBench"),
        ([{"prompt_en": "a"}], "no prompt list of VBench"),
        ([{"prompt_en": "cat/dog", "dimension": []}], "must have no /"),
        ([{"prompt_en": "é" * 200, "dimension": []}], "at most 250 bytes"),
    ):
        path.write_text(json.dumps(entries))
        with pytest.raises(VBenchError, match=said):
            read_prompts(path)
    with pytest.raises(VBenchError, match="pip install --no-deps vbench"):
        read_prompts(None)


def test_where_vbench_is_not_it_is_said_what_to_type(
    model_dir: Path, prompt_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = VBenchJob(tmp_path / "out", prompt_list, first=1)
    found = sample_for_vbench(model_dir, Options(), job, Reporter(quiet=True))
    assert (found["videos"], found["results"]) == (5, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "not scored: the package vbench is not here" in said
    assert "--dimension NAME`, NAME one of temporal_flickering" in said


STAND_IN = """
import json
from pathlib import Path


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.entries, self.out = json.loads(Path(full_info_dir).read_text()), Path(output_path)
        self.out.mkdir(exist_ok=True)

    def evaluate(self, videos_path, name, dimension_list):
        there = {path.name for path in Path(videos_path).iterdir()}
        counts = {
            dimension: sum(
                f"{entry['prompt_en']}-{i}.mp4" in there
                for entry in self.entries if dimension in entry["dimension"] for i in range(5)
            )
            for dimension in dimension_list
        }
        (self.out / f"{name}_eval_results.json").write_text(json.dumps(counts))
"""


@pytest.mark.slow
def test_where_vbench_is_it_scores(
    model_dir: Path, prompt_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's weights cannot be had here: a package that counts stands in for it."""
    package = tmp_path / "site" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    job = VBenchJob(tmp_path / "out", prompt_list)
    assert run_vbench(tmp_path / "out", ENTRIES, Reporter(quiet=True)) is None
    (tmp_path / "weights").mkdir()
    found = sample_for_vbench(model_dir, Options(), job, Reporter(quiet=True))
    assert found["results"] == {"color": 5, "temporal_flickering": 5}
    (package / "__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(VBenchError, match="vbench ended with code 3"):
        run_vbench(tmp_path / "out", ENTRIES, Reporter(quiet=True))
