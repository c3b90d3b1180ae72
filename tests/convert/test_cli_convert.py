"""``dgemma-mlx convert`` on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_convert import RECIPES, convert
from dgemma_mlx.cli.app import run as run_here
from tests.convert.checkpoints import digests, make_source, names_in, read, smallest_source
from tests.model.checkpoint import flat_config, random_tensors

PROGRAM = [sys.executable, "-m", "dgemma_mlx"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return smallest_source(tmp_path / "source")


def program(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env=ENVIRONMENT, cwd=cwd, check=False,
    )  # fmt: skip


def one_object(text: str) -> dict[str, Any]:
    (line,) = text.splitlines()
    value = json.loads(line)
    assert isinstance(value, dict)
    return value


def test_dry_run_prints_the_table_and_writes_nothing(source: Path) -> None:
    done = program("convert", source, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    for tensor_class in ("embeddings", "attention", "dense MLP", "router", "experts", "self-conditioning"):
        assert ("4-bit g64" if tensor_class in ("experts", "self-conditioning") else "8-bit g64") in rows[tensor_class]
    for words in (f"to {source}-q4", "bits per weight (q4)", "disk: ", " free", "memory to run it"):
        assert words in done.stdout
    assert names_in(source.parent) == {"source"}


def test_dry_run_as_json(source: Path) -> None:
    done = program("convert", source, "--dry-run", "--json", "--recipe", "nvfp4", "-o", source.parent / "deep" / "out")
    plan = one_object(done.stdout)
    assert (plan["output"], plan["recipe"]) == (str(source.parent / "deep" / "out"), "nvfp4")
    assert {"bytes_in", "bytes_out", "bits_per_weight", "bytes_needed", "bytes_free", "memory_to_run"} < plan.keys()
    assert {row["class"] for row in plan["classes"]} >= {"experts", "norms and scalars"}
    assert names_in(source.parent) == {"source"}


def test_json_prints_one_object_and_the_output_is_beside_the_source(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = program("convert", os.path.relpath(source, elsewhere) + "/", "--json", "--recipe", "q8", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    report = one_object(done.stdout)
    output = tmp_path / "source-q8"
    assert Path(report.pop("output")) == output
    assert report == read(output / "conversion_report.json")
    assert names_in(tmp_path) == {"source", "source-q8", "elsewhere"} and not names_in(elsewhere)
    assert digests(output) == digests(convert(str(source), tmp_path / "again" / "source-q8", "q8").output)


def test_converted_model_answers(talking: Path, tmp_path: Path) -> None:
    done = program("convert", talking, "-o", tmp_path / "out", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    _, _, compared = done.stderr.partition("compared with the source")
    verification = read(tmp_path / "out" / "conversion_report.json")["verification"]
    assert f"KL divergence {verification['kl_divergence']:.5f}" in compared
    last = len(verification["decoder_error"])
    (row,) = [line.split() for line in compared.splitlines() if line.startswith(f"  hidden states after layer {last} ")]
    assert row[-2:] == [f"{verification[name][-1]:.4f}" for name in ("encoder_error", "decoder_error")]
    assert f"generate -m {tmp_path / 'out'}" in done.stderr
    answer = program(
        "generate", "-m", tmp_path / "out", "--json", "-n", "16", "--max-denoising-steps", "2", "--seed", "1", "hello"
    )
    assert answer.returncode == 0, answer.stderr
    assert one_object(answer.stdout)["finish_reason"] in ("stop", "length")


def test_list_recipes() -> None:
    done = program("convert", "--list-recipes")
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert listed == list(RECIPES)
    assert "(first and last 3 layers)" in done.stdout
    assert all(summary in done.stdout for summary in (recipe.summary for recipe in RECIPES.values()))


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["dgemma-mlx", "convert", *map(str, arguments)])
    return run_here()


def test_list_recipes_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(monkeypatch, "--list-recipes", "--json") == 0
    recipes = one_object(capsys.readouterr().out)
    assert list(recipes) == list(RECIPES)
    four_bit = [rule for rule in recipes["q4"]["rules"] if "experts" in rule["classes"]]
    assert [(rule["bits"], rule["group_size"], rule["mode"]) for rule in four_bit] == [(4, 64, "affine")]


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("14GB", 14 * 10**9), ("13.5GiB", 27 * 2**29), ("900 mb", 900 * 10**6), ("0.5T", 5 * 10**11),
        ("400KiB", 409_600), ("5000000", 5_000_000),
    ],
)  # fmt: skip
def test_sizes(
    source: Path, size: str, nbytes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = here(monkeypatch, source, "--recipe", "mixed", "--target-size", size, "--json", "-o", source.parent / "out")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert one_object(printed.out)["mixed"]["budget_bytes"] == nbytes


JUNK = ["", "GB", "14 parsecs", "-5GB", "1e", "0GB", "14GBGB", "nan", "inf", "14,5GB", "½GB", "٣GB x", "9" * 400 + "TB"]


@pytest.mark.parametrize("size", JUNK)
def test_invalid_sizes(
    source: Path, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(monkeypatch, source, "--recipe", "mixed", f"--target-size={size}") == 2
    printed = capsys.readouterr()
    message, hint = printed.err.splitlines()
    assert printed.out == "" and repr(size)[:40] in message and "GB" in hint
    assert names_in(source.parent) == {"source"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no source"),
        (["nowhere"], 1, "nowhere"),
        (["a/b/c"], 2, "a/b/c"),
        (["SOURCE", "--recipe", "q5"], 2, "q5"),
        (["SOURCE", "--group-size", "17"], 2, "17"),
        (["SOURCE", "--group-size", "many"], 2, "--group-size"),
        (["SOURCE", "--recipe", "mixed"], 2, "--target-size"),
        (["SOURCE", "--target-size", "14GB"], 2, "mixed"),
        (["SOURCE", "--recipe", "mixed", "--target-bpw", "2"], 2, "too small"),
        (["SOURCE", "--frobnicate"], 2, "--frobnicate"),
        (["SOURCE", "-o", "SOURCE"], 2, "source"),
        (["SOURCE", "--upload-repo", "owner/name"], 2, "-y"),
        (["nowhere", "--upload-repo", "owner/name"], 2, "-y"),  # before the source is resolved
        (["SOURCE", "--upload-repo", "no name", "-y"], 2, "no name"),  # before hours of work
        (["SOURCE", "--verify"], 1, "tokenizer"),
    ],
)
def test_bad_input_is_one_line_a_hint_and_an_exit_code(
    source: Path, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(source.parent)
    assert here(monkeypatch, *(str(source) if argument == "SOURCE" else argument for argument in arguments)) == code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith(("dgemma-mlx: ", "hint: "))]
    assert printed.out == "" and len(lines) == 2
    assert lines[0].startswith("dgemma-mlx: ") and lines[1].startswith("hint: ") and message in "".join(lines)
    assert names_in(source.parent) == {"source"}


@pytest.mark.parametrize("flags", [["--dry-run"], ["--dry-run", "--json"], ["--json"]])
def test_warnings_go_to_stderr(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = flat_config(num_hidden_layers=1, layer_types=["full_attention"])
    extended = {**random_tensors(config, mx.bfloat16), "step": mx.ones(2)}
    source = make_source(tmp_path / "source", config, extended)
    assert here(monkeypatch, source, *flags) == 0
    printed = capsys.readouterr()
    assert "warning: unknown tensors are left out: step" in printed.err and "warning: " not in printed.out
    if "--json" in flags:
        assert "step" in one_object(printed.out)["warnings"][0]


def test_interrupted_and_resumed(talking: Path, tmp_path: Path) -> None:
    output, command = tmp_path / "out", ["convert", str(talking), "-o", str(tmp_path / "out"), "--verify"]
    with subprocess.Popen(
        [*PROGRAM, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # A background job ignores SIGINT, and its children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        try:
            while process.poll() is None and not list(tmp_path.glob(".out.partial/*.unfinished")):
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
            printed, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert printed == b"" and b"Traceback" not in error
    last = ["dgemma-mlx: interrupted", "hint: The same command with --resume continues."]
    assert error.decode().splitlines()[-2:] == last
    assert not output.exists() and (tmp_path / ".out.partial").exists()
    done = program(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path) == {"out"}
    uninterrupted = digests(convert(str(talking), tmp_path / "again" / "out").output)
    assert digests(output)["model.safetensors"] == uninterrupted["model.safetensors"]
