"""Which prompts a run reads, and who makes vectors of them: a file made before, or an encoder here.

Encoded prompts (`data_prep.texts`) are read where the dataset has all that the run asks for, made
by its encoder; then no encoder is loaded. Otherwise one is, and a line says why. Whether they fit
is settled before the first step: an encoder that is loaded in the middle of a run would take memory
that was planned without it. Knows nothing of models' insides or Ray.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.texts.read import EncodedTexts, TextsUnfit, command, open_texts
from data_prep.texts.records import Forms
from flow.config import FlowConfig
from flow.prompt import CAPTION, EXTEND_PREFIX, prompt_for
from flow.text import TextEncoder, TextSpec, build_text_encoder
from training.data.latents import open_latents
from training.parallel import Parallel
from training.sections import BatchConfig


def prompt_forms(flow: FlowConfig, batches: BatchConfig, root: str | Path) -> Forms:
    """The forms that prompts have in a run: video, image and extended, by bucket.

    Args:
        flow: the model, which says what a prompt mentions.
        batches: which samples are used, and as what.
        root: folder of latents, path or URI.

    Raises:
        LatentDatasetError: no dataset there, or it holds no bucket of the resolution asked for.
        StorageError: the disk or store fails.
    """
    trained = open_latents(root, "train", batches.resolution).buckets
    dataset = open_latents(root, "all", batches.resolution)
    has_images = any(bucket.is_image for bucket in trained)
    from_clips = {"auto": not has_images, "records": False, "first_frames": True}
    images_of_clips = batches.image_ratio > 0 and from_clips[batches.image_source]
    forms = {}
    for bucket in dataset.buckets:
        # Held-out loss is measured on whole clips, whatever training cuts them to.
        lengths = {bucket.frames, min(bucket.frames, batches.frames or bucket.frames)}
        kinds = {(frames, "") for frames in lengths}
        if images_of_clips:
            kinds.add((1, ""))
        if batches.first_frame_dropout > 0:
            kinds |= {(frames, EXTEND_PREFIX) for frames in lengths if frames > 1}
        forms[str(bucket)] = tuple(
            sorted(
                {
                    prompt_for(
                        CAPTION,
                        flow,
                        num_frames=frames,
                        height=bucket.height,
                        width=bucket.width,
                        fps=dataset.info.fps,
                        prefix=prefix,
                    )
                    for frames, prefix in kinds
                }
            )
        )
    return forms


def both_forms(one: Forms, other: Forms) -> Forms:
    """The forms of two runs on one dataset, such as two stages of a curriculum.

    >>> both_forms({"9x64x64": ("a",)}, {"9x64x64": ("b", "a"), "1x64x64": ("c",)})
    {'9x64x64': ('a', 'b'), '1x64x64': ('c',)}
    """
    buckets = dict.fromkeys([*one, *other])
    return {b: tuple(sorted({*one.get(b, ()), *other.get(b, ())})) for b in buckets}


def find_texts(
    spec: TextSpec,
    flow: FlowConfig,
    batches: BatchConfig,
    root: str | Path,
    *,
    look_at_weights: bool = True,
) -> tuple[EncodedTexts | None, str]:
    """The encoded prompts that a run reads, or None; and a line that says what is done, or "".

    Args:
        spec: the encoder that the model reads.
        flow, batches, root: see `prompt_forms`.
        look_at_weights: see `open_texts`.

    Raises:
        LatentDatasetError, StorageError: see `prompt_forms`.
    """
    forms = prompt_forms(flow, batches, root)
    try:
        texts = open_texts(root, spec, forms, look_at_weights=look_at_weights)
    except TextsUnfit as error:
        if error.exist:
            why = f"text: the encoded prompts of {root} are not read, an encoder is loaded: {error}"
            return None, f"{why}. Make them anew with {command(root)}"
        if spec.kind == "hashed":
            # It costs nothing, so that there is nothing to say.
            return None, ""
        once = f"to encode every prompt once and beforehand, {command(root)}"
        return None, f"text: {spec.path} is loaded by every worker; {once}"
    return texts, f"text: {len(texts):,} prompts read, encoder not loaded"


def open_text(
    spec: TextSpec, flow: FlowConfig, batches: BatchConfig, root: str | Path, parallel: Parallel
) -> TextEncoder:
    """Who makes vectors of a run's prompts, alike on all workers.

    The first worker looks at the weights, so that a store is not asked for them by every process.

    Raises:
        TextError: there are no texts that fit, and the encoder cannot be built.
        LatentDatasetError, StorageError: see `prompt_forms`.
    """
    texts, _line = find_texts(spec, flow, batches, root, look_at_weights=parallel.is_first)
    if parallel.all_agree(texts is not None):
        assert texts is not None
        return texts
    return build_text_encoder(spec, parallel.device)
