"""Writing: what comes back is what went in, and what cannot be written is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from media.errors import EncodeError, ImageTooLarge, UnreadableImage
from media.read import VideoReader
from media.write import decode_image, encode_mp4, encode_png


def smooth_frames(count: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([rows * 3 + t * 4, columns * 2, (rows + columns) + t], axis=-1)
        for t in range(count)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def test_mp4_comes_back_with_its_times_and_nearly_its_pixels() -> None:
    frames = smooth_frames()
    with VideoReader() as reader:
        clip = reader.read(encode_mp4(frames, 12.5))
    assert clip.frames.shape == frames.shape
    np.testing.assert_allclose(clip.pts_s, np.arange(9) / 12.5, atol=1e-4)
    assert clip.fps == pytest.approx(12.5)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 4


def test_mp4_bytes_are_the_same_every_time_and_start_with_the_index() -> None:
    data = encode_mp4(smooth_frames(), 8)
    assert data == encode_mp4(smooth_frames(), 8)
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((3, 31, 32, 3), np.uint8, "31 rows × 32 columns"),
        ((3, 32, 32), np.uint8, "uint8 \\[T, H, W, 3\\]"),
        ((3, 32, 32, 3), np.float32, "float32"),
        ((0, 32, 32, 3), np.uint8, "no pixel"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(
    shape: tuple[int, ...], dtype: type, words: str
) -> None:
    with pytest.raises(EncodeError, match=words):
        encode_mp4(np.zeros(shape, dtype=dtype), 8)


def test_fps_must_be_positive() -> None:
    with pytest.raises(EncodeError, match="fps is 0"):
        encode_mp4(smooth_frames(), 0)


def test_png_is_lossless() -> None:
    frame_HW3 = smooth_frames(1, 33, 47)[0]
    np.testing.assert_array_equal(decode_image(encode_png(frame_HW3)), frame_HW3)


def test_image_is_turned_upright_by_its_exif_tag() -> None:
    picture = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    assert decode_image(out.getvalue()).shape == (20, 10, 3)


def test_image_caps_hold_before_pixels_are_decoded() -> None:
    data = encode_png(np.zeros((100, 100, 3), dtype=np.uint8))
    with pytest.raises(ImageTooLarge, match="10000 pixels"):
        decode_image(data, max_pixels=9999)
    with pytest.raises(ImageTooLarge, match="bytes"):
        decode_image(data, max_bytes=10)


@pytest.mark.parametrize("cut", [0, 7, 60])
def test_damaged_image_is_unreadable(cut: int) -> None:
    rng = np.random.default_rng(0)
    data = encode_png(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    with pytest.raises(UnreadableImage):
        decode_image(data[:cut])


def test_a_refusal_of_an_image_names_no_object_of_ours() -> None:
    with pytest.raises(UnreadableImage, match=r"5 bytes that are not a PNG, JPEG or WebP image$"):
        decode_image(b"hello")


def test_only_web_formats_are_decoded() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "BMP")
    with pytest.raises(UnreadableImage):
        decode_image(out.getvalue())


def test_the_same_frames_give_the_same_file_every_time() -> None:
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    frames = np.concatenate([np.roll(still, n, axis=2) for n in range(24)])
    assert len({encode_mp4(frames, 16.0) for _ in range(25)}) == 1


def test_grey_of_sixteen_bits_keeps_its_levels() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    frame = decode_image(file.getvalue())
    np.testing.assert_array_equal(frame[..., 0], levels >> 8)
