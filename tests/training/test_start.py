"""A run that starts from what exists: its weights before the first step, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flow.config import tiny
from flow.flow import FlowModel
from flow.model_folder import load_model, read_spec, save_model, write_model
from flow.text import TextSpec
from flowreel.errors import FlowreelWarning
from tests.flow.models import shaken
from tests.training import workers
from tests.training.world import small_config, small_request, two_workers, write_dataset
from training.run import check_run, train_in_process
from training.start.load import load_start
from training.start.source import StartError, open_start
from training.state.checkpoint import CheckpointMismatch, latest_complete, load_averaged

STILL = {"flow_learning_rate": 1e-30, "denoiser_learning_rate": 1e-30, "weight_decay": 0.0}
"""An optimizer that leaves the weights where they are, in fp32."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps."""
    out = tmp_path_factory.mktemp("first")
    train_in_process(small_request(dataset, out, small_config(steps=4)))
    return out


def from_(path: Path, **changes: Any) -> Any:
    return small_config(start_from=str(path), **changes)


def weights(out: Path, **flow: Any) -> dict[str, Tensor]:
    """Averaged weights of a run's newest checkpoint."""
    checkpoint = latest_complete(out / "checkpoints")
    assert checkpoint is not None
    model = FlowModel(tiny(**flow))
    load_averaged(checkpoint, model)
    return model.state_dict()


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.allclose(a[name], b[name], rtol=0, atol=1e-25)] == []


def test_a_run_its_checkpoint_and_its_model_are_the_same_start(run: Path) -> None:
    checkpoint = latest_complete(run / "checkpoints")
    assert checkpoint is not None
    model = load_model(run / "model")[0].state_dict()
    digests = set()
    for path in (run, checkpoint.path, run / "model"):
        source = open_start(path)
        digests.add(source.digest())
        assert_equal({name: source.read(name) for name in source.shapes}, dict(model))
    assert len(digests) == 1


