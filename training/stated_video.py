"""The videos that a model learns: those of its dataset, held against what its user states.

The dataset decides, for it was cut before; what a user states (a recipe's `prepare.bucket`, say)
is only checked. Knows nothing of training, of models' insides or of Ray.

    FlowreelError, ValueError
    └── VideoMismatch    what is stated and what the dataset holds differ, or it holds nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from flow.codec_factors import CodecFactors
from flow.model_folder import VideoSpec
from flowreel.errors import FlowreelError


class VideoMismatch(FlowreelError, ValueError):
    """Videos that the dataset does not hold; the message names what is stated and what is held."""


@dataclass(frozen=True)
class StatedVideo:
    """What a user states of the clips that a model learns; the dataset decides the rest.

    Attributes:
        num_frames: video frames of a clip, not compared with images; None: not stated.
        height, width: pixels of a clip; None: not stated.
        fps: frames per second of a clip; None: not stated.
        sizes: (height, width) of several buckets, in pixels; none: not stated.
        frame_counts: several lengths of clips, in frames; none: not stated.

    >>> StatedVideo(height=64).differences(Bucket(17, 128, 128), fps=8.0)
    {'height': (64, 128)}
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    frame_counts: tuple[int, ...] = ()

    def differences(self, bucket: Bucket, fps: float) -> dict[str, tuple[float, float]]:
        """What is stated otherwise than a bucket has it: (stated, held) by name.

        Several sizes and lengths are left out: see `admits`.
        """
        held = {"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        if bucket.frames == 1:
            del held["num_frames"]
        pairs = {name: (getattr(self, name), value) for name, value in {**held, "fps": fps}.items()}
        return {k: pair for k, pair in pairs.items() if pair[0] is not None and pair[0] != pair[1]}

    def admits(self, bucket: Bucket, fps: float) -> bool:
        """Whether a bucket is one of those that are stated."""
        size_fits = not self.sizes or (bucket.height, bucket.width) in self.sizes
        length_fits = not self.frame_counts or bucket.frames in (*self.frame_counts, 1)
        return size_fits and length_fits and not self.differences(bucket, fps)


def video_spec(
    dataset: LatentDataset,
    stated: StatedVideo,
    factors: CodecFactors,
    *,
    longest: int | None = None,
) -> VideoSpec:
    """The videos that a model makes which is trained on this dataset.

    They are those of one bucket. Of several buckets it is the one with most clips in the split (the
    largest of equals), among those that are stated where something is. A dataset without clips
    gives images.

    Args:
        dataset: the training split.
        stated: every size and number in it must be one that the dataset holds.
        factors: the codec's, in space and time.
        longest: frames that longer clips are cut to; 1 for a model of images; None: not cut.

    Raises:
        VideoMismatch: the dataset holds nothing, or not what is stated.
        CodecError: clips cannot be cut to so many frames.
    """
    clips = {b: ids for b, ids in dataset.buckets.items() if b.frames > 1} or dataset.buckets
    if not clips:
        raise VideoMismatch(
            f"the {dataset.split} split of {dataset.folder.where()} is empty; prepare more clips"
        )
    fps = dataset.info.fps
    # Of a bucket that was cut for, there may happen to be no clip.
    held_sizes = {(bucket.height, bucket.width) for bucket in dataset.info.buckets}
    admitted = {bucket: ids for bucket, ids in clips.items() if stated.admits(bucket, fps)}
    if not admitted or not held_sizes.issuperset(stated.sizes):
        raise VideoMismatch(_mismatch(dataset, stated, clips))
    bucket = max(admitted, key=lambda b: (len(admitted[b]), tuple(b)))
    num_frames = min(bucket.frames, longest or bucket.frames)
    factors.latent_frames(num_frames)
    return VideoSpec(num_frames, bucket.height, bucket.width, fps, *factors)


def _mismatch(
    dataset: LatentDataset, stated: StatedVideo, clips: Mapping[Bucket, Sequence[str]]
) -> str:
    """One line: what is stated, what the dataset holds, and how to go on."""
    fps = dataset.info.fps
    # The bucket nearest to what is stated says least; of equals, the one with most clips.
    nearest = min(clips, key=lambda b: (len(stated.differences(b, fps)), -len(clips[b]), tuple(b)))
    differences = stated.differences(nearest, fps)
    statements = [f"{name} {value:g}" for name, (value, _held) in differences.items()]
    settings = [
        f"--set prepare.bucket.{name}={held:g}" for name, (_value, held) in differences.items()
    ]
    if stated.sizes:
        statements.append(f"sizes {', '.join(f'{h}x{w}' for h, w in stated.sizes)}")
        held = sorted({(bucket.height, bucket.width) for bucket in clips})
        sizes = ",".join(f"[{height},{width}]" for height, width in held)
        settings += [f"--set prepare.bucket.{name}=[]" for name in ("aspects", "resolutions")]
        settings.append(f"--set 'prepare.bucket.sizes=[{sizes}]'")
    if stated.frame_counts and not any(b.frames in stated.frame_counts for b in clips):
        statements.append(f"frame_counts {', '.join(map(str, stated.frame_counts))}")
        counts = ",".join(str(count) for count in sorted({b.frames for b in clips}, reverse=True))
        settings.append(f"--set 'prepare.bucket.frame_counts=[{counts}]'")
    return (
        f"prepare.bucket states {', '.join(statements)}, but {dataset.folder.where()} holds clips "
        f"of {', '.join(str(bucket) for bucket in sorted(clips))} (frames x height x width) at "
        f"{fps:g} fps; train with {' '.join(settings)}, or prepare them again"
    )
