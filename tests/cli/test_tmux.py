"""The live canvas in tmux, whose windows change their size while it is drawn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.text.gemma_like import write_tokenizer_json

TMUX = shutil.which("tmux")
ROOT = Path(__file__).parents[2]
WORDS = "".join(f"Line {n} of the answer ends here.\n" for n in range(12)) + "The last line."
STEP = 3  # the step at which the size changes

pytestmark = pytest.mark.skipif(TMUX is None, reason="tmux is not installed")


class Pane:
    """A tmux pane, of a server of its own, in which a made-up answer is drawn."""

    def __init__(self, folder: Path, before: int) -> None:
        """Open a pane of 100 columns and 24 rows. ``before`` lines stand above the answer."""
        write_tokenizer_json(folder)
        self._folder = tempfile.TemporaryDirectory()  # a short path, as a socket needs
        self._socket, pipe = Path(self._folder.name) / "socket", folder / "pipe"
        os.mkfifo(pipe)
        player = [sys.executable, "-m", "tests.cli.live_player", str(folder), str(pipe), WORDS]
        program = ["sh", "-c", 'seq -f "before %g" 1 "$1"; shift; "$@"; sleep 60', "sh", str(before), *player]
        size = "-x", "100", "-y", "25"  # one row is the status line's
        self._tmux("-f", os.devnull, "new-session", "-d", *size, "-c", str(ROOT), *program)
        self._tmux("set", "-g", "status", "off")
        self.resize(100, 24)
        self._ticks = open(pipe, "wb", buffering=0)  # noqa: SIM115 - closed by close()

    def _tmux(self, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        command = [TMUX or "tmux", "-S", str(self._socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    @property
    def rows(self) -> list[str]:
        """The text of the rows in the scrollback and on the screen."""
        return [row.rstrip() for row in self._tmux("capture-pane", "-p", "-S", "-").rstrip("\n").split("\n")]

    def step(self, shown: str) -> None:
        """Draw one more event and wait until the pane shows a text."""
        self._ticks.write(b".")
        deadline = time.monotonic() + 30
        while shown not in " ".join(self.rows):
            assert time.monotonic() < deadline, self.rows
            time.sleep(0.01)

    def resize(self, columns: int, lines: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def finish(self) -> None:
        """Draw the rest of the answer."""
        for step in range(STEP + 1, 11):
            self.step(f"step {step}/48")
        self.step("of the answer")
        self.step("the end")

    def close(self) -> None:
        self._ticks.close()
        self._tmux("kill-server")
        self._folder.cleanup()


@pytest.fixture
def pane(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pane]:
    pane = Pane(tmp_path, request.param)
    yield pane
    pane.close()


SIZES = {
    "narrower": [(60, 24)], "much narrower": [(40, 24)], "wider": [(140, 24)], "taller": [(100, 40)],
    "shorter": [(100, 20)], "to and fro": [(60, 24), (100, 24), (50, 30), (120, 24), (70, 22)],
}  # fmt: skip


def play(pane: Pane, sizes: list[tuple[int, int]]) -> list[str]:
    """Draw an answer whose pane changes its size, and return the rows that stay, without those before the answer."""
    for step in range(1, STEP + 1):
        pane.step(f"step {step}/48")
    for size in sizes:
        pane.resize(*size)
    pane.finish()
    return [row for row in pane.rows if not row.startswith("before")]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("pane", [12, 40], indirect=True, ids=["middle", "bottom"])
def test_only_the_answer_stays_after_a_change_of_size(pane: Pane, sizes: list[tuple[int, int]]) -> None:
    assert play(pane, sizes) == [*WORDS.split("\n"), "the end"]


@pytest.mark.xfail(strict=False, reason="on a quiet machine, the last row of the answer stays twice (tmux 3.3a)")
@pytest.mark.parametrize("pane", [0], indirect=True)
def test_in_a_fresh_pane_only_what_tmux_has_moved_away_stays(pane: Pane) -> None:
    """tmux moves the top rows into its scrollback by itself, when the others are broken into more rows."""
    *moved, end = "\n".join(play(pane, SIZES["much narrower"])).partition("\n".join([*WORDS.split("\n"), "the end"]))
    assert moved[1] and not end
    assert "canvas 1" not in moved[0] and "reading" not in moved[0]
    assert moved[0].count("\n") < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wider", "taller", "shorter"])
@pytest.mark.parametrize("pane", [0], indirect=True)
def test_in_a_fresh_pane_only_the_answer_stays(pane: Pane, name: str) -> None:
    assert play(pane, SIZES[name]) == [*WORDS.split("\n"), "the end"]
