"""Standard input next to a prompt: files, loops, slow pipes, and pipes that nobody closes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dgemma_mlx.cli import stdin
from dgemma_mlx.cli.prompt import read_prompt
from dgemma_mlx.errors import DgemmaError

GENERATE = (sys.executable, "-m", "dgemma_mlx", "generate", "-q", "-m", "demo", "--seed", "1")
SORT = (*GENERATE, "Sort")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function that makes a descriptor standard input, with shorter waits."""
    monkeypatch.setattr(stdin, "_SAY_AFTER", 0.05)
    monkeypatch.setattr(stdin, "_PATIENCE", 0.5)

    with ExitStack() as files:

        def use(descriptor: int) -> None:
            monkeypatch.setattr(sys, "stdin", files.enter_context(os.fdopen(descriptor)))

        yield use


def test_a_slow_pipe_follows_the_prompt(
    reads: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out, into = os.pipe()
    reads(out)

    def write() -> None:
        time.sleep(0.2)
        os.write(into, b"\xef\xbb\xbf7 ")
        time.sleep(0.2)
        os.write(into, b"3 5\n")
        os.close(into)

    thread = threading.Thread(target=write)
    thread.start()
    assert read_prompt("Sort") == "Sort\n\n7 3 5"
    thread.join()
    first, second, third = capsys.readouterr().err.splitlines()
    assert "waiting up to" in first and "< /dev/null" in first
    assert second == "dgemma-mlx: waiting for the end of standard input"
    assert third == "dgemma-mlx: standard input follows the prompt, 5 characters"


def test_a_file_named_dash_is_waited_for_and_does_not_follow_the_prompt(
    reads: Callable[[int], None], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("1 2")
    out, into = os.pipe()
    reads(out)
    timer = threading.Timer(0.8, lambda: (os.write(into, b"7 3 5"), os.close(into)))
    timer.start()
    prompt = read_prompt("Sort", [Path("-"), tmp_path / "notes.txt"])
    assert prompt == f"{tmp_path}/notes.txt:\n```\n1 2\n```\n\nstandard input:\n```\n7 3 5\n```\n\nSort"
    timer.join()


def test_files_need_a_prompt(reads: Callable[[int], None], tmp_path: Path) -> None:
    reads(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(DgemmaError, match="the prompt is empty") as caught:
        read_prompt(None, [tmp_path])
    assert "what to do with the files" in caught.value.hint


def test_a_pipe_that_never_begins_is_left_out_with_a_line(
    reads: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out, into = os.pipe()
    reads(out)
    assert read_prompt("Sort 7 3 5") == "Sort 7 3 5"
    os.close(into)
    assert "without it" in capsys.readouterr().err.splitlines()[-1]


def test_a_socket_must_have_text_at_once(reads: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        reads(theirs.detach())
        assert read_prompt("Sort 7 3 5") == "Sort 7 3 5"
        assert capsys.readouterr().err == ""
        ours.sendall(b"7 3 5")
        ours.shutdown(socket.SHUT_WR)
        assert read_prompt("Sort") == "Sort\n\n7 3 5"


def test_stdin_as_the_prompt_is_waited_for_with_a_line(
    reads: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out, into = os.pipe()
    reads(out)
    timer = threading.Timer(0.8, lambda: (os.write(into, b"Sort 7 3 5"), os.close(into)))
    timer.start()
    assert read_prompt("-") == "Sort 7 3 5"
    timer.join()
    assert "waiting for text" in capsys.readouterr().err


def test_a_loop_over_a_file_keeps_its_lines(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Sort 7 3 5\nSort 9 8 1\n")
    script = 'while read -r line; do "$@" "$line"; done < "$0"'
    done = subprocess.run(
        ["bash", "-c", script, str(prompts), *GENERATE], capture_output=True, text=True, timeout=60, check=False,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["3 5 7", "1 8 9"], done.stderr


def test_a_file_and_a_pipe_follow_the_prompt(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_bytes(b"\xef\xbb\xbf7 3 5\n")
    with notes.open("rb") as file:
        whole = subprocess.run(SORT, stdin=file, capture_output=True, timeout=60, check=False, env=ENVIRONMENT)
    piped = subprocess.run(SORT, input=b"7 3 5", capture_output=True, timeout=60, check=False, env=ENVIRONMENT)
    assert (whole.stdout, whole.stderr) == (piped.stdout, piped.stderr)
    assert piped.returncode == 0 and piped.stdout.strip()


@pytest.mark.parametrize("read", [stdin.read_stdin, stdin.read_beside_prompt])
def test_input_without_an_end_is_refused(reads: Callable[[int], None], read: Callable[[], str]) -> None:
    reads(os.open("/dev/zero", os.O_RDONLY))
    with pytest.raises(DgemmaError, match="standard input is longer than 64") as caught:
        read()
    assert caught.value.exit_code == 2
