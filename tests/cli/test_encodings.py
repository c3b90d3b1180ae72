"""Text that is not plain UTF-8: a stdout of another encoding, and inputs with a byte order mark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from codecs import BOM_UTF8 as BOM
from pathlib import Path

import pytest

from dgemma_convert.source import open_source
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER, resolve
from dgemma_mlx.cli.batch import read_batch
from dgemma_mlx.train.dataset import read_examples

SEEDED = ("-q", "-m", "demo", "--seed", "1")
CHOICE = ("generate", *SEEDED, "--choice", "caf\u00e9 \u732b", "Sort 7 3 5")
GAPS = b'{"name": "___:3___", "age": 59, "city": "Rome"}\n'
ASKED = "Make a JSON object: Simon is 59 years old and lives in Rome."


def run(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], input=stdin, capture_output=True, timeout=60, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(("encoding", "text"), [("latin-1", b"caf\xe9 ?\n"), ("ascii", b"caf? ?\n")])
def test_the_answer_is_not_lost_on_another_stdout(encoding: str, text: bytes) -> None:
    done = run(*CHOICE, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, text)
    (warning,) = done.stderr.splitlines()
    assert b"PYTHONIOENCODING=utf-8" in warning
    done = run(*CHOICE, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["text"] == "caf\u00e9 \u732b" and done.stderr == b""


def test_the_c_locale_loses_nothing() -> None:
    done = run(*CHOICE, LC_ALL="C", LANG="C")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "caf\u00e9 \u732b\n", b"")


def test_a_byte_order_mark_is_not_part_of_a_prompt_or_a_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(BOM + b'{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    plain = run("generate", *SEEDED, stdin=b"Sort 7 3 5")
    assert run("generate", *SEEDED, stdin=BOM + b"Sort 7 3 5").stdout == plain.stdout
    done = run("generate", *SEEDED, "--json-schema", schema, stdin=b"Sort 7 3 5")
    assert json.loads(done.stdout) == {"a": 1}, done.stderr


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system has no /dev/fd")
@pytest.mark.parametrize(
    ("option", "text", "answer"), [("--json-schema", b'{"const": 1}', b"1\n"), ("--grammar", b'a ::= "x"', b"x\n")]
)
def test_a_schema_or_a_grammar_is_read_from_a_pipe(option: str, text: bytes, answer: bytes) -> None:
    """As the shell's <(...) passes it."""
    done = run("generate", *SEEDED, option, "/dev/fd/0", "Sort 7 3 5", stdin=text)
    assert (done.returncode, done.stdout) == (0, answer), done.stderr


def test_a_byte_order_mark_is_not_part_of_jsonl(tmp_path: Path) -> None:
    batch, data = tmp_path / "prompts.jsonl", tmp_path / "train.jsonl"
    batch.write_bytes(BOM + b'"Sort 7 3 5"\n')
    assert read_batch(batch) == [{"prompt": "Sort 7 3 5"}]
    data.write_bytes(BOM + b'{"prompt": "a", "completion": "b"}\n')
    assert len(read_examples(data)) == 1


@pytest.mark.parametrize(
    "command",
    [("fill", "--candidates", "1", "--prompt", ASKED), ("edit", "--candidates", "1", "--match", "___:3___", ASKED)],
)
def test_fill_and_edit_keep_the_byte_order_mark_of_their_text(tmp_path: Path, command: tuple[str, ...]) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(GAPS)
    marked.write_bytes(BOM + GAPS)
    shown = run(*command, *SEEDED, stdin=BOM + GAPS)
    assert shown.returncode == 0 and shown.stdout.startswith(BOM + b"{")
    diff = run(*command, *SEEDED, marked, "--diff").stdout.decode()
    assert f"-\ufeff{GAPS.decode()}" in diff
    for path in (plain, marked):
        done = run(*command, *SEEDED, path, "--write")
        assert done.returncode == 0, done.stderr
    assert marked.read_bytes() == BOM + plain.read_bytes() == shown.stdout
    assert plain.read_bytes() != GAPS


def test_what_macos_leaves_in_a_folder_is_ignored(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(DEMO_FOLDER, folder)
    clutter = [".DS_Store", *(f"._{path.name}" for path in DEMO_FOLDER.iterdir())]
    for name in clutter:
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert not {path.name for path in open_source(resolve(str(folder))).small_files()} & set(clutter)
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / ".DS_Store").write_bytes(b"\0")
    done = run("convert", folder, "-o", out, "--recipe", "bf16")
    assert done.returncode == 0, done.stderr
    assert not {path.name for path in out.iterdir()} & set(clutter[1:])
    assert run("generate", "-q", "--seed", "1", "-m", folder, "Sort 7 3 5").stdout == b"3 5 7\n"
