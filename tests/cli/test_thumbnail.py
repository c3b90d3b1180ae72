"""Thumbnails: what is written for each kind of terminal, and that nothing is left behind where there is none."""

from __future__ import annotations

import base64
import re
import sys
from io import BytesIO
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from dgemma_mlx.cli.render.thumbnail import ROWS, iterm2, kitty, protocol, sixel
from tests.cli.terminal import Terminal
from tests.vision.seeing import drawn, png

SHOW = """
import sys
from pathlib import Path
from dgemma_mlx.cli.render.thumbnail import thumbnail
for _ in range(2):
    sys.stdout.write(thumbnail(Path(sys.argv[1]).read_bytes(), sys.stdout))
print("ready", flush=True)
print("read", repr(input()))
"""


def kitty_file(text: str) -> tuple[str, bytes]:
    """Return the keys of the first sequence of kitty's protocol, and the file of all of them."""
    sequences = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in sequences) == text
    assert all(len(data) == 4096 for _, data in sequences[:-1])
    assert [keys.endswith("m=1") for keys, _ in sequences] == [True] * (len(sequences) - 1) + [False]
    return sequences[0][0], base64.b64decode("".join(data for _, data in sequences))


def sixel_image(text: str) -> Image.Image:
    """Return the image of a sixel sequence."""
    found = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text)
    assert found is not None
    width, height = int(found[1]), int(found[2])
    image, colors, color, x, y = Image.new("RGB", (width, height), "magenta"), {}, 0, 0, 0
    for number, red, green, blue, chosen, count, repeated, sign in re.findall(
        r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~$-])", found[3]
    ):
        if number:
            colors[int(number)] = tuple(round(int(value) * 2.55) for value in (red, green, blue))
        elif chosen:
            color = int(chosen)
        elif sign == "$":
            x = 0
        elif sign == "-":
            x, y = 0, y + 6
        else:
            bits, end = ord(repeated or sign) - 63, x + int(count or 1)
            for column, row in product(range(x, end), range(6)):
                if bits >> row & 1:
                    image.putpixel((column, y + row), colors[color])
            x = end
    return image


def test_kitty_gets_the_file_in_chunks() -> None:
    file = png(1, 80, 60)
    assert len(file) > 3 * 4096
    keys, found = kitty_file(kitty(file, 4))
    assert found == file and keys == "a=T,f=100,q=2,r=4,m=1"
    assert kitty_file(kitty(b"abc", 1)) == ("a=T,f=100,q=2,r=1,m=0", b"abc")


def test_iterm2_gets_the_file_and_its_size() -> None:
    found = re.fullmatch(r"\x1b]1337;File=([^:]*):(.*)\a", iterm2(png(1), 4))
    assert found is not None and base64.b64decode(found[2]) == png(1)
    assert found[1] == f"inline=1;size={len(png(1))};height=4;preserveAspectRatio=1"


@pytest.mark.parametrize("size", [(1, 1), (13, 7), (90, 30)])
def test_a_sixel_picture_has_the_same_pixels(size: tuple[int, int]) -> None:
    image = drawn(3, *size).quantize(16).convert("RGB")
    shown = sixel_image(sixel(image))
    pairs = zip(image.tobytes(), shown.tobytes(), strict=True)
    assert shown.size == size and max(abs(one - other) for one, other in pairs) <= 2  # a percent


@pytest.mark.parametrize(("environment", "kind"), [
    ({"TERM": "xterm-kitty"}, "kitty"), ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
    ({"TERM_PROGRAM": "ghostty"}, "kitty"), ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
    ({"TERM_PROGRAM": "WezTerm"}, "iterm2"), ({"LC_TERMINAL": "iTerm2"}, "iterm2"), ({"TERM": "foot-extra"}, "sixel"),
    ({"TERM": "mlterm"}, "sixel"), ({"TERM": "xterm-256color"}, None), ({}, None),
    ({"TERM": "xterm-kitty", "TMUX": "/tmp/x,1,0"}, None), ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, None),
])  # fmt: skip
def test_the_environment_names_the_terminal(environment: dict[str, str], kind: str | None) -> None:
    assert protocol(environment) == kind


class Answering(Terminal):
    """A terminal that answers the query for its attributes."""

    attributes = ""

    def read(self, seconds: float = 0.1) -> bool:
        before = self.output.count(b"\x1b[c")
        is_open = super().read(seconds)
        if self.attributes and self.output.count(b"\x1b[c") > before:
            self.type(self.attributes)
        return is_open


PLAIN = {"TMUX": "", "STY": "", "TERM_PROGRAM": "", "LC_TERMINAL": "", "KITTY_WINDOW_ID": "", "SSH_CONNECTION": ""}


@pytest.mark.parametrize(("attributes", "shown"), [
    ("\x1b[?62;4;22c", True), ("\x1b[?62;22;44c", False), ("", False)
])  # fmt: skip
def test_a_terminal_is_asked_once_and_its_answer_is_no_input(tmp_path: Path, attributes: str, shown: bool) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 400, 300))
    with Answering([str(tmp_path / "a.png")], env=PLAIN, program=(sys.executable, "-c", SHOW)) as terminal:
        terminal.attributes = attributes
        terminal.wait_for_text("ready")
        terminal.type("typed\r")
        assert terminal.finish() == 0
        assert terminal.text.endswith("read 'typed'")
        assert terminal.output.count(b"\x1b[c") == 1
        assert terminal.output.count(b"\x1bPq") == (2 if shown else 0)


def test_a_thumbnail_is_small_upright_and_on_white(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (300, 900), "blue"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    program = (sys.executable, "-c", SHOW)
    with Terminal([str(tmp_path / "a.png")], env={**PLAIN, "TERM": "xterm-kitty"}, program=program) as terminal:
        terminal.wait_for_text("ready")
        output = terminal.output.decode()
    keys, file = kitty_file(output[: output.index("\r\n")])
    with Image.open(BytesIO(file)) as shown:
        assert shown.size == (360, 120) and shown.getpixel((0, 0)) == (0, 0, 255)
    rows = re.search(r"r=(\d+)", keys)
    assert rows is not None and int(rows[1]) <= ROWS


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TMUX": "x"}, {"file": "no image"}])
def test_nothing_is_written_where_no_picture_can_be(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "a.png").write_bytes(environment.get("file", "").encode() or png(1))
    with Terminal(
        [str(tmp_path / "a.png")], env={**PLAIN, "TERM": "foot", **environment}, program=(sys.executable, "-c", SHOW)
    ) as terminal:
        terminal.wait_for_text("ready")
        assert terminal.output.startswith(b"ready")
