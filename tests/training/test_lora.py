"""Adapters: an exact flow with them on, trained alone, the same merged, found by their base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from flow.adapter import FIRST, SECOND, AdapterSpec
from flow.config import tiny, video_7b
from flow.flow import FlowModel
from flow.model_folder import load_model, open_weights, read_spec, save_model, write_model
from flow.packed_weights import can_pack
from flow.sample_spec import SampleSpec
from flow.sampling import sample
from flow.tensor_files import CheckpointError
from flow.tokens import unpatchify
from tests.flow.models import latents, shaken, texts, tiny_model
from tests.training import workers
from tests.training.world import small_config, small_request, two_workers, write_dataset
from training.config import TrainConfig
from training.run import TrainResult, check_run, train_in_process
from training.sections import LoraConfig
from training.start.lora import LoraError, adapter_tensors, add_adapters, merged_tensors
from training.start.source import StartError
from training.state.checkpoint import latest_complete

LORA = LoraConfig(rank=2, alpha=4.0)
SCHEDULE = {"schedule_steps": 6, "flow_learning_rate": 3e-2, "denoiser_learning_rate": 3e-2}


def adapted(seed: int = 1) -> FlowModel:
    """A tiny model in float64 whose adapters are not zero."""
    model = tiny_model()
    add_adapters(model, LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.3 * noise)
    return model.double()


def test_fresh_adapters_change_nothing() -> None:
    plain, model = tiny_model(), tiny_model()
    add_adapters(model, LORA, seed=1)
    x, text = latents(plain), texts(plain, batch=2)[0]
    assert torch.equal(model.flow(x, text).nats(), plain.flow(x, text).nats())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < 0.2 * sum(p.numel() for p in model.parameters())


def test_with_adapters_on_the_log_det_is_that_of_the_jacobian() -> None:
    model = adapted()
    x, text = latents(model, frames=2, batch=1), texts(model)[0]
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: model.flow(flat.view_as(x), text).z_BTHWC.flatten(), x.flatten()
    )
    out = model.flow(x, text)
    _, log_det = torch.linalg.slogdet(jacobian)
    assert out.log_det_BTHWC.sum().item() == pytest.approx(log_det.item(), abs=1e-9)
    plain = tiny_model().flow(x, text)
    assert (out.log_det_BTHWC - plain.log_det_BTHWC).abs().max() > 1e-3


def test_with_adapters_on_the_flow_is_inverted_exactly() -> None:
    model = adapted()
    x, text = latents(model), texts(model, batch=2)[0]
    z = model.flow(x, text).z_BTHWC.detach()
    z_latent = unpatchify(z, model.config.patch_size)
    for schedule in ("sequential", "jacobi"):
        spec = SampleSpec(num_frames=4, grid=(2, 3), tolerance=0.0, schedule=schedule)
        noise = lambda n: z_latent[:, n]  # noqa: E731
        back = sample(model, text, None, spec, denoiser="none", noise=noise)
        torch.testing.assert_close(back, x, atol=1e-9, rtol=0)


def test_merged_is_unmerged() -> None:
    model = adapted()
    plain = FlowModel(model.config).double()
    plain.load_state_dict(merged_tensors(model, LORA.alpha / LORA.rank))
    x, text = latents(model), texts(model, batch=2)[0]
    a, b = model.flow(x, text), plain.flow(x, text)
    assert (a.nats() - b.nats()).abs().max() < 1e-9
    assert model.denoiser is not None
    assert plain.denoiser is not None
    assert (model.denoiser(x, text) - plain.denoiser(x, text)).abs().max() < 1e-9


def test_an_adapter_of_the_released_model_has_the_size_that_the_page_says() -> None:
    with torch.device("meta"):
        model = FlowModel(video_7b())
        add_adapters(model, LoraConfig(rank=2), seed=0)
    config = model.config
    layers = config.layers_per_block[-1] * config.deep_width
    layers += config.denoiser_layers * config.shallow_width
    numbers = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    assert numbers == 16 * 2 * layers
    assert 4 * numbers / 2 / 1e6 == pytest.approx(7.9, abs=0.05)


def test_weights_are_packed_only_where_no_adapter_would_be_lost() -> None:
    model = FlowModel(tiny())
    assert can_pack(model.flow.deep) or not torch.backends.mkldnn.is_available()
    add_adapters(model, LORA, seed=1)
    assert not can_pack(model.flow.deep)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


@pytest.fixture(scope="module")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to fine-tune: that of a run, with weights that are not those of a start."""
    out = tmp_path_factory.mktemp("base")
    result = train_in_process(small_request(dataset, out, small_config(steps=1)))
    model, spec = load_model(result.model_dir)
    shaken(model)
    return save_model(out / "model", model, spec)


