"""Prompts encoded before training: all that a run asks for, and nothing but their rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.texts.read import EncodedTexts
from data_prep.texts.run import prepare_texts, text_settings
from flow.config import FlowConfig, tiny
from flow.text import HashedText, TextEncoder, TextSpec
from flow.text_spec import TextError
from tests.flow.tiny_t5 import byte_t5
from tests.training import workers
from tests.training.world import TEXT, small_config, small_request, two_workers, write_dataset
from training.data import texts
from training.data.batch_sampler import BatchSampler
from training.data.batches import BatchMaker, LatentStore, Prompts
from training.data.texts import both_forms, find_texts, prompt_forms
from training.held_out import PromptedClips
from training.loop import TrainJob
from training.record.history import read_history
from training.run import check_run, train_in_process
from training.sections import BatchConfig

FLOW = tiny(prompt_fps=True, prompt_aspect=True, prompt_noise=True)


def write_data(root: Path, **changes: Any) -> Path:
    return write_dataset(
        root, more_buckets={(64, 96): 12}, **{"clips": 32, "images": 20, **changes}
    )


def prepared(root: Path, flow: FlowConfig, batches: BatchConfig, spec: TextSpec = TEXT) -> Path:
    prepare_texts(root, text_settings(spec, prompt_forms(flow, batches, root)))
    return root


class Rounded(HashedText):
    """The encoder, rounded to what files hold."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        return super().encode(texts).half().float()


def no_encoder(*_: Any) -> TextEncoder:
    raise AssertionError("a text encoder was built")


@pytest.mark.parametrize(
    ("data", "flow", "batches"),
    [
        ({}, FLOW, {}),
        ({}, FLOW, {"image_source": "first_frames", "image_ratio": 0.5}),
        ({"images": 0}, FLOW, {"image_ratio": 0.5, "frames": 5}),
        ({"images": 0}, FLOW, {"image_ratio": 0.0, "frames": 1}),
        ({}, replace(FLOW, video=False), {"image_ratio": 0.5}),
        ({}, tiny(), {"first_frame_dropout": 0.0, "caption_dropout": 0.5}),
    ],
)
def test_every_prompt_of_training_and_of_evaluation_is_there(
    tmp_path: Path, data: dict[str, Any], flow: FlowConfig, batches: dict[str, Any]
) -> None:
    config = BatchConfig(batch_size=4, image_batch_size=4, **batches)
    root = prepared(write_data(tmp_path / "data", **data), flow, config)
    read, _line = find_texts(TEXT, flow, config, root)
    assert read is not None
    dataset, held_out = LatentDataset(root, "train"), LatentDataset(root, "held_out")
    both = [Prompts(encoder, flow, dataset.info.fps) for encoder in (read, Rounded(TEXT))]
    from_file, from_encoder = (
        BatchMaker(LatentStore(dataset, 1 << 30), prompts, config, seed=0) for prompts in both
    )
    sampler = BatchSampler(dataset.buckets, config, seed=0)
    for step in range(40):
        one, other = (maker.make(sampler.plan(step), 0, 1) for maker in (from_file, from_encoder))
        assert torch.equal(one.text_BJE, other.text_BJE)
    for captions in ("true", "shuffled", "null"):
        clips = PromptedClips.of(
            LatentStore(held_out, 0), both[0], max_clips=8, seed=0, captions=captions
        )
        assert len(read.encode(list(clips.texts))) == len(clips.texts)


