"""The two half-sessions in one process: lengths, determinism, first frames, long videos, spans."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flow.flow import FlowModel
from flow.prompt import prompt_for
from flow.sampling import frame_noise, sample
from flow.shallow import shallow_inverse
from serving.config import SamplingConfig, ServiceSpec
from serving.errors import FrameCountError, InvalidRequest
from serving.loading import LoadedModel, load
from serving.messages import Chunk, PackedTensor
from serving.on_ray import serve_model
from serving.requests import Generation
from serving.session import (
    DecoderSession,
    DeepSession,
    encode_first_frame,
    fit_image,
    generate,
    prompt_text,
    sample_spec,
)
from serving.start import ServeStartError
from tests.flow.models import TINY
from tests.serving.conftest import FPS, SIZE, TRAINED_FRAMES


def ask(**fields: object) -> Generation:
    values = {"request_id": "r", "prompt": "a red square", "num_frames": TRAINED_FRAMES, "seed": 3}
    return Generation.model_validate({**values, **fields})


def test_a_prompt_becomes_so_many_frames_of_the_models_size(loaded: LoadedModel) -> None:
    video = generate(loaded, ask())
    assert video.frames.shape == (TRAINED_FRAMES, SIZE, SIZE, 3)
    assert (video.frames.dtype, video.fps) == (np.uint8, FPS)
    assert video.frames.std() > 5


def test_the_same_request_gives_the_same_frames_and_another_does_not(loaded: LoadedModel) -> None:
    once = generate(loaded, ask()).frames
    np.testing.assert_array_equal(generate(loaded, ask()).frames, once)
    for other in (ask(seed=4), ask(prompt="a blue circle"), ask(guidance=0.0)):
        assert (generate(loaded, other).frames != once).any()


def test_a_folder_and_a_loaded_model_give_the_same_video(
    loaded: LoadedModel, model_dir: Path
) -> None:
    frames = generate(model_dir, ask(num_frames=1)).frames
    np.testing.assert_array_equal(frames, generate(loaded, ask(num_frames=1)).frames)


def test_both_schedules_make_the_video(loaded: LoadedModel) -> None:
    jacobi, sequential = (
        generate(loaded, ask(schedule=name)).frames.astype(float)
        for name in ("jacobi", "sequential")
    )
    assert np.abs(jacobi - sequential).mean() < 2


@pytest.mark.parametrize("num_frames", [TRAINED_FRAMES, 2 * TRAINED_FRAMES + 7])
def test_score_denoising_takes_the_whole_video_and_the_windows_it_was_made_in(
    loaded: LoadedModel, num_frames: int
) -> None:
    request = ask(num_frames=num_frames)
    by_score = replace(loaded, sampling=SamplingConfig(denoiser="score"))
    deep = DeepSession(by_score, request)
    decoder = DecoderSession(by_score, request, deep.opening)
    assert all(len(decoder.push(frame).frames) == 0 for frame in deep)
    frames = decoder.finish().frames
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    texts = [prompt_text(caption, loaded, num_frames) for caption in (request.prompt, "")]
    text, null = loaded.text_encoder.encode(texts)
    spec = sample_spec(request, loaded)
    x = sample(loaded.model, text[None], null[None], spec, denoiser="score")
    codec = loaded.codec.stream()
    expected = np.concatenate([codec.push(x_BCHW)[0].numpy() for x_BCHW in x.unbind(1)])
    assert frames.shape == (num_frames, SIZE, SIZE, 3)
    assert np.abs(frames.astype(int) - expected).max() <= 2
    assert (generate(loaded, request).frames != frames).any()


def test_a_service_refuses_score_denoising_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ServeStartError, match="flowreel sample --denoiser score"):
        serve_model(ServiceSpec(tmp_path, tmp_path, sampling=SamplingConfig(denoiser="score")))


@pytest.mark.parametrize("num_frames", [0, 8, 10])
def test_a_frame_count_that_the_model_cannot_make_is_refused(
    loaded: LoadedModel, num_frames: int
) -> None:
    with pytest.raises(FrameCountError, match="nearest allowed"):
        generate(loaded, ask(num_frames=num_frames))


def test_what_travels_between_the_sessions_survives_the_journey(loaded: LoadedModel) -> None:
    request = ask()
    whole = generate(loaded, request).frames
    deep = DeepSession(loaded, pickle.loads(pickle.dumps(request)))
    decoder = DecoderSession(loaded, request, pickle.loads(pickle.dumps(deep.opening)))
    chunks = [decoder.push(pickle.loads(pickle.dumps(frame))) for frame in deep]
    chunks.append(decoder.finish())
    sent = pickle.loads(pickle.dumps(chunks))
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in sent]), whole)


def test_frames_come_while_later_ones_are_still_being_made(loaded: LoadedModel) -> None:
    chunks: list[Chunk] = []
    generate(loaded, ask(num_frames=17), on_chunk=chunks.append)
    # The denoiser looks one frame ahead: nothing after the first push, then one latent frame each.
    assert [len(chunk.frames) for chunk in chunks] == [0, 1, 4, 4, 4, 4]


def test_every_latent_frame_has_its_two_spans_in_order(loaded: LoadedModel) -> None:
    spans = generate(loaded, ask()).spans
    assert [span.frame for span in spans if span.name == "deep"] == [0, 1, 2]
    assert [span.frame for span in spans if span.name == "decode"] == [0, 1, 2, 2]
    assert {(span.pid, span.request_id) for span in spans} == {(os.getpid(), "r")}
    times = [time for span in spans for time in (span.start_s, span.end_s)]
    assert times == sorted(times)


def test_a_given_image_is_the_first_frame_of_u(loaded: LoadedModel, picture: np.ndarray) -> None:
    request = ask(given_first_frame=True)
    first_u = encode_first_frame(loaded, request, picture)
    deep = DeepSession(loaded, request, first_u)
    assert deep.next().u == first_u
    # Undone through the shallow stack and without its noise, it is the image's own latent.
    x_noisy = shallow_inverse(loaded.model.flow, first_u.unpack())
    noise = frame_noise(request.seed, 0, tuple(x_noisy.shape[2:]))
    assert loaded.codec is not None
    frame = torch.from_numpy(fit_image(picture, SIZE, SIZE))[None, None]
    mean, _ = loaded.codec.encode(frame)
    expected = loaded.codec.convention.to_model(mean)
    torch.testing.assert_close(
        x_noisy - loaded.model.config.noise_std * noise, expected, atol=1e-4, rtol=1e-4
    )


def test_the_given_image_changes_the_whole_video(loaded: LoadedModel, picture: np.ndarray) -> None:
    request = ask(given_first_frame=True)
    video = generate(loaded, request, picture).frames
    assert video.shape == (TRAINED_FRAMES, SIZE, SIZE, 3)
    other = generate(loaded, request, picture[::-1].copy()).frames
    assert (video[0] != other[0]).any()
    assert (video[-1] != other[-1]).any()


def test_an_image_that_was_promised_must_come(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidRequest, match="no image was given"):
        generate(loaded, ask(given_first_frame=True))


def test_a_long_video_goes_on_from_the_short_one(loaded: LoadedModel) -> None:
    short = generate(loaded, ask()).frames
    long = generate(loaded, ask(num_frames=33)).frames
    assert len(long) == 33
    # All but the last latent frame of the short one, which had no frame after it to look at.
    np.testing.assert_array_equal(long[: TRAINED_FRAMES - 4], short[: TRAINED_FRAMES - 4])
    assert long[TRAINED_FRAMES:].std() > 5


def test_an_image_is_scaled_to_cover_and_cropped_at_its_centre() -> None:
    image = np.zeros((40, 120, 3), dtype=np.uint8)
    image[:, 40:80] = 255
    fitted = fit_image(image, 32, 32)
    assert fitted.shape == (32, 32, 3)
    assert fitted[:, 2:-2].min() > 250


def test_the_sessions_make_what_the_flows_own_sampler_makes(loaded: LoadedModel) -> None:
    request = ask(num_frames=17, schedule="sequential")
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    text, null = loaded.text_encoder.encode([request.prompt, ""]).split(1)
    latents = sample(loaded.model, text, null, sample_spec(request, loaded))
    expected = loaded.codec.decode(latents)[0].numpy().astype(int)
    # The sampler takes all frames as one batch, which moves the last bits of a sum.
    assert np.abs(generate(loaded, request).frames - expected).max() <= 1


def test_a_deep_session_taken_up_by_another_process_goes_on_alike(
    loaded: LoadedModel, model_dir: Path
) -> None:
    request = ask(num_frames=33)
    whole = list(DeepSession(loaded, request))
    other = load(model_dir, deployment="deep")
    earlier_u = [frame.u for frame in whole[:4]]
    rest = list(DeepSession(other, request, earlier_u=earlier_u))
    assert [frame.index for frame in rest] == [4, 5, 6, 7, 8]
    for again, frame in zip(rest, whole[4:], strict=True):
        torch.testing.assert_close(again.u.unpack(), frame.u.unpack(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "kind"), [(1, "An image"), (5, "A video with 8 fps"), (33, "A video with 8 fps")]
)
@pytest.mark.parametrize("caption", ["a red square", ""])
def test_a_clip_is_read_as_in_training_and_one_frame_as_an_image(
    loaded: LoadedModel, num_frames: int, kind: str, caption: str
) -> None:
    config = replace(TINY, prompt_fps=True, prompt_aspect=True, prompt_noise=True)
    knowing = replace(
        loaded,
        model=FlowModel(config),
        facts=replace(loaded.facts, height=480, width=640),
    )
    text = prompt_text(caption, knowing, num_frames)
    assert text == f"Noise Level 300:\n{kind}:\n{caption}\n\n in a 5:4 aspect ratio.\n"
    assert text == prompt_for(
        caption, config, num_frames=num_frames, height=480, width=640, fps=FPS
    )


def test_the_session_reads_the_null_prompt_of_the_same_clip(loaded: LoadedModel) -> None:
    class Reader:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def encode(self, texts: list[str]) -> torch.Tensor:
            self.texts = texts
            return torch.zeros(len(texts), TINY.text_len, TINY.text_dim)

    config = replace(TINY, prompt_fps=True)
    reader = Reader()
    reading = replace(loaded, model=FlowModel(config), text_encoder=reader)
    DeepSession(reading, ask(num_frames=1))
    assert reader.texts == ["An image:\na red square\n", "An image:\n\n"]


def test_a_packed_tensor_is_unchanged() -> None:
    tensor = torch.randn(1, 2, 3)
    torch.testing.assert_close(PackedTensor.pack(tensor).unpack(), tensor, atol=0, rtol=0)