def lora_config(base: Path, **changes: Any) -> TrainConfig:
    lora = LORA.model_dump() | changes.pop("lora", {})
    return small_config(start_from=str(base), lora=lora, optimizer=SCHEDULE, **changes)


@pytest.fixture(scope="module")
def run(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    out = tmp_path_factory.mktemp("lora")
    return train_in_process(small_request(dataset, out, lora_config(base)))


def state(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder)[0].state_dict())


def test_a_run_trains_adapters_alone(run: TrainResult, base: Path) -> None:
    before, after = state(base), state(run.model_dir)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.startswith(("flow.deep.layers.", "denoiser.layers."))
        and name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))
    }
    stored = FileSystemReader(run.checkpoint_dir).read_metadata().state_dict_metadata
    of_optimizers = [
        key for key in stored if key.startswith("optimizer.") and "adam_step" not in key
    ]
    assert of_optimizers
    assert all("lora_" in key for key in of_optimizers)


def test_the_adapter_folder_is_the_model_folder_of_the_run(run: TrainResult, base: Path) -> None:
    assert run.adapter_dir is not None
    merged, from_adapter = state(run.model_dir), state(run.adapter_dir)
    assert all(torch.equal(merged[name], from_adapter[name]) for name in merged)
    spec = read_spec(run.adapter_dir)
    assert spec.adapter is not None
    assert (spec.adapter.base, spec.adapter.rank, spec.adapter.alpha) == (str(base), 2, 4.0)
    assert dataclasses.replace(spec, adapter=None) == read_spec(run.model_dir)
    size = sum(path.stat().st_size for path in run.adapter_dir.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in run.model_dir.glob("*.safetensors"))
    assert size < 0.2 * whole


def test_a_part_of_a_model_is_loaded_with_its_adapters(run: TrainResult) -> None:
    assert run.adapter_dir is not None
    part, _ = load_model(run.adapter_dir, leave_out=("flow.shallow", "denoiser"))
    whole = state(run.model_dir)
    assert all(torch.equal(value, whole[name]) for name, value in part.state_dict().items())


def test_a_resumed_run_of_adapters_is_bit_equal(
    run: TrainResult, base: Path, dataset: Path, tmp_path: Path
) -> None:
    train_in_process(small_request(dataset, tmp_path, lora_config(base, steps=3)))
    again = train_in_process(small_request(dataset, tmp_path, lora_config(base)))
    assert again.resumed_from == 3
    halves, whole = state(again.model_dir), state(run.model_dir)
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_two_workers_train_adapters_as_one_does(
    run: TrainResult, base: Path, dataset: Path, tmp_path: Path
) -> None:
    config = lora_config(base, workers=two_workers())
    request = small_request(dataset, tmp_path, config)
    workers.run(config, check_run(request).job)
    # The driver of one process ends the run that two have trained.
    again = train_in_process(small_request(dataset, tmp_path, lora_config(base)))
    assert again.resumed_from == 6
    one, two = state(run.model_dir), state(again.model_dir)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    frozen = [latest_complete(r.checkpoint_dir.parent) for r in (run, again)]
    assert frozen[0] is not None
    assert frozen[1] is not None
    assert frozen[0].description["frozen"] == frozen[1].description["frozen"]


