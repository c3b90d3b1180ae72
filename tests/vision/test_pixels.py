"""Tests of reading pictures. ``tests/oracle/test_vision_oracle.py`` compares the patches with transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgemma_mlx.checkpoint.vision_config import BUDGETS, VisionConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.vision.pixels import Picture, read_picture, target_size
from tests.model.odd_values import one_line
from tests.vision.towers import noise, saved

CONFIG = VisionConfig()


def read(source: str | Path | bytes, budget: int = 70) -> Picture:
    return read_picture(source, CONFIG, budget, "cat.png")


def failure(source: str | Path | bytes, budget: int = 70) -> str:
    with pytest.raises(DgemmaError) as error:
        read(source, budget)
    assert one_line(error.value)
    assert error.value.hint
    assert error.value.exit_code == 2
    return error.value.message


@pytest.mark.parametrize(
    ("size", "expected", "tokens"),
    [((1, 1), (768, 768), 256), ((1600, 1200), (912, 672), 266), ((20, 3000), (48, 9792), 204),
     ((3000, 20), (9792, 48), 204), ((1, 9000), (48, 13440), 280)],
)  # fmt: skip
def test_sizes_at_280_soft_tokens(size: tuple[int, int], expected: tuple[int, int], tokens: int) -> None:
    assert target_size(*size, CONFIG, 280) == expected
    assert expected[0] * expected[1] // 48**2 == tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_picture_never_exceeds_its_budget(budget: int) -> None:
    for width in (1, 7, 48, 100, 999, 5000):
        for height in (1, 30, 500, 4000):
            wide, tall = target_size(width, height, CONFIG, budget)
            assert wide % 48 == tall % 48 == 0
            assert 0 < wide * tall // 48**2 <= budget


def test_a_patch_is_a_square_of_pixels_with_the_color_innermost() -> None:
    picture = read(saved(noise(336, 432)))
    rows, columns = picture.grid
    assert picture.pixels.shape == (16 * rows, 16 * columns, 3)
    patch = picture.patches()[2 * columns + 5].reshape(16, 16, 3)
    assert np.array_equal(patch, (picture.pixels[32:48, 80:96] * (1 / 255)).astype(np.float32))
    assert picture.tokens == rows * columns // 9 == 63
    assert picture.size == (336, 432)


def test_the_key_is_that_of_the_pixels_not_of_the_file() -> None:
    key = read(saved(noise(336, 432))).key
    assert -(2**63) <= key < 0
    assert read(saved(noise(336, 432), "BMP")).key == key
    assert read(saved(noise(336, 432)), budget=140).key != key
    other = noise(336, 432)
    other.putpixel((0, 0), (1, 2, 3))
    assert read(saved(other)).key != key


def test_a_picture_is_turned_upright() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (0, 0, 100, 100))
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise: the left side comes up
    picture = read(saved(image, exif=orientation))
    assert picture.size == (100, 200)
    assert picture.pixels[0, 0].tolist() == [0, 0, 255] and picture.pixels[-1, -1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_picture_whose_orientation_is_damaged_stays_as_it_is(kind: str) -> None:
    picture = read(saved(Image.new("RGB", (200, 100)), kind, exif=b"Exif\0\0what no camera writes"))
    assert picture.size == (200, 100)


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_becomes_white(mode: str, clear: tuple[int, ...]) -> None:
    assert (read(saved(Image.new(mode, (9, 9), clear))).pixels == 255).all()


def test_a_transparent_color_of_a_palette_becomes_white() -> None:
    image = Image.new("RGB", (384, 384), "red")
    image.paste("blue", (0, 0, 192, 384))
    palette = image.quantize(2)
    pixels = read(saved(palette, transparency=palette.getpixel((0, 0)))).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, -1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 65_535], [257 * 7, 32_768]], np.uint16), [0, 255, 7, 128]),
        (np.array([[0, 65_535], [257 * 7, 32_768]], np.int32), [0, 255, 7, 128]),
        (np.array([[0, 1], [0.5, 0.2]], np.float32), [0, 255, 128, 51]),
        (np.array([[-10, 20], [5, 20]], np.float32), [0, 255, 128, 255]),
        (np.array([[0, 1 << 20], [1 << 19, 0]], np.int32), [0, 255, 128, 0]),
        (np.full((2, 2), 1 << 20, np.int32), [0, 0, 0, 0]),
    ],
    ids=["16 bits", "32 bits", "0 to 1", "any floats", "large integers", "one level"],
)
def test_grey_levels_of_more_than_8_bits_are_scaled(levels: np.ndarray[Any, Any], expected: list[int]) -> None:
    large = levels.repeat(48 * 4, 0).repeat(48 * 4, 1)  # 384 x 384: resized to itself, so that no level is mixed
    pixels = read(saved(Image.fromarray(large), "TIFF")).pixels
    corners = [pixels[y, x, 0] for y in (0, -1) for x in (0, -1)]
    assert corners == expected


def test_levels_that_are_no_numbers_are_refused() -> None:
    image = Image.fromarray(np.array([[0, np.nan]], np.float32))
    assert failure(saved(image, "TIFF")) == "cat.png cannot be read: it has grey levels that are not finite"


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    picture = read(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = saved(noise(90, 80), kind)
    for length in (len(data) - len(data) // 4, len(data) // 2, 20, 3):
        assert failure(data[:length]).startswith("cat.png ")


@pytest.mark.parametrize(("data", "words", "hint"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture, which Pillow does not read", "sips -s format jpeg"),
    (b"%PDF-1.4\n", "is a PDF file", "sips -s format png"),
    (b"\0\0\0\x20ftypisom\0\0\2\0", "is a video", "--video FILE"),
    (b"\0\0\0\x14ftypqt  \0\0\2\0", "is a video", "--video FILE"),
    (b"\x1a\x45\xdf\xa3\0\0", "is a video", "--video FILE"),
    (b"\0\0\0\x18ftypavif\0\0\0\0", "", ""),
])  # fmt: skip
def test_what_is_often_taken_for_a_picture_is_named(data: bytes, words: str, hint: str) -> None:
    with pytest.raises(DgemmaError) as caught:
        read(data)
    assert words in caught.value.message and hint in (caught.value.hint or "")
    assert bool(words) or "video" not in caught.value.message


def test_what_is_not_a_picture_is_refused(tmp_path: Path) -> None:
    assert failure(b"hello") == "cat.png is not a picture that Pillow reads"
    assert failure(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "cat.png is not a picture that Pillow reads"
    assert failure(b"") == "cat.png is empty"
    assert failure(tmp_path) == "cat.png cannot be read: Is a directory"
    assert failure(tmp_path / "none.png") == "cat.png cannot be read: No such file or directory"
    assert failure("a\0b") == "cat.png cannot be read: embedded null byte"
    os.mkfifo(tmp_path / "fifo")
    assert failure(tmp_path / "fifo") == "cat.png is not a file"
    (tmp_path / "empty").touch()
    assert failure(tmp_path / "empty") == "cat.png is empty"


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert read(saved(Image.new("L", (50, 40)))).size == (50, 40)
    for size in ((50, 41), (500, 400)):  # Pillow warns of the first and refuses the second
        assert failure(saved(Image.new("L", size))) == "cat.png has more than 2,000 pixels"


def test_a_picture_without_pixels_is_refused() -> None:
    header = b"P6\n0 5\n255\n"
    assert failure(header).startswith("cat.png ")


def test_odd_budgets_are_refused() -> None:
    assert failure(saved(noise(9, 9)), budget=100) == "cat.png: no budget of 100 soft tokens"


def test_a_picture_too_long_for_the_position_table_is_refused() -> None:
    with pytest.raises(DgemmaError, match="cat is too long and narrow for the vision tower: 1 x 5000 pixels"):
        read_picture(saved(Image.new("L", (1, 5000))), VisionConfig(position_embedding_size=100), 70, "cat")


def test_a_missing_pillow_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(DgemmaError) as error:
        read(b"any")
    assert error.value.message == "reading images needs Pillow"
    assert error.value.hint == "Run pip install pillow, or pipx inject dgemma-mlx pillow."
