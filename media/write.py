"""Frames out: mp4 and PNG bytes, and the still-image decoder that mirrors the PNG writer.

Works on uint8 RGB arrays in memory. The same frames and the same library versions give the same
bytes, for there is one thread and a bit-exact container. The errors are those of `media.errors`.
Knows nothing of models, Ray, or where the bytes go.
"""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from media.errors import EncodeError, ImageTooLarge, UnreadableImage
from media.frames import Frames

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def encode_mp4(frames: Frames, fps: float, *, crf: int = 18, preset: str = "veryfast") -> bytes:
    """Encode RGB frames as an H.264 yuv420p mp4 with the index in front (plays while loading).

    Args:
        frames: uint8 [T, H, W, 3], T ≥ 1, H and W even (yuv420p halves the colour planes).
        fps: frames per second, > 0.
        crf: x264 quality, 0 (lossless) … 51 (worst).
        preset: x264 speed preset.

    Returns:
        The bytes of the mp4 file.

    Raises:
        EncodeError: wrong dtype or shape, odd size, or an fps that is not positive.

    >>> encode_mp4(np.zeros((9, 32, 64, 3), np.uint8), fps=8)[4:8]
    b'ftyp'
    """
    _check_frames(frames)
    if not (np.isfinite(fps) and 0 < fps <= 1000):
        raise EncodeError(f"fps is {fps!r}; it must be between 0 and 1000 frames per second")
    # NTSC rates are fractions of 1001: the float nearest to 24000/1001 becomes that again.
    rate = Fraction(fps).limit_denominator(1001)
    # The index can only be moved to the front of a real file, never of a stream in memory.
    with tempfile.TemporaryDirectory(prefix="flowreel-") as folder:
        path = Path(folder) / "clip.mp4"
        _write_h264(path, frames, rate, {"crf": str(crf), "preset": preset})
        return path.read_bytes()


def _write_h264(path: Path, frames: Frames, rate: Fraction, x264: dict[str, str]) -> None:
    # `bitexact` leaves out the time of day and the library's version.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    # Its macroblock tree reads memory that nobody wrote where pictures are small: the same frames
    # came out in four different files.
    fixed = {"flags": "+bitexact", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={**x264, **fixed})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # What x264 decides depends on how many threads it has, by default the machine's cores.
        stream.thread_count = 1
        for index, frame_HW3 in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
            picture.pts = index
            picture.time_base = 1 / rate
            container.mux(stream.encode(picture))
        # The encoder holds frames back to look ahead; None makes it give them out.
        container.mux(stream.encode(None))


def encode_png(frame: Frames) -> bytes:
    """Encode one RGB frame, uint8 [H, W, 3], as PNG bytes.

    Raises:
        EncodeError: another dtype or shape.

    >>> frame = np.full((33, 47, 3), 7, np.uint8)
    >>> np.array_equal(decode_image(encode_png(frame)), frame)
    True
    """
    _check_frames(frame[None] if frame.ndim == 3 else frame, even=False)
    if frame.ndim != 3:
        raise EncodeError(f"a PNG holds one frame [H, W, 3]; got shape {tuple(frame.shape)}")
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame), "RGB").save(out, "PNG", optimize=False)
    return out.getvalue()


def decode_image(
    data: bytes, *, max_bytes: int = 32 * 2**20, max_pixels: int = 64_000_000
) -> Frames:
    """Decode a PNG, JPEG or WebP (first frame) to uint8 [H, W, 3], upright by its EXIF tag.

    The size in the header is held against the cap before any pixel is decoded.

    Raises:
        ImageTooLarge: more than `max_bytes` bytes or `max_pixels` pixels.
        UnreadableImage: another format, or damaged data.
    """
    if len(data) > max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data)} bytes; the cap is {max_bytes}. Send a smaller one"
        )
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLarge(
                    f"the image is {width}×{height} = {width * height} pixels; "
                    f"the cap is {max_pixels}. Send a smaller one"
                )
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_eight_bits(upright).convert("RGB"), dtype=np.uint8).copy()
    except ImageTooLarge:
        # A MediaError is a ValueError too, and the clause below must not take it.
        raise
    except UnidentifiedImageError as error:
        # Pillow's own words name the buffer's address, which helps nobody.
        raise UnreadableImage(
            f"{len(data)} bytes that are not a PNG, JPEG or WebP image"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow has a cap of its own, which it applies on opening.
        raise ImageTooLarge(f"{error}. Send a smaller one") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        # Pillow names the object in memory, which says nothing to whoever sent it.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "none of the three formats is recognised" if unknown else error
        raise UnreadableImage(
            f"{len(data)} bytes that are not a whole PNG, JPEG or WebP image ({why})"
        ) from error


def image_facts(data: bytes) -> dict[str, Any]:
    """What an image's header says: `container`, `width` and `height` as stored, `mode` of pixels.

    Raises UnreadableImage where it is none of the formats that `decode_image` reads.

    >>> image_facts(encode_png(np.zeros((2, 3, 3), np.uint8)))
    {'container': 'png', 'width': 3, 'height': 2, 'mode': 'RGB'}
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            name = (image.format or "").lower()
            width, height = image.size
            return {"container": name, "width": width, "height": height, "mode": image.mode}
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{len(data)} bytes whose header is not read") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8: Pillow itself would make white of everything over 255."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, dtype=np.uint32)
    return Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))


def _check_frames(frames: Frames, *, even: bool = True) -> None:
    """Refuse anything but uint8 [T, H, W, 3] with T ≥ 1 and, for video, even H and W."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise EncodeError(
            f"frames are {frames.dtype} of shape {tuple(frames.shape)}; "
            "they must be uint8 [T, H, W, 3]"
        )
    if 0 in frames.shape:
        raise EncodeError(f"frames of shape {tuple(frames.shape)} hold no pixel")
    height, width = frames.shape[1:3]
    if even and (height % 2 or width % 2):
        raise EncodeError(
            f"frames are {height} rows × {width} columns; H.264 yuv420p needs even sizes: "
            f"crop to {height - height % 2} × {width - width % 2}"
        )
