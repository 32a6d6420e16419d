"""Held-out loss: the same numbers for the same seed, captions that matter, the Gaussian right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.latents.dataset import LatentDataset
from flow.config import tiny
from flow.flow import DeepShallowFlow, FlowModel
from flow.likelihood import NoiseFloorWarning, noise_floor
from flow.text import build_text_encoder
from tests.training.world import TEXT, write_dataset
from training.data.batches import LatentStore, Prompts
from training.held_out import (
    EvaluationError,
    HeldOut,
    Measurement,
    evaluate_nats,
    gaussian_nats_per_dim,
)
from training.parallel import Parallel
from training.sections import EvaluationConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data", clips=400, images=0)


def test_a_start_model_scores_the_second_moment(root: Path) -> None:
    """At its start the flow is the identity, so its loss is half the mean square."""
    held_out = LatentDataset(root, "held_out")
    flow = FlowModel(tiny()).flow
    encoder = build_text_encoder(TEXT)
    loss = evaluate_nats(flow, held_out, encoder, measurement=Measurement(draws=3))
    again = evaluate_nats(flow, held_out, encoder, measurement=Measurement(draws=3, batch_size=5))
    assert loss.per_clip == pytest.approx(again.per_clip, abs=1e-6)
    assert loss.draws == 3
    assert 0 < loss.standard_error < 0.05
    assert loss.mean == pytest.approx(float(np.mean(loss.per_clip)))
    one_draw = Measurement(draws=1)
    captions = [
        evaluate_nats(flow, held_out, encoder, captions=kind, measurement=one_draw).mean
        for kind in ("true", "shuffled", "null")
    ]
    assert captions[0] == pytest.approx(captions[1]) == pytest.approx(captions[2])


def test_the_gaussian_fits_what_is_gaussian(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", clips=400, images=0, broken=0.5)
    baseline = gaussian_nats_per_dim(
        LatentDataset(root, "train"), LatentDataset(root, "held_out"), 0.3
    )
    # The first frame's latents are all 0.5, later ones 0.3: nearly nothing but noise.
    spread = 0.2**2 * (1 / 3) * (2 / 3) + 0.3**2
    assert baseline.mean == pytest.approx(0.5 + 0.5 * math.log(spread), abs=0.02)
    assert baseline.mean > noise_floor(0.3)


def test_the_gaussian_beats_the_identity(root: Path) -> None:
    held_out = LatentDataset(root, "held_out")
    baseline = gaussian_nats_per_dim(LatentDataset(root, "train"), held_out, 0.3)
    torch.manual_seed(0)
    identity = evaluate_nats(FlowModel(tiny()).flow, held_out, build_text_encoder(TEXT))
    assert noise_floor(0.3) < baseline.mean < identity.mean
    assert baseline.ids == identity.ids


def test_unknown_captions_and_empty_splits_are_refused(root: Path, tmp_path: Path) -> None:
    flow, encoder = FlowModel(tiny()).flow, build_text_encoder(TEXT)
    with pytest.raises(EvaluationError, match="captions is 'all'"):
        evaluate_nats(flow, LatentDataset(root, "held_out"), encoder, captions="all")  # type: ignore[arg-type]
    few = write_dataset(tmp_path / "few", clips=1, images=0)
    # The one clip's key happens to be held out.
    with pytest.raises(EvaluationError, match=r"train split .* is empty"):
        evaluate_nats(flow, LatentDataset(few, "train"), encoder)


def test_every_bucket_has_a_share_of_the_clips(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips=400, images=200, more_buckets={(48, 80): 100})
    held_out = LatentDataset(data, "held_out")
    prompts = Prompts(build_text_encoder(TEXT), tiny(), 8.0)
    store = LatentStore(held_out, cache_bytes=1 << 30)
    during = HeldOut(store, prompts, EvaluationConfig(clips=6), batch_size=4, seed=0)
    assert {str(b): len(c.ids) for b, c in during.clips.items()} == {
        "9x64x64": 6, "1x64x64": 3, "9x48x80": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    flow, one = FlowModel(tiny()).flow, Parallel(0, 1, torch.device("cpu"), None)
    nats = during.nats_by_bucket(flow, one)
    assert nats[during.headline] == during.mean_nats(flow, one)
    # The headline is what `evaluate_nats` finds on the same clips.
    how = Measurement(max_clips=6, draws=1)
    alone = evaluate_nats(flow, held_out, build_text_encoder(TEXT), measurement=how)
    assert nats[during.headline] == pytest.approx(alone.mean, abs=1e-6)


def leaky_flow() -> DeepShallowFlow:
    """A flow whose deep block sees the token it predicts and has learnt to copy it."""
    flow = FlowModel(tiny()).flow

    def copied(s_BLC: Tensor, rope: object, text: object = None) -> tuple[Tensor, Tensor]:
        return 0.95 * s_BLC, torch.full_like(s_BLC, 0.1)

    flow.deep.predict = copied  # type: ignore[method-assign, assignment]
    return flow


def test_a_leak_of_causality_is_under_the_floor_and_warned_of(root: Path) -> None:
    held_out, encoder = LatentDataset(root, "held_out"), build_text_encoder(TEXT)
    with pytest.warns(NoiseFloorWarning, match=r"held_out split.*a block sees the token"):
        loss = evaluate_nats(leaky_flow(), held_out, encoder, measurement=Measurement(draws=2))
    assert loss.mean < noise_floor(0.3) - 1


def test_training_warns_of_the_floor_on_its_first_worker_alone(root: Path) -> None:
    prompts = Prompts(build_text_encoder(TEXT), tiny(), 8.0)
    store = LatentStore(LatentDataset(root, "held_out"), cache_bytes=0)
    config = EvaluationConfig(clips=8, draws=1)
    during = HeldOut(store, prompts, config, batch_size=4, seed=0)
    one = Parallel(0, 1, torch.device("cpu"), None)
    with pytest.warns(NoiseFloorWarning, match="8 held-out clips"):
        during.mean_nats(leaky_flow(), one)
    during.mean_nats(leaky_flow(), Parallel(1, 2, torch.device("cpu"), None))
    during.mean_nats(FlowModel(tiny()).flow, one)