def test_a_fresh_run_begins_with_these_weights_and_a_fresh_optimizer(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    result = train_in_process(
        small_request(dataset, tmp_path, from_(run, steps=1, optimizer=STILL))
    )
    assert result.resumed_from is None
    assert_equal(weights(tmp_path), weights(run))
    checkpoint = latest_complete(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.description["train"]["start_from"] == str(run)
    assert checkpoint.description["start"] == {"digest": open_start(run).digest()}


@pytest.mark.slow
def test_two_workers_start_where_one_does_grown_or_not(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    shape = {"deep_width": 64, "layers_per_block": (1, 1, 1, 3)}
    results = {}
    for name, config in (
        ("one", from_(run, steps=1, optimizer=STILL)),
        ("two", from_(run, steps=1, optimizer=STILL, workers=two_workers())),
    ):
        request = small_request(dataset, tmp_path / name, config, flow=tiny(**shape))
        if name == "one":
            train_in_process(request)
        else:
            workers.run(config, check_run(request).job)
        results[name] = weights(tmp_path / name, **shape)
    assert_equal(results["one"], results["two"])
    small, large = FlowModel(tiny()), FlowModel(tiny(**shape))
    small.load_state_dict(weights(run))
    large.load_state_dict(results["one"])
    x, text = torch.randn(2, 3, 4, 2, 3), torch.randn(2, 6, 16)
    before, after = small.flow(x, text).loss(), large.flow(x, text).loss()
    assert after.item() == pytest.approx(before.item(), abs=1e-6)


def test_half_precision_on_disk_is_grown_without_rounding(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    model, spec = load_model(run / "model")
    shaken(model)
    write_model(tmp_path / "half", model.state_dict(), spec, dtype=torch.bfloat16)
    half, _ = load_model(tmp_path / "half")
    flow = tiny(deep_width=64)
    request = small_request(dataset, tmp_path / "out", from_(tmp_path / "half"), flow=flow)
    start = check_run(request).job.start
    assert start is not None
    large = FlowModel(flow)
    load_start(large, start)
    x, text = torch.randn(2, 3, 4, 2, 3), torch.randn(2, 6, 16)
    before, after = half.flow(x, text).nats(), large.flow(x, text).nats()
    assert (after - before).abs().max() < 1e-4


def test_the_workers_read_the_checkpoint_that_was_looked_at(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    start = check_run(small_request(dataset, tmp_path, from_(run))).job.start
    newest = latest_complete(run / "checkpoints")
    assert start is not None
    assert newest is not None
    assert Path(start.path) == newest.path


def test_a_run_goes_on_without_a_look_at_what_it_started_from(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(run / "model", source)
    schedule = {"optimizer": {"schedule_steps": 6}}
    whole, halves = (small_request(dataset, tmp_path / name) for name in ("whole", "halves"))
    train_in_process(small_request(dataset, whole.out, from_(source, **schedule)))
    train_in_process(small_request(dataset, halves.out, from_(source, steps=3, **schedule)))
    shutil.rmtree(source)
    again = train_in_process(small_request(dataset, halves.out, from_(source, **schedule)))
    assert again.resumed_from == 3
    assert_equal(weights(halves.out), weights(whole.out))
    with pytest.raises(
        CheckpointMismatch, match=r"train.start_from is '.*' but the checkpoint has"
    ):
        check_run(small_request(dataset, halves.out, from_(run, **schedule)))
    with pytest.raises(CheckpointMismatch, match=r"train\.start_from is None but"):
        check_run(small_request(dataset, halves.out, small_config(**schedule)))


def test_everything_that_does_not_fit_is_named_before_anything_is_written(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    model, spec = load_model(run / "model")
    fields = spec.to_dict() | {"codec_digest": "f" * 16}
    save_model(tmp_path / "other", model, type(spec).from_dict(fields))
    flow = tiny(head_dim=20, shallow_width=40, deep_width=20, text_dim=32)
    request = small_request(
        dataset,
        tmp_path / "out",
        from_(tmp_path / "other"),
        flow=flow,
        text=TextSpec("hashed", 6, 32),
    )
    with pytest.raises(StartError) as caught:
        check_run(request)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "model.deep_width is 20 but that model has 32",
        "model.head_dim is 20 but that model has 32",
        "text is hashed of width 32 but that model reads hashed of width 16",
        "the latents are of codec 0123456789abcdef but that model's are of ffffffffffffffff",
    ):
        assert part in message
    assert not (tmp_path / "out").exists()


def test_latents_of_another_convention_are_said(run: Path, dataset: Path, tmp_path: Path) -> None:
    model, spec = load_model(run / "model")
    fields = spec.to_dict()
    fields["latents"] |= {"later_frame_scale": 0.5, "mean": [], "std": []}
    save_model(tmp_path / "other", model, type(spec).from_dict(fields))
    request = small_request(dataset, tmp_path / "out", from_(tmp_path / "other"))
    with pytest.warns(FlowreelWarning, match="later_frame_scale is 0.6 but .* with 0.5. The"):
        check_run(request)


def test_what_is_nothing_to_start_from_is_refused(run: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "is no folder: give a model folder"),
        (run / "checkpoints", "holds none of these: give a model folder"),
        (tmp_path, "that run has no complete checkpoint yet"),
    ):
        with pytest.raises(StartError, match=message):
            check_run(small_request(dataset, tmp_path / "out", from_(path)))


def test_a_model_that_was_changed_is_another_start(run: Path, tmp_path: Path) -> None:
    model, spec = load_model(run / "model")
    with torch.no_grad():
        model.flow.deep.sos[0, 0, 0] += 1e-6
    save_model(tmp_path / "changed", model, spec)
    assert open_start(tmp_path / "changed").digest() != open_start(run / "model").digest()


def test_an_image_model_becomes_a_video_model(run: Path, dataset: Path, tmp_path: Path) -> None:
    spec = read_spec(run / "model")
    torch.manual_seed(3)
    image = FlowModel(tiny(video=False, denoiser=False))
    for parameter in image.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fields = spec.to_dict() | {"flow": image.config.to_dict(), "video": None}
    fields = json.loads(json.dumps(fields))
    save_model(tmp_path / "image", image, type(spec).from_dict(fields))
    request = small_request(dataset, tmp_path / "out", from_(tmp_path / "image"))
    start = check_run(request).job.start
    assert start is not None
    video = FlowModel(tiny())
    load_start(video, start)
    x, text = torch.randn(2, 1, 4, 2, 3), torch.randn(2, 6, 16)
    assert torch.equal(video.flow(x, text).nats(), image.flow(x, text).nats())
