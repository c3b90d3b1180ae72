"""Reading of pictures: from a file to the pixels that the vision tower sees.

Reference: transformers ``Gemma4ImageProcessorPil``, which this module equals bit for bit. Needs Pillow, which is an
optional dependency.
"""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dgemma_mlx.checkpoint.vision_config import BUDGETS, VisionConfig
from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError, how_to_install

if TYPE_CHECKING:
    from PIL.Image import Image

_VERSION = b"dgemma-mlx pixels 1"  # of the preprocessing; part of a picture's key
# Formats whose readers are part of Pillow and run no other program, as the one for EPS does.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
_OTHER_FILE = "Pictures may be PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF files, among others."
# Files that are often taken for pictures that can be read: their first bytes, what they are, and what to do.
_OTHER_KINDS = (
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC picture, which Pillow does not read",
     "Save it as JPEG; on a Mac: sips -s format jpeg FILE --out FILE.jpg"),
    (rb"%PDF-", "a PDF file", "Save its page as a picture; on a Mac: sips -s format png FILE --out FILE.png"),
    (rb"....ftyp(?!avi[fs])|....moov|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video",
     "`--video FILE` of generate and `/video FILE` in a chat show videos."),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the vision tower sees it.

    Attributes:
        name: What messages call the picture, for example its file's name.
        pixels: The resized picture, (height, width, 3) uint8, RGB.
        grid: Numbers of rows and of columns of patches.
        tokens: Number of soft tokens.
        budget: Number of soft tokens that the picture aimed at.
        key: A negative number of 63 bits that is the same for equal pixels, budgets and grids only.
        size: Width and height of the original, upright, in pixels.
    """

    name: str
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    grid: tuple[int, int]
    tokens: int
    budget: int
    key: int
    size: tuple[int, int]

    def patches(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the patches, row by row: (N, 3 * patch_size ** 2) float32 from 0 to 1, the color innermost."""
        rows, columns = self.grid
        height, width, _ = self.pixels.shape
        blocks = self.pixels.reshape(rows, height // rows, columns, width // columns, 3).transpose(0, 2, 1, 3, 4)
        levels = blocks.reshape(rows * columns, -1).astype(np.float64)
        scaled: np.ndarray[Any, np.dtype[np.float64]] = levels * (1 / 255)
        return scaled.astype(np.float32)


def read_picture(source: str | Path | bytes, config: VisionConfig, budget: int, name: str) -> Picture:
    """Read a picture and resize it.

    It is turned upright as its EXIF data say, unless these are damaged. Of an animation, the first frame is read. What
    is transparent becomes white. Grey levels of more than 8 bits are scaled to 8 bits.

    Args:
        source: The path of a file, or a file's content.
        config: Configuration of the vision tower.
        budget: Number of soft tokens to aim at, one of ``BUDGETS``. Smaller pictures are enlarged.
        name: What messages call the picture; each begins with it.

    Raises:
        DgemmaError: The tower is not supported, Pillow is missing, or the source is not a picture that can be read.
    """
    require_pillow()
    from PIL import Image

    config.require_supported()
    with (
        regular_file(source, name, _OTHER_FILE) as file, _pillow_errors(name, file),
        Image.open(file, formats=_FORMATS) as image,
    ):  # fmt: skip
        if Image.MAX_IMAGE_PIXELS is not None and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        upright = _upright_rgb(image)
    return resized_picture(upright, config, budget, name)


def require_pillow() -> None:
    """Raise ``DgemmaError`` (exit code 2) when Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        hint = f"Run {how_to_install('pillow')}."
        raise DgemmaError("reading images needs Pillow", hint, exit_code=2) from None


def resized_picture(image: Image, config: VisionConfig, budget: int, name: str) -> Picture:
    """Resize an image of Pillow's mode RGB for the vision tower. See ``read_picture``."""
    from PIL.Image import Resampling

    if budget not in BUDGETS:
        choices = ", ".join(map(str, BUDGETS))
        raise DgemmaError(f"{name}: no budget of {shown(budget)} soft tokens", f"Choose one of {choices}.", exit_code=2)
    width, height = target_size(*image.size, config, budget)
    grid = height // config.patch_size, width // config.patch_size
    if max(grid) > config.position_embedding_size:
        raise DgemmaError(
            f"{name} is too long and narrow for the vision tower: {image.width} x {image.height} pixels",
            "Cut it into several pictures, or choose a smaller budget.", exit_code=2,
        )
    small = image if image.size == (width, height) else image.resize((width, height), Resampling.BICUBIC)
    pixels = np.array(small)
    header = f"{budget} {grid[0]} {grid[1]} {width} {height} ".encode()
    digest = sha256(_VERSION + b" " + header + pixels.tobytes()).digest()
    key = -1 - (int.from_bytes(digest[:8], "big") >> 1)
    tokens = math.prod(grid) // config.pooling_kernel_size**2
    return Picture(name, pixels, grid, tokens, budget, key, image.size)


def target_size(width: int, height: int, config: VisionConfig, budget: int) -> tuple[int, int]:
    """Return the width and height to which a picture is resized.

    They are the largest multiples of a soft token's side that keep the proportions about and need no more than
    ``budget`` soft tokens.
    """
    side = config.pooling_kernel_size * config.patch_size
    factor = math.sqrt(budget * side**2 / (height * width))
    tall, wide = (math.floor(factor * length / side) * side for length in (height, width))
    if tall == 0:
        tall, wide = side, min(width // height, budget) * side
    elif wide == 0:
        tall, wide = min(height // width, budget) * side, side
    return wide, tall


def _upright_rgb(image: Image) -> Image:
    """Return a loaded image upright, in mode RGB, with white where it is transparent."""
    from PIL import Image as _Image
    from PIL import ImageOps

    with suppress(Exception):  # Pillow raises errors of many kinds for damaged EXIF data, which other programs ignore
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _Image.fromarray(_eight_bits(np.asarray(image)))
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = _Image.new("RGBA", image.size, (255, 255, 255, 255))
    return _Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale grey levels (height, width) to 8 bits.

    Integers are levels of 16 bits, and floats levels from 0 to 1. If some lie outside, the least level becomes black
    and the greatest white; a single level becomes black. Raises ``ValueError`` for levels that are not finite.
    """
    levels = grey.astype(np.float64)
    low, high = float(levels.min()), float(levels.max())
    if not math.isfinite(high - low):
        raise ValueError("it has grey levels that are not finite")
    white = 1.0 if grey.dtype.kind == "f" else 65_535.0
    if low >= 0 and high <= white:
        low, high = 0.0, white
    return np.rint((levels - low) * (255 / ((high - low) or 1))).astype(np.uint8)


@contextmanager
def regular_file(source: str | Path | bytes, name: str, hint: str) -> Iterator[BinaryIO]:
    """Yield a file, given by its path or its content, open for reading.

    Raises ``DgemmaError`` (exit code 2), with ``hint``, when it cannot be opened, is not a regular file, or is empty.
    """
    if isinstance(source, bytes):
        if not source:
            raise DgemmaError(f"{name} is empty", hint, exit_code=2)
        yield BytesIO(source)
        return
    try:
        file = open(source, "rb", opener=_without_waiting)  # noqa: SIM115  closed below
    except (OSError, ValueError) as error:
        raise DgemmaError(f"{name} cannot be read: {reason(error)}", "Check the path.", exit_code=2) from None
    with file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise DgemmaError(f"{name} is not a file", hint, exit_code=2)
        if not facts.st_size:
            raise DgemmaError(f"{name} is empty", hint, exit_code=2)
        yield file


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A FIFO without a writer is opened as well; otherwise it would block."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def _pillow_errors(name: str, file: BinaryIO) -> Iterator[None]:
    """Turn what Pillow raises while it reads ``file`` into a ``DgemmaError`` that begins with ``name``."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in a file that Pillow reads all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS or 0
        raise DgemmaError(f"{name} has more than {most:,} pixels", "Make the picture smaller.", exit_code=2) from None
    except UnidentifiedImageError:
        raise _no_picture(name, file) from None
    except Exception as error:  # readers of damaged files raise nearly anything
        raise DgemmaError(
            f"{name} cannot be read: {reason(error)}", "The file may be damaged or cut off.", exit_code=2
        ) from None


def _no_picture(name: str, file: BinaryIO) -> DgemmaError:
    """Return the error about a file that is not a picture that Pillow reads. It says what the file is, if known."""
    file.seek(0)
    head = file.read(32)
    for magic, kind, hint in _OTHER_KINDS:
        if re.match(magic, head, re.DOTALL):
            return DgemmaError(f"{name} is {kind}", hint, exit_code=2)
    return DgemmaError(f"{name} is not a picture that Pillow reads", _OTHER_FILE, exit_code=2)
