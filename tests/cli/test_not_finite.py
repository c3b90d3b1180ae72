"""Weights that are NaN or infinite: every command says which, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import DgemmaError, Model, choose, edit, fill, generate
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.diffusion.speed import SPEEDS
from dgemma_mlx.model.finite import not_finite, require_finite

NAME = "model.decoder.layers.3.self_attn.o_proj.weight"
ASKED = "Sort 7 3 5"


def poisoned(folder: Path, value: float) -> Path:
    """Return a copy of the demo with one value in one tensor replaced."""
    shutil.copytree(DEMO_FOLDER, folder)
    path = folder / "model.safetensors"
    weights: Any = mx.load(str(path))
    weights[NAME][5, 7] = value
    mx.eval(weights)
    path.unlink()
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned(tmp_path_factory.mktemp("nan") / "model", float("nan"))


@pytest.fixture(scope="module")
def broken(folder: Path) -> Model:
    return dgemma_mlx.load(folder)


WORK: dict[str, Callable[[Model], object]] = {
    **{speed: lambda model, speed=speed: generate(model, ASKED, seed=1, speed=speed) for speed in SPEEDS},  # type: ignore[misc]
    "verify": lambda model: generate(model, ASKED, seed=1, verify="repair"),
    "constrained": lambda model: generate(
        model, ASKED, seed=1, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    ),
    "choose": lambda model: choose(model, ASKED, ["a", "b"], seed=1),
    "fill": lambda model: fill(model, "one ___ three", seed=1),
    "edit": lambda model: edit(model, ASKED, "7 3 5", seed=1),
}


@pytest.mark.parametrize("work", WORK)
def test_work_with_a_nan_names_the_tensor(broken: Model, work: str) -> None:
    with pytest.raises(DgemmaError, match=f"^{NAME} holds NaN or infinity$"):
        WORK[work](broken)


def test_an_infinite_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match=NAME):
        generate(dgemma_mlx.load(poisoned(tmp_path / "model", float("inf"))), ASKED, seed=1)


def test_numbers_that_overflow_in_a_step_name_the_step() -> None:
    model = dgemma_mlx.load("demo")
    model.network.norm.weight = model.network.norm.weight * 1e38  # finite, but not the products with it
    model.network.layers[0].input_layernorm.weight = mx.full(model.network.layers[0].input_layernorm.weight.shape, 3e38)
    require_finite(model.network)
    with pytest.raises(DgemmaError, match="the model computed NaN in step 1 of canvas 1"):
        generate(model, ASKED, seed=1)


def test_large_sums_are_not_taken_for_infinity() -> None:
    model = dgemma_mlx.load("demo")
    norm = model.network.norm
    norm.weight = mx.full(norm.weight.shape, 3e38)
    assert not_finite(norm) is None
    require_finite(model.network)


@pytest.mark.parametrize("command", ["eval", "bench", "train"])
def test_long_work_does_not_begin(folder: Path, tmp_path: Path, command: str) -> None:
    data, out = tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    options = {"eval": ("--task", str(data)), "bench": (), "train": ("--data", str(data), "-o", str(out))}[command]
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", command, "-m", str(folder), *options], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    error, hint = done.stderr.splitlines()
    assert error == f"dgemma-mlx: {NAME} holds NaN or infinity" and hint.startswith("hint: ")
    assert not out.exists()
