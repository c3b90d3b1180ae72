"""Tests of the constraint options of the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_mlx import DgemmaError
from dgemma_mlx.cli.constraint import constraint_of

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
ENVIRONMENT.pop("DGEMMA_MODEL", None)
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dgemma_mlx", "generate", "-q", "-m", "demo", "--seed", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)


def test_an_answer_that_matches() -> None:
    done = run("Sort 7 3 5", "--regex", "[0-9]( [0-9]){2}")
    assert (done.returncode, done.stdout) == (0, "3 5 7\n"), done.stderr


def test_a_batch_under_a_schema(tmp_path: Path) -> None:
    schema, prompts = tmp_path / "schema.json", tmp_path / "prompts"
    schema.write_text(SCHEMA)
    prompts.write_text('"Sort 7 3 5"\n{"prompt": "What is 27 + 45?", "max_tokens": 2}\n')
    done = run("--json-schema", str(schema), "--batch", str(prompts), "--max-denoising-steps", "2", "-n", "30")
    first, second = map(json.loads, done.stdout.splitlines())
    assert isinstance(json.loads(first["text"])["n"], int)
    assert "shortest answer that matches" in second["error"]
    assert done.returncode == 1


def test_what_follows_a_thought_matches() -> None:
    done = run("Sort 7 3 5", "--choice", "3,5", "--thinking", "--max-denoising-steps", "2", "--max-tokens", "40")
    assert done.returncode == 0 and done.stdout in ("3\n", "5\n")


def test_valid_constraint_options(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g", tmp_path / "s"
    grammar.write_text("a ::= 'x' b\nb ::= [0-9]+")
    schema.write_text(SCHEMA)
    for given, text in (
        ({"regex": "^ab?$"}, "ab"), ({"choice": "yes, no"}, "no"), ({"json_schema": SCHEMA}, '{"n": 3}'),
        ({"json_schema": str(schema)}, '{"n":-3}'), ({"grammar": str(grammar)}, "x07"), ({"grammar": "a = 'é'"}, "é"),
        ({"grammar": 'start: "é"'}, "é"),
    ):  # fmt: skip
        constraint = constraint_of(**{"regex": None, "choice": None, "json_schema": None, "grammar": None, **given})
        assert constraint is not None and constraint.matches(text)
        assert not constraint.matches(text + "!")
    assert constraint_of(None, None, None, None) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("a", "b", None, None), "--regex and --choice exclude each other"), ((None, "a,,b", None, None), "empty text"),
        ((None, None, "nowhere.json", None), "cannot read nowhere.json: No such file"),
        ((None, None, "{", None), "is not JSON"), ((None, None, None, "nowhere"), "cannot read nowhere"),
        ((None, None, None, "a ::= a"), "no text"), (("(", None, None, None), "cannot be compiled"),
    ],
)  # fmt: skip
def test_invalid_constraint_options(given: tuple[str | None, ...], says: str) -> None:
    with pytest.raises(DgemmaError, match=re.escape(says)) as caught:
        constraint_of(*given)
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"\xff{}")
    with pytest.raises(DgemmaError, match="not UTF-8"):
        constraint_of(None, None, str(tmp_path / "s"), None)
