"""``bench`` on the built-in model: its measurements and the arguments it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Model
from dgemma_mlx.cli import bench
from dgemma_mlx.text import Tokenizer
from tests.cli.terminal import Terminal

SHORT = ("-m", "demo", "--prompt-tokens", "16,40", "--steps", "2", "--runs", "2")


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DGEMMA_")}
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "bench", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, env=inherited, check=False,
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


def is_spread(values: dict[str, float]) -> bool:
    return values.keys() == {"median", "least", "most"} and 0 < values["least"] <= values["median"] <= values["most"]


def test_one_json_object_for_machines() -> None:
    done = run("--json", *SHORT, "--no-kernels", "--prompt", "Sort 7 3 5")
    assert (done.returncode, done.stderr) == (0, b"")
    facts = json.loads(done.stdout)
    assert (facts["model"], facts["canvas_length"], facts["steps"], facts["runs"]) == ("demo", 32, 2, 2)
    assert facts["kernels"] == "off"
    assert facts["versions"]["dgemma_mlx"] == dgemma_mlx.__version__
    assert facts["machine"]["metal"] is mx.metal.is_available()
    assert [row["prompt_tokens"] for row in facts["prompts"]] == [16, 40]
    for row in facts["prompts"]:
        assert all(is_spread(row[name]) for name in ("prefill_seconds", "prefill_tokens_per_second", "step_seconds"))
        product = row["prefill_tokens_per_second"]["least"] * row["prefill_seconds"]["most"]
        assert product == pytest.approx(row["prompt_tokens"])
    answer = facts["answer"]
    assert (answer["prompt"], answer["finish_reason"]) == ("Sort 7 3 5", "stop")
    assert is_spread(answer["tokens_per_second"]) and is_spread(answer["seconds"])
    assert answer["tokens_per_forward"] == answer["generated_tokens"] / answer["denoising_steps"]
    weights = 1e6  # bytes, far below those of the demo
    assert all(found["peak_memory"] > weights for found in (*facts["prompts"], answer))


def test_a_table_for_people() -> None:
    done = run(*SHORT)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("demo, canvas of 32, ")
    heading = next(i for i, line in enumerate(lines) if line.split()[:1] == ["prompt"])
    assert [line.split()[0] for line in lines[heading + 1 : heading + 3]] == ["16", "40"]
    assert max(map(len, lines)) <= 100
    assert "tokens per step" in lines[-1]


def test_a_terminal_shows_what_is_measured_and_keeps_only_the_table() -> None:
    with Terminal(["bench", *SHORT], 100, 24) as terminal:
        assert terminal.finish() == 0
        assert "40 tokens of prompt" in terminal.output.decode()
        assert "tokens of prompt" not in terminal.text
        assert terminal.screen.is_sane


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--prompt-tokens", "16,4065"], "a prompt of 4,065 tokens does not fit"),
        (["--prompt-tokens", "many"], "'many'"),
        (["--prompt-tokens", "16,,40"], "'16,,40'"),
        (["--prompt-tokens", ""], "''"),
        (["--prompt-tokens", "-5"], "'-5'"),
        (["--steps", "0"], "--steps"),
        (["--runs", "0"], "--runs"),
        (["-m", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_a_hint(arguments: list[str], word: str) -> None:
    done = run("-m", "demo", *arguments, "--json")
    assert (done.returncode, done.stdout) == (1 if "/" in word else 2, b"")
    message, hint = done.stderr.decode().splitlines()
    assert message.startswith("dgemma-mlx: ") and word in message
    assert hint.startswith("hint: ")


def test_default_lengths_are_those_that_fit(model: Model) -> None:
    assert bench._fitting(None, model) == [512]  # 4,096 leave no room for a canvas
    assert bench._fitting([4064], model) == [4064]


@pytest.mark.parametrize("count", [2, 3, 17, 100, 1000])
def test_texts_have_the_length_asked_for(model: Model, tokenizer: Tokenizer, count: int) -> None:
    for each in (model.tokenizer, tokenizer):
        text = bench.text_of(each, count)
        bos = [] if each.bos_id is None else [each.bos_id]
        assert count - 1 <= len([*bos, *each.encode(text)]) <= count
        assert text == bench.text_of(each, count) != bench.text_of(each, count, seed=1)


def test_every_run_counts(model: Model) -> None:
    announced: list[str] = []
    found: dict[str, Any] = bench.measure(model, [8, 24], 1, 3, "Sort 7 3 5", announced.append)
    assert len(announced) == 1 + 3 * 3
    assert [row["prompt_tokens"] for row in found["prompts"]] == [8, 24]
    assert found["answer"]["generated_tokens"] > 0


def test_a_clock_that_does_not_move_is_no_error() -> None:
    still = {"prompt_tokens": 5, "prefill_seconds": 0.0, "step_seconds": [0.0], "peak_memory": 1}
    assert bench._prompt_row([still])["prefill_tokens_per_second"] == {"median": 0.0, "least": 0.0, "most": 0.0}