def test_a_run_that_reads_its_prompts_is_step_for_step_one_of_a_rounded_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(evaluation={"every_steps": 3, "clips": 4})
    with_texts = prepared(write_data(tmp_path / "with"), FLOW, config.batches)
    without = write_data(tmp_path / "without")
    monkeypatch.setattr(texts, "build_text_encoder", no_encoder)
    one = small_request(with_texts, tmp_path / "one", config, flow=FLOW)
    read = train_in_process(one)
    monkeypatch.setattr(texts, "build_text_encoder", lambda spec, _: Rounded(spec))
    made = train_in_process(small_request(without, tmp_path / "other", config, flow=FLOW))
    losses = [
        [
            (r["loss_nats_per_dim"], r.get("held_out_nats_per_dim"))
            for r in read_history(result.history)
        ]
        for result in (read, made)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == config.steps
    note = check_run(one).notes[-1]
    assert note.startswith("text: ")
    assert note.endswith(" prompts read, encoder not loaded")


def test_a_run_goes_on_without_the_weights_of_the_encoder(tmp_path: Path) -> None:
    t5 = byte_t5(tmp_path / "t5")
    spec = TextSpec("t5", TEXT.length, TEXT.dim, path=str(t5))
    config = small_config()
    root = prepared(write_data(tmp_path / "data"), FLOW, config.batches, spec)
    shutil.rmtree(t5)
    request = small_request(root, tmp_path / "out", config, flow=FLOW, text=spec)
    assert train_in_process(request).steps == config.steps


@pytest.mark.slow
def test_workers_that_share_a_run_read_their_prompts(tmp_path: Path) -> None:
    t5 = byte_t5(tmp_path / "t5")
    spec = TextSpec("t5", TEXT.length, TEXT.dim, path=str(t5))
    config = small_config(workers=two_workers())
    root = prepared(write_data(tmp_path / "data"), FLOW, config.batches, spec)
    # A worker that wanted the encoder would fail.
    shutil.rmtree(t5)
    job = TrainJob(FLOW, spec, root, tmp_path / "out")
    workers.run(config, job)
    assert len(read_history(job.history)) == config.steps


def test_texts_that_do_not_fit_are_not_read_and_a_line_says_why(tmp_path: Path) -> None:
    config = BatchConfig()
    root = prepared(write_data(tmp_path / "data"), FLOW, config)
    noisier = replace(FLOW, noise_std=0.6)
    for flow, spec, why in (
        (noisier, TEXT, "lack 5 forms that this run asks for, such as 'Noise Level 600:"),
        (FLOW, TextSpec("hashed", 5, TEXT.dim), "text.length is 6 there and 5 here"),
    ):
        found, line = find_texts(spec, flow, config, root)
        assert found is None
        assert why in line
        assert "--only text" in line


def test_a_dataset_without_texts_is_worth_a_word_where_the_encoder_is_large(
    tmp_path: Path,
) -> None:
    root = write_data(tmp_path / "data")
    assert find_texts(TEXT, FLOW, BatchConfig(), root) == (None, "")
    t5 = TextSpec("t5", TEXT.length, TEXT.dim, path="google/flan-t5-xl")
    found, line = find_texts(t5, FLOW, BatchConfig(), root)
    assert found is None
    assert line.startswith("text: google/flan-t5-xl is loaded by every worker")


def test_the_forms_of_two_stages_serve_both(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    stages = [(FLOW, BatchConfig()), (replace(FLOW, noise_std=0.6), BatchConfig(frames=5))]
    forms = both_forms(*(prompt_forms(flow, batches, root) for flow, batches in stages))
    prepare_texts(root, text_settings(TEXT, forms))
    for flow, batches in stages:
        found, _line = find_texts(TEXT, flow, batches, root)
        assert isinstance(found, EncodedTexts)


def test_a_prompt_that_nobody_encoded_stops_a_run(tmp_path: Path) -> None:
    root = prepared(write_data(tmp_path / "data"), FLOW, BatchConfig())
    found, _line = find_texts(TEXT, FLOW, BatchConfig(), root)
    assert found is not None
    with pytest.raises(TextError, match="'unheard of' is not among"):
        Prompts(found, FLOW, 8.0).encode(["unheard of"])


def test_many_prompts_are_read_within_the_cache(tmp_path: Path) -> None:
    root = prepared(write_data(tmp_path / "data"), FLOW, BatchConfig())
    found, _line = find_texts(TEXT, FLOW, BatchConfig(), root)
    assert found is not None
    prompts = Prompts(found, FLOW, 8.0, cache_bytes=100)
    dataset = LatentDataset(root, "train")
    for bucket, ids in dataset.buckets.items():
        for original, synthetic in map(dataset.captions, ids):
            both = [prompts.format(text, bucket, "video") for text in (original, synthetic)]
            assert torch.equal(prompts.encode(both), Rounded(TEXT).encode(both))
            assert prompts.held_bytes <= 100
