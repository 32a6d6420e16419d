"""Captions on a real Ray cluster: as in one process, stopped, resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi.responses import JSONResponse

from data_prep.captions.captioner import CaptionerUnavailable
from data_prep.captions.config import CaptionConfig
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
from data_prep.world.shards import write_world
from tests.data_prep.chat_endpoint import serving
from tests.data_prep.in_process import caption_locally, digests, prepare_locally
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.data_prep.vlm_models import save_llava
from tests.places import ROOT


@pytest.mark.slow
def test_a_model_captions_on_ray_as_in_one_process_and_only_captions_goes_on_from_a_kill(
    cluster: None, config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    model = save_llava(tmp_path / "model")
    captioner = CaptionConfig(
        backend="vlm", model=str(model), frames=2, max_tokens=6, batch_size=3, dtype="float32"
    )
    by_model = config.model_copy(update={"captioner": captioner})
    local, out = tmp_path / "local", tmp_path / "out"
    prepare_locally(by_model, world, local, codec_dir)
    prepare_locally(config, world, out, codec_dir)
    caption_locally(by_model, world, out, shuffle=1, stop_after=6)
    latents = {p: p.stat().st_mtime_ns for p in (out / "latents").iterdir()}
    report = prepare(by_model, None, out, codec_dir, only="captions")
    assert report.captions_failed == {}
    assert 0 < report.samples_now < 11
    assert {p: p.stat().st_mtime_ns for p in (out / "latents").iterdir()} == latents
    expected = digests(local)
    for name, digest in digests(out).items():
        assert name.startswith(("manifests", "prepare.json")) or digest == expected[name]


@pytest.mark.slow
def test_an_endpoint_that_refuses_stops_a_run_on_ray_with_its_own_words(
    cluster: None, config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    with serving() as endpoint:
        captioner = CaptionConfig(backend="http", model="m", endpoint=endpoint.url)
        asked = config.model_copy(update={"captioner": captioner})
        endpoint.behave = lambda e, r, body: JSONResponse({"error": "who?"}, status_code=401)
        with pytest.raises(CaptionerUnavailable, match="answered 401") as caught:
            prepare(asked, world, tmp_path / "out", codec_dir)
        assert type(caught.value) is CaptionerUnavailable
        assert "\n" not in str(caught.value)
        endpoint.behave = lambda e, r, body: None
        assert prepare(asked, world, tmp_path / "out", codec_dir).captions_failed == {}
        lost = captioner.model_copy(update={"api_key_env": "FLOWREEL_NO_SUCH_KEY"})
        other = config.model_copy(update={"captioner": lost})
        with pytest.raises(CaptionerUnavailable, match="FLOWREEL_NO_SUCH_KEY"):
            prepare(other, world, tmp_path / "other", codec_dir)


CAPTION_DRIVER = """
import sys, ray
from pathlib import Path
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
config = PrepareConfig.model_validate_json(sys.argv[1])
prepare(config, None, Path(sys.argv[2]), sys.argv[3], only="captions")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_captioning_killed_in_the_middle_asks_for_no_finished_caption_again(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    shards = [str(p) for p in write_world(tmp_path / "in", 40, 20, clips_per_shard=20)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        prepare_locally(config, shards, out, codec_dir)
    latents = {p: p.stat().st_mtime_ns for p in (broken / "latents").iterdir()}
    with serving() as endpoint:
        captioner = CaptionConfig(
            backend="http", model="m", endpoint=endpoint.url, requests_in_flight=2
        )
        asked = config.model_copy(update={"captioner": captioner})
        caption_locally(asked, None, whole)
        assert len(endpoint.requests) == 60
        endpoint.requests.clear()
        endpoint.delay_s = 0.2
        command = [sys.executable, "-c", CAPTION_DRIVER, asked.model_dump_json(), str(broken)]
        command += [str(codec_dir)]
        environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        for wanted in (3, 25):
            with subprocess.Popen(command, cwd=ROOT, env=environment) as driver:
                deadline = time.monotonic() + 300
                while driver.poll() is None and time.monotonic() < deadline:
                    # At the second, the first shard's captions stand.
                    if len(endpoint.requests) >= wanted:
                        break
                    time.sleep(0.02)
                assert driver.poll() is None
                os.kill(driver.pid, signal.SIGKILL)
        subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=400)
        asked_for = len(endpoint.requests)
    assert digests(broken) == digests(whole)
    assert {p: p.stat().st_mtime_ns for p in (broken / "latents").iterdir()} == latents
    # Beyond the sixty, only what was in flight at the two kills, at most a block of each shard that
    # was being read.
    assert asked_for <= 60 + 2 * 20
