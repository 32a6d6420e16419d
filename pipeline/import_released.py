"""`flowreel import-weights`: a released checkpoint → a model folder that `sample` and `serve` take.

The tensors go from file to file (`flow.released_checkpoint`, `flow.tensor_files`); this file says
what the folder's config.json needs beside the structure: codec, text encoder, latent convention,
and the size of a video. Knows nothing of Ray, training or data preparation.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flow.aspects import bucket_size
from flow.codec import CodecError, VideoCodec
from flow.codec_factors import SD_FACTORS, WAN_FACTORS
from flow.latent_convention import LatentConvention
from flow.model_folder import CONFIG_FILE, ModelSpec, write_model
from flow.released_checkpoint import Released, open_released
from flow.tensor_files import CheckpointError
from flow.text_spec import TextSpec
from flow.video_spec import VideoSpec
from pipeline.console import Reporter

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_TEXT = "google/flan-t5-xl"
MEGABYTE = 1 << 20


def import_released_weights(
    weights: Path,
    config: Path,
    out: Path,
    *,
    text_dim: int | None = None,
    dtype: str = "keep",
    codec: str | None = None,
    text: str | None = None,
    aspect: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> None:
    """Write the model folder, whole or not at all.

    Args:
        weights: the released .pth.
        config: its YAML.
        out: the model folder.
        text_dim: width of a text token; None: as the weights have it.
        dtype: one of `DTYPES`.
        codec, text: folder or hub id; None: what the YAML names.
        aspect: width:height to sample at; None: 16:9, or 1:1 where no aspects were trained.
        overwrite: replace a model that is at `out` already.
        reporter: what is said on the way.

    Raises:
        CheckpointError, ConfigError, CodecError: the files do not fit, or `out` holds a model.
    """
    reporter = reporter or Reporter()
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    if (out / CONFIG_FILE).exists() and not overwrite:
        raise CheckpointError(f"{out} holds a model already: choose another folder or --overwrite")
    released = open_released(weights, config, text_dim)
    spec = released_spec(released, codec=codec, text=text, aspect=aspect)
    with reporter.progress("importing") as update:
        write_model(
            out,
            released.tensors,
            spec,
            dtype=DTYPES[dtype],
            progress=lambda done, total: update(done // MEGABYTE, total // MEGABYTE, "MB"),
        )
    count = sum(value.numel() for value in released.tensors.values())
    files = len(list(out.glob("*.safetensors")))
    reporter.outcome(
        f"{out}: {count / 1e6:.2f}M parameters, {spec.flow.num_blocks} blocks, "
        f"{files} {'file' if files == 1 else 'files'}, "
        f"codec {spec.codec or 'not named: give --codec'}, text {spec.text.path or spec.text.kind}"
    )
    reporter.document(
        {"model": out, "parameters": count, "files": files, "codec": spec.codec, "text": spec.text}
    )


def released_spec(
    released: Released,
    *,
    codec: str | None = None,
    text: str | None = None,
    aspect: str | None = None,
) -> ModelSpec:
    """What the YAML of a release, and whoever imports it, say beside the weights.

    A codec in a folder is loaded, so that its size, channels and digest can be held against the
    model's; one that is named by a hub id is fetched when the model is first used.

    Raises:
        CodecError: a codec that the model cannot read.
        SizeError: an aspect that is none.
    """
    flow, notes = released.config, released.notes
    factors = WAN_FACTORS if flow.video else SD_FACTORS
    source, digest = codec or notes.vae, None
    if source is not None and Path(source).is_dir():
        loaded = VideoCodec.load(source)
        if loaded.latent_channels != flow.latent_channels:
            raise CodecError(
                f"{source} makes latents of {loaded.latent_channels} channels, the model reads "
                f"{flow.latent_channels}: give the codec that it was trained with"
            )
        source, digest, factors = str(Path(source).absolute()), loaded.digest, loaded.factors
    video = None
    if notes.img_size is not None:
        side = notes.img_size if notes.vae else notes.img_size * factors.space
        shape = aspect or ("16:9" if flow.prompt_aspect else "1:1")
        height, width = bucket_size(side, shape, factors.space * flow.patch_size)
        video = VideoSpec(notes.num_frames, height, width, notes.fps or 1.0, *factors)
    convention = LatentConvention.diffusers()
    if flow.video:
        convention = LatentConvention.released(later_frame_scale=notes.later_frame_scale)
    return ModelSpec(
        flow=flow,
        text=_text_spec(text or notes.text or DEFAULT_TEXT, flow.text_len, flow.text_dim),
        codec=source,
        codec_digest=digest,
        latents=convention,
        video=video,
    )


def _text_spec(source: str, length: int, dim: int) -> TextSpec:
    if source == "hashed":
        return TextSpec("hashed", length, dim)
    path = str(Path(source).absolute()) if Path(source).is_dir() else source
    return TextSpec("t5", length, dim, path=path)
