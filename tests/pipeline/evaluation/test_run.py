"""An evaluation of a real model folder: laws of its parts, and what it leaves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from data_prep.world.scene import EASY
from flow.codec import VideoCodec, build_vae, save_codec
from flow.config import tiny
from flow.flow import FlowModel
from flow.likelihood import draw_noise, likelihood
from flow.model_folder import ModelSpec, save_model
from flow.sampling import batch_noise
from flow.text import build_text_encoder
from flow.video_spec import VideoSpec
from pipeline.cli import arguments
from pipeline.console import Reporter, plain
from pipeline.evaluation import samples
from pipeline.evaluation.command import evaluate_model
from pipeline.evaluation.drift import nats_by_frame
from pipeline.evaluation.fidelity import fidelity
from pipeline.evaluation.nats import Measured, SizedClips, measure_nats
from pipeline.evaluation.options import FAMILIES, FamilyError, Options
from pipeline.evaluation.result import Evaluation
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.samples import Sampling
from pipeline.shipped import recipe_beside
from serving.config import SamplingConfig
from serving.loading import LoadedModel, load
from serving.requests import Generation
from serving.session import generate
from tests.flow.models import shaken, tiny_config
from tests.serving.conftest import (
    model_dir as model_dir,
)  # the tiny model folder of the service's tests
from tests.training.world import TEXT, write_dataset
from training.data.batches import Prompts
from training.held_out import Measurement, evaluate_nats, gaussian_nats_per_dim

SD_LIKE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
PROMPTS = ["A small red circle moves left quickly.", "A large blue ring stays still.", "A car."]


@pytest.fixture(scope="module")
def exact(model_dir: Path) -> LoadedModel:
    """The model, sampled without tolerance."""
    return load(model_dir, sampling=SamplingConfig(tolerance=0))


# Likelihood.


def test_the_loss_of_a_dataset_is_the_one_of_training(tmp_path: Path) -> None:
    """Same clips, same noise, same captions: the numbers of `training.held_out`."""
    root = write_dataset(tmp_path / "data", clips=160, images=60, more_buckets={(64, 32): 60})
    held_out, train = LatentDataset(root, "held_out"), LatentDataset(root, "train")
    torch.manual_seed(0)
    flow = shaken(FlowModel(tiny())).flow
    encoder = build_text_encoder(TEXT)
    prompts = Prompts(encoder, flow.config, held_out.info.fps)  # type: ignore[arg-type]
    how = Measured(flow, prompts, held_out.info.convention, draws=3, seed=5)  # type: ignore[arg-type]
    found = measure_nats(
        how,
        [SizedClips.of_dataset(held_out, bucket, 256) for bucket in held_out.buckets],
        [SizedClips.of_dataset(train, bucket, 4096) for bucket in train.buckets],
    )
    same = Measurement(draws=3, seed=5)
    kinds = [
        evaluate_nats(flow, held_out, encoder, captions=kind, measurement=same)  # type: ignore[arg-type]
        for kind in ("true", "shuffled")
    ]
    gaussian = gaussian_nats_per_dim(train, held_out, flow.config.noise_std, measurement=same)  # type: ignore[arg-type, union-attr]
    assert found.held_out_nats_per_dim == pytest.approx(kinds[0].mean, abs=1e-6)
    assert found.held_out_stderr == pytest.approx(kinds[0].standard_error, rel=1e-3)
    assert found.shuffled_caption_nats_per_dim == pytest.approx(kinds[1].mean, abs=1e-6)
    assert found.gaussian_nats_per_dim == pytest.approx(gaussian.mean, abs=1e-6)
    assert set(found.buckets) == {str(bucket) for bucket in held_out.buckets}
    assert len(found.buckets) == 3
    assert found.noise_floor_nats_per_dim == pytest.approx(0.5 + math.log(0.3))


def test_clips_encoded_now_are_measured_as_a_dataset_of_them(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", clips=160, images=0)
    held_out = LatentDataset(root, "held_out")
    (bucket,) = held_out.buckets
    stored = SizedClips.of_dataset(held_out, bucket, 6)
    batch = stored.load(range(6))
    direct = SizedClips.of_latents(
        Bucket(*bucket), batch.mean_BTCHW, batch.logvar_BTCHW, stored.captions
    )
    flow = FlowModel(tiny()).flow
    prompts = Prompts(build_text_encoder(TEXT), flow.config, held_out.info.fps)
    how = Measured(flow, prompts, held_out.info.convention, draws=2, seed=0)
    assert measure_nats(how, [stored], [stored]) == measure_nats(how, [direct], [direct])


# Samples.


def test_videos_of_a_batch_are_those_that_are_made_alone(exact: LoadedModel) -> None:
    sampling = Sampling(guidance=2.5, seed=3)
    together = samples.make_videos(exact, PROMPTS, sampling)
    for number, prompt in enumerate(PROMPTS):
        request = Generation(
            request_id="a", prompt=prompt, num_frames=9, guidance=2.5, seed=3 + number
        )
        alone = generate(exact, request).frames
        # A step of brightness where the last bits fall on either side of a half.
        assert np.abs(together[number].astype(int) - alone).max() <= 1
    longer = samples.make_long_video(exact, PROMPTS[0], sampling, 17)
    assert longer.shape == (17, 32, 32, 3)
    assert np.abs(longer[:5].astype(int) - together[0][:5]).max() <= 1


def test_the_exact_sampler_has_no_error_and_a_loose_one_has(model_dir: Path) -> None:
    loaded = load(model_dir)
    noise = batch_noise([0, 1, 2], samples.noise_shape(loaded))
    texts = samples.encode(loaded, PROMPTS, 9)
    spec = samples.spec_of(loaded, Sampling(guidance=2.5), 9)
    found = {
        tolerance: fidelity(
            loaded.model, texts, replace(spec, tolerance=tolerance), noise, denoiser="learned"
        )
        for tolerance in (0.0, 0.5)
    }
    assert found[0.0].deep_relative_rms < 1e-5
    assert found[0.0].latent_relative_rms < 1e-5
    assert found[0.0].certificate_max_abs < 1e-4
    assert found[0.5].deep_relative_rms > found[0.0].deep_relative_rms
    assert found[0.5].certificate_max_abs > 10 * found[0.5].sequential_certificate_max_abs
    assert found[0.5].videos == 3


def test_own_nats_of_a_short_video_are_the_flows_likelihood(exact: LoadedModel) -> None:
    """In the mean over frames and draws: the loss of the noised latents, read at once."""
    frames = samples.make_videos(exact, PROMPTS[:1], Sampling(2.5))[0]
    spec = samples.spec_of(exact, Sampling(2.5), 9)
    by_frame = nats_by_frame(exact, frames, PROMPTS[0], spec, draws=2, seed=4)
    assert exact.codec is not None
    mean, _ = exact.codec.encode(torch.from_numpy(frames)[None])
    clean = exact.codec.convention.to_model(mean, None, None)
    text = samples.encode(exact, PROMPTS[:1], 9).text_BJE
    losses = [
        likelihood(exact.model.flow, clean + 0.3 * draw_noise(4, d, clean.shape[1:]), text).loss()
        for d in range(2)
    ]
    assert np.mean(by_frame) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert len(by_frame) == 3


# The whole.

QUICK = Options(prompts=3, draws=2, long_s=(2.0, 3.0), kinds=EASY)


def numbers(evaluation: Evaluation) -> dict[str, object]:
    """All figures but times."""
    return {k: v for k, v in plain(evaluation.figures()).items() if k != "sampler.speedup"}


def test_an_evaluation_leaves_every_figure_in_json_tables_and_page(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(QUICK, only=("prompts", "sampler"))
    reporter = Reporter(as_json=True, quiet=True)
    evaluate_model(model_dir, options, out=tmp_path, reporter=reporter)
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "evaluation.json").read_text())
    for split in ("seen", "unseen"):
        for attribute in ("colour", "shape", "motion", "size"):
            key = f"{split}.{attribute}"
            assert 0 <= document[f"{key}_low"] <= document[key] <= document[f"{key}_high"] <= 1
            assert document[f"{key}_count"] == 3
            assert 0 < document[f"chance.{attribute}"] <= 1
    assert document["ceiling.real.colour"] == 1
    assert document["about"]["seed"] == 0
    text = (tmp_path / "evaluation.md").read_text()
    page = (tmp_path / "evaluation.html").read_text()
    for title in ("Prompt following", "Sampler"):
        assert title in text
        assert title in page
    # Three videos of each of three prompts, seen and unseen.
    assert page.count("data:video/mp4") == 18
    assert 'src="http' not in page
    assert 'href="http' not in page.replace("xlink:href", "")


@pytest.mark.slow
def test_mlflow_has_the_figures_under_their_names(model_dir: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'store.db'}"
    options = replace(QUICK, only=("prompts", "codec"))
    out = tmp_path / "out"
    for folder in (out, out, None):
        evaluation = evaluate_model(
            model_dir, options, out=folder, mlflow=uri, reporter=Reporter(quiet=True)
        )
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "flowreel evaluation"]
    runs = client.search_runs([experiment.experiment_id])
    # Into one folder twice is one run; without a folder it is another.
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.params["guidance"] == "2.5"
        assert set(evaluation.metrics()) <= set(run.data.metrics)
        assert run.data.metrics["seen.colour"] == evaluation.figures()["seen.colour"]
    (kept,) = [run for run in runs if (out / "tracking.json").read_text().count(run.info.run_id)]
    history = client.get_metric_history(kept.info.run_id, "codec.psnr_db_by_frame")
    assert {metric.step for metric in history} == set(range(9))


@pytest.mark.slow
def test_all_families_twice_are_the_same_figures(model_dir: Path) -> None:
    first, shown = evaluate(model_dir, QUICK, Reporter(quiet=True))
    again, _ = evaluate(model_dir, QUICK, Reporter(quiet=True))
    assert numbers(first) == numbers(again)
    assert asdict(first)["physics"] is None, "the easy world has no bounces"
    families = {name for name, value in asdict(first).items() if value is not None}
    assert families == {
        "about", "nats", "prompts", "sampler", "codec", "distances", "steadiness", "drift",
    }  # fmt: skip
    assert shown.long_video is not None
    assert len(shown.clips) == 6


def test_a_family_that_there_is_none_of_is_named(model_dir: Path) -> None:
    with pytest.raises(FamilyError, match="--only 'fvd': must be one of nats, prompts"):
        evaluate(model_dir, replace(QUICK, only=("fvd",)))


def test_the_families_are_written_once() -> None:
    assert arguments.FAMILIES == FAMILIES


def test_the_recipe_of_a_model_lies_beside_it(tmp_path: Path) -> None:
    model = tmp_path / "demo" / "train" / "model"
    model.mkdir(parents=True)
    assert recipe_beside(model) == "tiny"
    for folder in (tmp_path / "demo", tmp_path / "demo" / "train", model):
        (folder / "recipe.yaml").touch()
        assert recipe_beside(model) == str(folder / "recipe.yaml")


def test_an_image_model_has_the_figures_of_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(SD_LIKE)
    save_codec(vae, tmp_path / "codec", half=False)
    config = tiny_config(video=False, denoiser=False)
    spec = ModelSpec(
        flow=config,
        text=TEXT,
        codec="codec",
        codec_digest=VideoCodec.load(tmp_path / "codec").digest,
        video=VideoSpec(1, 64, 64, 1.0, cell_pixels=8, latent_every=1),
    )
    save_model(tmp_path / "m", FlowModel(config), spec, extra={"codec": tmp_path / "codec"})
    options = replace(QUICK, only=("nats", "prompts", "sampler", "codec"))
    found, shown = evaluate(tmp_path / "m", options, Reporter(quiet=True))
    assert found.prompts is None
    assert found.nats is not None
    assert list(found.nats.buckets) == ["1x64x64"]
    assert found.codec is not None
    assert list(found.codec) == ["codec"]
    assert shown.clips == ()
    with pytest.raises(FamilyError, match="this model makes images"):
        evaluate(tmp_path / "m", replace(QUICK, only=("motion",)))
