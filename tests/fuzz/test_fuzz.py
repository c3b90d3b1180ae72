"""Damaged files and odd values: every reader accepts them or refuses them as ``contract.keeps`` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from dgemma_mlx.cli.app import run
from dgemma_mlx.cli.settings import SETTINGS, Settings
from tests.fuzz.contract import check_lines, keeps
from tests.fuzz.mutations import texts
from tests.fuzz.readers import READERS, SHARD, make_folder

COMMON = {"database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    make_folder(made)
    return made


def damage(folder: Path, name: str, data: st.DataObject) -> None:
    """Damage the file of a reader, read it, and put the file back."""
    reader = READERS[name]
    path = folder / reader.file
    intact = path.read_bytes()
    path.write_bytes(data.draw(reader.changes(intact)))
    try:
        refused = keeps(reader.read, folder, folder=folder.parent)
        event("accepted" if refused is None else "refused")
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=12, derandomize=True, **COMMON)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    damage(folder, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=600, **COMMON)
@given(data=st.data())
def test_many_damaged_files_are_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    damage(folder, name, data)


@settings(max_examples=100, derandomize=True, **COMMON)
@given(name=st.sampled_from(list(SETTINGS)), text=texts())
def test_a_variable_of_the_environment_is_read_or_refused(folder: Path, name: str, text: str) -> None:
    keeps(Settings, {f"DGEMMA_{name.upper()}": text}, folder / "config.toml")


LINES = [
    ("generate", "--seed", "9" * 5000, "x"), ("generate", "-m", "demo", "--temp", "nan", "x"),
    ("generate", "--n\x1b]0;x", "x"), ("generate", "-m", "x" * 100_000, "x"), ("generate", "-m", "\x1b]0;x\n", "x"),
    ("generate", "--memory-limit", "9" * 5000, "x"), ("generate", "--adapter", "x\n" * 1000, "x"),
    ("generate", "--batch", "x" * 5000), ("generate", "--batch", "/"), ("fill", ""), ("info", "\udcff"),
    ("convert", "demo", "-o", ""), ("convert", "demo", "-o", "/", "--dry-run"), ("x" * 100_000,),
    ("convert", "demo", "--recipe", "\x07" * 1000),
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_wrong_command_line_is_refused(
    line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dgemma-mlx", *line])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        code = run()
    captured = capfd.readouterr()
    message, hint = captured.err.splitlines()
    check_lines(message, hint)
    assert hint.startswith("hint: ")
    assert "bug" not in hint
    assert captured.out == ""
    assert code in (1, 2)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"[" * 100_000), ("tokenizer_config.json", b'{"additional_special_tokens": 5}'), (SHARD, b"")],
    ids=["config", "tokenizer", "weights"],
)
def test_the_program_refuses_a_damaged_checkpoint(folder: Path, file: str, content: bytes) -> None:
    """As ``test_a_damaged_file_is_read_or_refused``, but with the real program."""
    intact = (folder / file).read_bytes()
    (folder / file).write_bytes(content)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dgemma_mlx", "generate", "-m", str(folder), "Hi"], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=60,
        )
    finally:
        (folder / file).write_bytes(intact)
    message, hint = done.stderr.splitlines()
    check_lines(message, hint)
    assert (done.returncode, done.stdout) == (1, "")
    assert "bug" not in hint
