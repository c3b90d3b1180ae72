"""``--prompt-cache`` in real processes: a prompt that one run has encoded is not encoded again by the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PROGRAM = (sys.executable, "-m", "dgemma_mlx")
GENERATE = ("generate", "-m", "demo", "--seed", "1", "-q")
CHAT = ("chat", "-m", "demo", "--seed", "1")
LONG = "Hello " * 60 + "My name is Ana."  # more tokens than the sliding window has
def settling_after(steps: int) -> dict[str, str]:
    count = str(steps)
    return {"DGEMMA_SPEED": "reference", "DGEMMA_MAX_DENOISING_STEPS": count, "DGEMMA_STABILITY_THRESHOLD": count}


SLOW = {**settling_after(100), "DGEMMA_MAX_TOKENS": "64"}
ENDLESS = settling_after(100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "prompt.cache"  # in a folder that does not exist yet


def start(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    few = {"DGEMMA_MAX_DENOISING_STEPS": "4", "DGEMMA_MAX_TOKENS": "32", "DGEMMA_STATE": str(tmp_path / "state")}
    return subprocess.Popen(
        [*PROGRAM, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **few, **variables},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip


def run(tmp_path: Path, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Run the program and return its exit code, stdout and stderr."""
    with start(tmp_path, *arguments) as process:
        out, err = process.communicate(stdin, timeout=180)
        return process.returncode, out, err


def answer(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    code, out, err = run(tmp_path, *GENERATE, "--json", *arguments)
    assert (code, err) == (0, "") or "low confidence" in err or "cut off" in err
    record: dict[str, Any] = json.loads(out)
    return record


def cached(record: dict[str, Any]) -> int:
    count: int = record["statistics"]["cached_tokens"]
    return count


def test_the_second_run_encodes_nothing_and_answers_alike(tmp_path: Path, file: Path) -> None:
    first, second = (answer(tmp_path, "--prompt-cache", str(file), LONG) for _ in range(2))
    without = answer(tmp_path, LONG)
    assert cached(first) == cached(without) == 0
    assert cached(second) == second["statistics"]["prompt_tokens"] > 64
    assert first["tokens"] == second["tokens"] == without["tokens"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_generate_goes_on_where_a_chat_was_left(tmp_path: Path, file: Path) -> None:
    code, out, _ = run(tmp_path, *CHAT, "--prompt-cache", str(file), stdin="Sort 7 3 5\n/clear\nSort 9 3 5\n")
    assert (code, out) == (0, "3 5 7\n3 5 9\n")
    again = answer(tmp_path, "--prompt-cache", str(file), "Sort 9 3 5")
    assert cached(again) == again["statistics"]["prompt_tokens"]


def test_a_chat_goes_on_where_generate_ended(tmp_path: Path, file: Path) -> None:
    first = answer(tmp_path, "--prompt-cache", str(file), LONG)
    code, _, err = run(tmp_path, *CHAT, "--prompt-cache", str(file), stdin=f"{LONG}\n/stats\n")
    assert code == 0
    (row,) = [row for row in err.splitlines() if row.startswith("cached tokens")]
    assert int(row.split()[-1]) == first["statistics"]["prompt_tokens"]


def interrupt(process: subprocess.Popen[str], message: str = "") -> None:
    """Press Ctrl-C as soon as the program has written something."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(message)
    process.stdin.close()
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(180) == 130
    assert process.stderr.read().endswith("interrupted\n")


def test_an_interrupted_answer_leaves_the_prompt_encoded(tmp_path: Path, file: Path) -> None:
    with start(tmp_path, *GENERATE, "--prompt-cache", str(file), "--jsonl", LONG, **ENDLESS) as process:
        interrupt(process)
    again = answer(tmp_path, "--prompt-cache", str(file), LONG)
    assert cached(again) == again["statistics"]["prompt_tokens"]


def test_an_interrupted_chat_leaves_the_prompt_encoded(tmp_path: Path, file: Path) -> None:
    prompt = "Count from 13 to 40."  # two canvases; the interrupt comes before the second
    with start(tmp_path, *CHAT, "--prompt-cache", str(file), **SLOW) as process:
        interrupt(process, f"{prompt}\n")
    assert 0 < cached(answer(tmp_path, "--prompt-cache", str(file), prompt))


def refused(tmp_path: Path, *arguments: str, code: int = 1) -> str:
    """Run a command that is refused and return the line that says why."""
    found, out, err = run(tmp_path, *arguments, stdin="Sort 7 3 5\n")
    message, hint = err.splitlines()
    assert (found, out) == (code, "")
    assert message.startswith("dgemma-mlx: ") and hint.startswith("hint: ")
    return message


@pytest.mark.parametrize("command", [(*GENERATE, "Sort 7 3 5"), CHAT])
def test_a_file_that_cannot_be_used_is_one_line_before_any_answer(
    tmp_path: Path, file: Path, command: tuple[str, ...]
) -> None:
    file.parent.mkdir()
    file.write_text("text")
    assert "is not a prompt cache" in refused(tmp_path, *command, "--prompt-cache", str(file))
    assert file.read_text() == "text"
    assert "cannot write" in refused(tmp_path, *command, "--prompt-cache", str(file / "below"))
    assert "is not a file" in refused(tmp_path, *command, "--prompt-cache", str(tmp_path))
    assert "is not a file" in refused(tmp_path, *command, "--prompt-cache", os.devnull)


def test_options_that_exclude_it_are_refused(tmp_path: Path, file: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Sort 7 3 5"\n')
    assert "--batch" in refused(tmp_path, *GENERATE, "--batch", str(prompts), "--prompt-cache", str(file), code=2)
    assert not file.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_reader_that_goes_away_and_a_full_disk_lose_nothing(tmp_path: Path, file: Path) -> None:
    line = [*PROGRAM, *GENERATE, "--prompt-cache", str(file), "Sort 7 3 5"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, timeout=180, check=False)
    assert done.returncode == 1 and b"No space left" in done.stderr
    again = answer(tmp_path, "--prompt-cache", str(file), "Sort 7 3 5")
    assert cached(again) == again["statistics"]["prompt_tokens"]
