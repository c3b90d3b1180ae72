"""A small picture on the terminal, by the protocol of kitty, of iTerm2, or sixel, where the terminal knows one.

References: sw.kovidgoyal.net/kitty/graphics-protocol, iterm2.com/documentation-images.html, and for sixel
vt100.net/docs/vt3xx-gp/chapter14.html.
"""

from __future__ import annotations

import base64
import os
import re
import select
import sys
import time
import warnings
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, TextIO

from dgemma_mlx.cli.render.region import can_draw

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 10  # of the terminal, at most
_COLUMNS = 40
_CELL = (9, 18)  # pixels, where the terminal does not tell the size of its cells
_CHUNK = 4096  # characters of base64 in an escape sequence of kitty
_COLORS = 64  # of a sixel picture
_SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft", "xterm-sixel")
_RUN = re.compile(r"(.)\1{3,}")
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")  # the answer to the query for the terminal's device attributes
_SIXEL = b"4"  # among these attributes


def thumbnail(data: bytes, stream: TextIO) -> str:
    """Return the text that shows an image on a terminal, with a line feed at its end; "" where it cannot be shown.

    ``data`` is the file of the image. Nothing is shown without Pillow or with NO_COLOR, in tmux and screen, on streams
    that are not a terminal, and of files that Pillow does not read.
    """
    if not can_draw() or not stream.isatty():
        return ""
    kind = protocol(os.environ) or ("sixel" if _speaks_sixel() else None)
    if kind is None:
        return ""
    cell = _cell(stream)
    image = _small(data, _COLUMNS * cell[0], ROWS * cell[1])
    if image is None:
        return ""
    if kind == "sixel":
        return sixel(image) + "\n"
    file, rows = BytesIO(), -(-image.height // cell[1])
    image.save(file, "PNG")
    return (kitty if kind == "kitty" else iterm2)(file.getvalue(), rows) + "\n"


def protocol(environment: Mapping[str, str]) -> str | None:
    """Return the protocol of the terminal that the environment names: kitty, iterm2 or sixel; None if it names none.

    Other terminals may know sixel and say so when they are asked. tmux and screen, between program and terminal, do
    not pass pictures on.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if _is_multiplexed(environment):
        return None
    if term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty" or environment.get("KITTY_WINDOW_ID"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if term.startswith(_SIXEL_TERMS) else None


def kitty(png: bytes, rows: int) -> str:
    """Return the escape sequences that show a PNG file on so many rows of kitty, which does not answer them."""
    text = base64.b64encode(png).decode()
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    first = f"a=T,f=100,q=2,r={rows},"
    return "".join(
        f"\x1b_G{'' if number else first}m={int(number < len(chunks) - 1)};{chunk}\x1b\\"
        for number, chunk in enumerate(chunks)
    )


def iterm2(png: bytes, rows: int) -> str:
    """Return the escape sequence that shows a PNG file on so many rows of iTerm2."""
    text = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};height={rows};preserveAspectRatio=1:{text}\a"


def sixel(image: Image) -> str:
    """Return the escape sequence that shows an image of Pillow's mode RGB, pixel by pixel, in at most 64 colors."""
    reduced = image.quantize(_COLORS)
    palette, pixels = reduced.getpalette() or [], reduced.tobytes()
    width, height = image.size
    parts = [f'\x1bPq"1;1;{width};{height}']
    for color in sorted(set(pixels)):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * color : 3 * color + 3])
        parts.append(f"#{color};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        rows = [pixels[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        for color in sorted(set(b"".join(rows))):
            bits = (sum((row[x] == color) << y for y, row in enumerate(rows)) for x in range(width))
            line = "".join(chr(63 + value) for value in bits).rstrip("?")  # "?" leaves six pixels as they are
            parts.append(f"#{color}{_RUN.sub(_repeated, line)}$")  # back to the left end
        parts.append("-")  # the next six rows
    return "".join(parts) + "\x1b\\"


def _repeated(run: re.Match[str]) -> str:
    return f"!{len(run[0])}{run[1]}"


def _is_multiplexed(environment: Mapping[str, str]) -> bool:
    """Return whether tmux or screen stands between the program and the terminal."""
    return bool(environment.get("TMUX") or environment.get("STY")) or environment.get("TERM", "").startswith(
        ("tmux", "screen")
    )


@lru_cache(maxsize=1)
def _speaks_sixel() -> bool:
    """Return whether the terminal says that it knows sixel. It is asked once.

    Where keys wait that the user has typed ahead, it is not asked, because its answer would stand among them.
    """
    if _is_multiplexed(os.environ) or not sys.stdin.isatty():
        return False
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    seconds = 1.0 if os.environ.get("SSH_CONNECTION") else 0.3
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        if select.select([descriptor], [], [], 0)[0]:
            return False
        sys.stdout.write("\x1b[c")
        sys.stdout.flush()
        found = _ATTRIBUTES.search(_answer(descriptor, time.monotonic() + seconds))
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
    return found is not None and _SIXEL in found[1].split(b";")


def _answer(descriptor: int, deadline: float) -> bytes:
    """Return what the terminal sends until its answer is whole, or until the deadline."""
    answer = b""
    while not _ATTRIBUTES.search(answer):
        if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
            break
        answer += os.read(descriptor, 1)
    return answer


def _cell(stream: TextIO) -> tuple[int, int]:
    """Return the width and height of a terminal's cell in pixels."""
    import fcntl
    import struct
    import termios

    try:
        rows, columns, width, height = struct.unpack("HHHH", fcntl.ioctl(stream, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        return _CELL
    return (width // columns, height // rows) if min(rows, columns) and min(width, height) > columns else _CELL


def _small(data: bytes, width: int, height: int) -> Image | None:
    """Return an image that is not larger than this, upright and in RGB on white; None if Pillow does not read it."""
    try:
        from PIL import Image, ImageOps

        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as opened:
                opened.draft("RGB", (width, height))  # a JPEG file is decoded small
                image = ImageOps.exif_transpose(opened).convert("RGBA")
        image.thumbnail((width, height))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception:  # Pillow's readers raise errors of many kinds; the name of the file is shown all the same
        return None
