"""The recipes for real video: at full size without weights, and scaled down as a run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.sources.samples import write_shard
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip
from flow.aspects import ASPECTS, bucket_size
from flow.codec import VideoCodec, build_vae, save_codec
from flow.codec_factors import WAN_FACTORS
from flow.flow import FlowModel
from flow.model_folder import load_model
from media.write import encode_mp4, encode_png
from pipeline.recipes import Recipe, load_recipe
from pipeline.stages import train_request
from tests.data_prep.in_process import prepare_locally
from tests.pipeline.command import flowreel
from tests.places import ROOT
from tests.tiny_codec import wan_like
from training.run import train_in_process

SIDES = {"panda-384p": 512, "panda-480p": 640}
CHANNELS = 48
"""Of Wan2.2's codec."""


@pytest.fixture(params=SIDES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def test_the_buckets_are_those_of_the_paper_in_four_lengths(recipe: Recipe) -> None:
    bucket = recipe.prepare.bucket
    bucket.check(WAN_FACTORS)
    side = SIDES[recipe.name]
    assert bucket.all_sizes(WAN_FACTORS.space) == [
        bucket_size(side, aspect, WAN_FACTORS.space) for aspect in ASPECTS
    ]
    assert (bucket.lengths, bucket.fps) == ((81, 49, 33, 17), 16.0)
    assert bucket.num_frames in bucket.lengths
    assert recipe.train.batches.resolution == bucket.resolutions[0]


def test_the_captions_are_those_of_the_data(recipe: Recipe) -> None:
    assert recipe.prepare.captioner.backend == "none"
    filters = recipe.prepare.filters
    assert filters.matching_score_above == 0.43
    assert filters.desirable
    assert filters.one_shot


def test_the_model_reads_the_codecs_latents_and_has_the_size_that_is_said(recipe: Recipe) -> None:
    assert recipe.model.latent_channels == CHANNELS
    with torch.device("meta"):
        model = FlowModel(recipe.model)
        bucket, side = recipe.prepare.bucket, SIDES[recipe.name]
        frames = WAN_FACTORS.latent_frames(bucket.lengths[-1])
        grid = WAN_FACTORS.grid(*bucket_size(side, "16:9", WAN_FACTORS.space))
        x_BTCHW = torch.empty(1, frames, CHANNELS, *grid)
        text_BJE = torch.empty(1, recipe.text.length, recipe.text.dim)
        z_BTHWC = model.flow(x_BTCHW, text_BJE)[0]
    assert z_BTHWC.shape == (1, frames, *grid, CHANNELS)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    text = (ROOT / "pipeline" / "recipes" / f"{recipe.name}.yaml").read_text()
    assert f"{billions:.1f} billion parameters" in text
    tokens = WAN_FACTORS.latent_frames(81) * grid[0] * grid[1]
    assert f"{round(tokens, -2):,} tokens" in text


def commands(page: Path) -> Iterator[list[str]]:
    """The lines of a page's bash blocks that name one of these recipes."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "--recipe panda-" in line:
                yield shlex.split(line)


def test_the_readme_prepares_real_video_with_a_recipe_for_it() -> None:
    lines = list(commands(ROOT / "README.md"))
    assert [words[1] for words in lines] == ["prepare", "train"]
    assert lines[0][lines[0].index("--out") + 1] == lines[1][lines[1].index("--data") + 1]
    for page in (ROOT / "README.md", ROOT / "docs" / "operations.md"):
        for words in commands(page):
            settings = [b for a, b in pairwise(words) if a == "--set"]
            load_recipe(words[words.index("--recipe") + 1], settings)
        # A command without a recipe prepares moving shapes, whatever its shards are called.
        for line in re.findall(r"^flowreel prepare .*", page.read_text(), re.MULTILINE):
            assert ("/data/panda" in line) <= ("--recipe panda-" in line or "--only" in line), line


SMALL = (
    "prepare.bucket.resolutions=[36p,48p]", "prepare.bucket.aspects=['1:1','16:9']",
    "prepare.bucket.frame_counts=[33,17,9]", "prepare.bucket.num_frames=33",
    "prepare.filters.static_below=null",
    "text={kind: hashed, length: 16, dim: 64}", "model.text_len=16", "model.text_dim=64",
    "model.shallow_width=32", "model.deep_width=32", "model.head_dim=32",
    "model.layers_per_block=[1,1,2]", "model.denoiser_layers=1", "model.pos_len=4",
    "train.steps=2", "train.precision=fp32", "train.workers={strategy: single}",
    "train.batches.batch_size=2", "train.batches.image_batch_size=2",
    "train.batches.image_ratio=0.5", "train.evaluation.every_steps=0",
    "train.tracking.enabled=false",
)  # fmt: skip
"""Smaller sizes; and small shapes change few pixels."""


def put_on_the_hub(codec: Path, name: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """The hub's own cache, as a download of the codec leaves it; nothing else answers."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    folder = repository / "snapshots" / "0123abc" / "vae"
    folder.mkdir(parents=True)
    for path in codec.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def test_scaled_down_it_goes_from_shards_to_a_model_with_its_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    save_codec(build_vae(wan_like(8, z_dim=CHANNELS, **statistics)), tmp_path / "codec")
    recipe = load_recipe("panda-384p", [*SMALL, "train.batches.resolution=48p"])
    put_on_the_hub(tmp_path / "codec", recipe.codec, tmp_path / "hub", monkeypatch)
    samples = [
        {
            "__key__": f"{n}_of_{round(1000 * seconds)}ms",
            "mp4": encode_mp4(render_clip(random_scene(n), int(seconds * 24), 24.0, 48, 80), 24.0),
            "txt": f"A clip of {seconds} seconds.",
            "json": {"matching_score": "[0.6]", "desirable_filtering": "['desirable']"},
        }
        for n in range(4)
        for seconds in (0.3, 0.8, 1.5, 2.5)
    ]
    picture = render_clip(random_scene(0), 1, 8.0, 64, 64)[0]
    samples.append({"__key__": "image", "png": encode_png(picture), "txt": "A picture."})
    write_shard(tmp_path / "00000.tar", samples)
    latents, out = tmp_path / "latents", tmp_path / "run"
    shards = [str(tmp_path / "00000.tar")]
    report = prepare_locally(recipe.prepare, shards, latents, Path(recipe.codec))
    assert report.reasons == {"too_short": 4}
    dataset = LatentDataset(latents, "all")
    clips = {bucket for bucket in dataset.buckets if bucket.frames > 1}
    assert clips == {
        (frames, *size) for frames in (33, 17, 9) for size in ((32, 64), (48, 80))
    }  # fmt: skip
    assert {dataset.captions(name)[1] for ids in dataset.buckets.values() for name in ids} == {""}
    result = train_in_process(train_request(recipe, latents, out))
    model, spec = load_model(result.model_dir)
    assert spec.video is not None
    # What is trained on, and what the model says of itself, is 48p alone.
    assert (spec.video.height, spec.video.width) == (48, 80)
    assert spec.video.num_frames in recipe.prepare.bucket.lengths
    assert VideoCodec.load(result.model_dir / "codec").digest == dataset.info.codec_digest
    assert model.config == recipe.model


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_readmes_command_makes_clips_of_nearly_all_real_videos(tmp_path: Path) -> None:
    """As typed but for the paths, and for a codec of the same shape that encodes in no time."""
    samples = ROOT.parent / "shared" / "panda_samples"
    panda = Path(os.environ.get("FLOWREEL_PANDA_SAMPLES", samples))
    if not panda.is_dir():
        pytest.skip(f"no {panda}; set FLOWREEL_PANDA_SAMPLES")
    factors = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "patch_size": 4}
    quick = wan_like(4, z_dim=CHANNELS, in_channels=48, out_channels=48, **factors)
    save_codec(build_vae(quick), tmp_path / "codec")
    words, out = next(commands(ROOT / "README.md")), tmp_path / "out"
    words[words.index("--shards") + 1] = str(panda)
    words[words.index("--out") + 1] = str(out)
    ended = flowreel(*words[1:], "--codec", str(tmp_path / "codec"), timeout_s=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    buckets = LatentDataset(out, "all").buckets
    assert {str(bucket): len(ids) for bucket, ids in buckets.items()} == {
        "33x384x688": 15, "49x336x784": 2, "49x384x688": 24, "81x384x688": 5,
    }  # fmt: skip