def test_an_adapter_is_refused_over_another_base(
    run: TrainResult, base: Path, tmp_path: Path
) -> None:
    assert run.adapter_dir is not None
    model, spec = load_model(base)
    with torch.no_grad():
        model.flow.deep.sos.add_(1e-3)
    other = save_model(tmp_path / "other", model, spec)
    about = read_spec(run.adapter_dir)
    with pytest.raises(CheckpointError, match=r"trained on a model of digest .*, but .*other has"):
        open_weights(run.adapter_dir, about, other)
    with pytest.raises(CheckpointError, match="which is not there; `flowreel merge-adapter"):
        open_weights(run.adapter_dir, about, tmp_path / "gone")
    wide = FlowModel(tiny(deep_width=64))
    save_model(tmp_path / "wide", wide, dataclasses.replace(spec, flow=wide.config))
    with pytest.raises(CheckpointError, match=r"of shape \[32, 32\], but in .* it is \[64, 64\]"):
        open_weights(run.adapter_dir, about, tmp_path / "wide")


def test_an_adapter_finds_its_base_beside_it(run: TrainResult, base: Path, tmp_path: Path) -> None:
    """A relative path is one from the adapter's folder, so that both can move together."""
    assert run.adapter_dir is not None
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "codec").mkdir()
    adapter = shutil.copytree(run.adapter_dir, tmp_path / "adapter")
    config = adapter / "config.json"
    fields = json.loads(config.read_text())
    fields["adapter"]["base"], fields["codec"] = "../base", "codec"
    config.write_text(json.dumps(fields))
    merged, moved = state(run.model_dir), state(adapter)
    assert all(torch.equal(merged[name], moved[name]) for name in merged)
    assert Path(read_spec(adapter).codec or "").samefile(tmp_path / "base" / "codec")


def test_half_an_adapter_is_refused(run: TrainResult, base: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(read_spec(base), adapter=AdapterSpec(str(base), "0" * 16, 2, 4.0))
    name = "flow.deep.layers.0.mlp.up"
    write_model(tmp_path / "half", {name + FIRST: torch.zeros(2, 32)}, spec)
    with pytest.raises(CheckpointError, match=f"but no {name}{SECOND}"):
        load_model(tmp_path / "half")


def test_adapters_need_a_base_as_it_is(run: TrainResult, base: Path, dataset: Path) -> None:
    out = base.parent / "never"
    with pytest.raises(ValidationError, match=r"name its folder in train\.start_from"):
        small_config(lora={"rank": 2})
    with pytest.raises(ValidationError, match=r"leave train\.freeze empty"):
        lora_config(base, freeze=["*"])
    with pytest.raises(StartError, match="the model is larger than that one"):
        check_run(small_request(dataset, out, lora_config(base), flow=tiny(deep_width=64)))
    with pytest.raises(StartError, match="needs a model folder, which its adapter names: give"):
        check_run(small_request(dataset, out, lora_config(base.parent)))
    targets = {"targets": ("flow.deep.*.qvk",)}
    with pytest.raises(LoraError, match=r"'flow\.deep\.\*\.qvk' matches no .*: flow\.deep\."):
        check_run(small_request(dataset, out, lora_config(base, lora=targets)))
    with pytest.raises(StartError, match="is an adapter: start from the model beside it"):
        check_run(small_request(dataset, out, small_config(start_from=str(run.adapter_dir))))
    with pytest.raises(StartError, match="holds adapters: start from that run's model folder"):
        check_run(small_request(dataset, out, small_config(start_from=str(run.checkpoint_dir))))
    assert not out.exists()


def test_a_run_of_adapters_starts_another(run: TrainResult, dataset: Path, tmp_path: Path) -> None:
    config = small_config(steps=1, start_from=str(run.model_dir))
    assert train_in_process(small_request(dataset, tmp_path, config)).steps == 1
