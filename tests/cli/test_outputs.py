"""Files that commands write: what is no regular file is written to, and what this program has not written is kept."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dgemma_mlx import load
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.train.dataset import as_jsonl
from dgemma_mlx.train.finetune import check_run_folder

PROGRAM = (sys.executable, "-m", "dgemma_mlx")
EVAL = ("eval", "-m", "demo", "-q", "--task", "sudoku", "--size", "4", "--count", "2")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def test_a_fifo_gets_the_lines_of_a_trace(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo", list[str]()
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    done = run("generate", "-m", "demo", "-q", "Sort 7 3 5", "--trace", fifo)
    reader.join(10)
    assert done.returncode == 0 and stat.S_ISFIFO(fifo.stat().st_mode), done.stderr
    assert len([json.loads(line) for line in got[0].splitlines()]) >= 2


def test_answers_go_to_stdout_before_the_result() -> None:
    done = run(*EVAL, "--answers", "/dev/stdout", "--json")
    *answers, result = map(json.loads, done.stdout.splitlines())
    assert len(answers) == 2 and result["problems"] == 2 and "right" in answers[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the demo model, beside a folder of someone's papers."""
    shutil.copytree(DEMO_FOLDER, tmp_path / "base")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("ten years")
    return tmp_path / "base"


def test_training_never_overwrites_its_source(base: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(as_jsonl([("a", "b")]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = ("--data", tmp_path / "data.jsonl", "--canvas-length", "8", "--steps", "1")
    done = run("train", "-m", base, "-q", *data, "--full", "-o", base)
    assert done.returncode == 2 and "is the source" in done.stderr and len(done.stderr.splitlines()) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_training_needs_a_folder_of_its_own(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = replace(load("demo"), folder=base, adapter=adapter)
    for name, message in (
        ("base", "source"), ("base/run", "source"), (".", "source"), ("adapter", "source"), ("adapter/run", "source"),
        ("papers", "thesis.tex"), ("papers/thesis.tex", "not a folder"), ("papers/../base", "source"),
    ):  # fmt: skip
        for resume in (False, True):
            with pytest.raises(DgemmaError, match="no run" if resume and message != "source" else message) as caught:
                check_run_folder(tmp_path / name, model, resume)
            assert caught.value.exit_code == 2
    (tmp_path / "new" / "tensorboard").mkdir(parents=True)
    (tmp_path / "new" / ".DS_Store").touch()
    check_run_folder(tmp_path / "new", model, False)
    check_run_folder(tmp_path / "newer", model, False)
    (tmp_path / "new" / "run.json").touch()
    check_run_folder(tmp_path / "new", model, True)
    with pytest.raises(DgemmaError, match="already holds a run"):
        check_run_folder(tmp_path / "new", model, False)
