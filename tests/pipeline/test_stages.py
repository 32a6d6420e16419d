"""The story is told in order, and what a recipe says of the service is what the service gets."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import pipeline.stages as stages
from flowreel.errors import FlowreelWarning
from pipeline.recipes import load_recipe
from pipeline.watch import _steps


def test_the_story_begins_with_the_demo_and_follows_its_order() -> None:
    tree = ast.parse(inspect.getsource(stages))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert names[0] == "demo"
    order = ["make_shards", "prepare_latents", "train", "evaluate", "serve", "serve_and_sample"]
    assert [name for name in names if name in order] == order
    calls = [
        node.func.id
        for node in ast.walk(tree.body[[getattr(n, "name", "") for n in tree.body].index("demo")])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert {*order} - {"serve"} <= {*calls}, "the service is served to be sampled from"


@pytest.mark.parametrize(
    ("settings", "port", "listens"),
    [
        ([], None, 8000),
        (["serve.port=9123"], None, 9123),
        (["serve.port=9123"], 9200, 9200),
        (["serve.port=9123"], 0, 0),
        (["serve.port=0"], None, 0),
    ],
)
def test_the_service_listens_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], port: int | None, listens: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(stages, "serve_model", lambda spec, *_, **__: asked.append(spec.port))
    stages.serve(load_recipe("tiny", settings), Path("model"), Path("served"), port=port)
    assert asked == [listens]


def test_the_shipped_recipes_leave_the_port_open() -> None:
    assert load_recipe("tiny").serve.port is None


def test_what_a_worker_warned_of_is_said_by_the_driver() -> None:
    shown: list[tuple[int, int, str]] = []
    show = _steps(lambda *progress: shown.append(progress), 9)
    record = {"step": 3, "mode": "video", "loss_nats_per_dim": 1.0}
    show([record])
    with pytest.warns(FlowreelWarning, match="^step_00000006 is damaged$"):
        show([{**record, "step": 4, "warnings": ["step_00000006 is damaged"]}])
    assert shown == [(4, 9, "1.000 nats/dim"), (5, 9, "1.000 nats/dim")]
