"""The program as people run it: real processes, real pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "dgemma_mlx"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
ENVIRONMENT.pop("DGEMMA_MODEL", None)
ENDLESS = ["--speed", "reference", "--max-denoising-steps", "100000", "--stability-threshold", "99999"]


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, timeout=60, env={**ENVIRONMENT, **environment},
        check=False,
    )


def answer(*arguments: str, stdin: bytes = b"") -> str:
    done = run("generate", "-m", "demo", "--seed", "1", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_answer_alone_goes_to_stdout() -> None:
    done = run("generate", "-m", "demo", "--seed", "1", "Sort 7 3 5")
    assert done.stdout == b"3 5 7\n"
    assert b"1 canvas" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr


def test_quiet_says_nothing_on_stderr() -> None:
    assert run("generate", "-q", "Sort 7 3 5").stderr == b""


def test_without_a_model_the_demo_answers_and_says_so_in_one_line() -> None:
    first, *rest = run("generate", "Sort 7 3 5").stderr.decode().splitlines()
    assert "built-in demo" in first and "-m mlx-community/" in first
    assert len(rest) == 1  # the summary
    assert b"built-in demo" not in run("generate", "Sort 7 3 5", DGEMMA_MODEL="demo").stderr


def test_stdin_is_the_prompt_or_follows_it() -> None:
    wanted = answer("Sort\n\n7 3 5")
    assert answer("Sort", stdin=b"7 3 5\n") == wanted
    assert answer(stdin=b"Sort\n\n7 3 5") == wanted
    assert answer("-", stdin=b"Sort\n\n7 3 5") == wanted


def test_one_seed_gives_one_text_and_json_tells_everything() -> None:
    one, two = (json.loads(answer("--json", "Write a sentence about a cat.")) for _ in range(2))
    assert one["text"] == two["text"] and one["tokens"] == two["tokens"]
    assert one["seed"] == 1 and one["model"] == "demo" and one["finish_reason"] == "stop"
    assert one["statistics"]["generated_tokens"] == len(one["tokens"])
    assert one["statistics"]["denoising_steps"] >= one["statistics"]["canvases"] == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["generate"], 2, "prompt is empty"),
        (["generate", "   "], 2, "prompt is empty"),
        (["generate", "-m", "./nowhere", "hi"], 1, "nowhere"),
        (["generate", "-m", "owner/not-here", "hi"], 1, "owner/not-here"),
        (["generate", "-m", "bad name/../x", "hi"], 2, "bad name"),
        (["generate", "-m", str(Path(__file__).parent), "hi"], 1, "config.json"),
        (["generate", "-n", "0", "hi"], 2, "--max-tokens"),
        (["generate", "--seed", "-1", "hi"], 2, "--seed"),
        (["generate", "--temp", "hot", "hi"], 2, "--temp"),
        (["generate", "--entropy-bound", "-1", "hi"], 2, "entropy_bound"),
        (["generate", "--t-min", "0.9", "--t-max", "0.5", "hi"], 2, "t_max"),
        (["generate", "--max-denoising-steps", "0", "hi"], 2, "max_denoising_steps"),
        (["generate", "--frobnicate", "hi"], 2, "--frobnicate"),
        (["generate", "add 1 and 2 " * 2000], 1, "positions"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_is_one_line_a_hint_and_an_exit_code(arguments: list[str], exit_code: int, message: str) -> None:
    done = run(*arguments, DGEMMA_MODEL="demo")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == exit_code
    assert done.stdout == b""
    assert len(lines) == 2, lines
    assert lines[0].startswith("dgemma-mlx: ") and message in lines[0]
    assert lines[1].startswith("hint: ")


def test_stdin_that_is_not_text_is_refused() -> None:
    done = run("generate", stdin=b"caf\xe9")
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr


def test_a_reader_that_goes_away_ends_the_program_quietly() -> None:
    with subprocess.Popen(
        [*PROGRAM, "generate", "-q", "Sort 7 3 5"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_interrupting_a_generation_exits_with_130() -> None:
    with subprocess.Popen(
        [*PROGRAM, "generate", "hi", *ENDLESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=ENVIRONMENT,
        # The children of a background job inherit that SIGINT is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        try:
            assert process.stderr is not None
            process.stderr.readline()  # the line about the demo: the model is loaded
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error in (b"", b"interrupted\n")


def imported_by(*arguments: str) -> set[str]:
    """Return the names of the modules that a run of the program imports."""
    code = (
        "import sys\nfrom dgemma_mlx.cli.app import run\nassert run() == 0\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=True,
        env=ENVIRONMENT, timeout=60,
    )
    return set(done.stderr.decode().splitlines()[-1].split())


def top_level(modules: set[str]) -> set[str]:
    """Return the packages to which these modules belong."""
    return {name.partition(".")[0] for name in modules}


def test_help_does_not_import_mlx() -> None:
    assert imported_by("--help").isdisjoint({"mlx", "numpy", "tokenizers", "jinja2", "huggingface_hub"})


def test_generating_imports_nothing_slow() -> None:
    imported = imported_by("generate", "-m", "demo", "-q", "Sort 7 3 5")
    packages = top_level(imported)
    assert "mlx" in packages
    assert packages.isdisjoint({
        "mlx_lm", "transformers", "torch", "sentencepiece", "huggingface_hub", "rich", "outlines_core", "jsonschema",
        "pydantic", "safetensors", "prompt_toolkit", "dgemma_convert",
    })  # fmt: skip


def test_generating_imports_only_the_parts_that_it_uses() -> None:
    """Constraints, adapters, prompt caches in files and infilling are imported when they are asked for."""
    imported = imported_by("generate", "-m", "demo", "-q", "Sort 7 3 5")
    unused = (
        "constrain.grammar", "constrain.writing", "model.adapter_file", "generation.prompt_cache_file",
        "generation.identity", "train", "infill.fill",
    )  # fmt: skip
    assert not [name for name in imported if name.startswith(tuple(f"dgemma_mlx.{part}" for part in unused))]


def test_the_number_format_can_be_chosen() -> None:
    for dtype in ("auto", "float32", "float16"):
        assert answer("--dtype", dtype, "Sort 7 3 5") == "3 5 7\n"
    done = run("generate", "-m", "demo", "Sort 7 3 5", DGEMMA_DTYPE="float8")
    assert done.returncode == 2
    assert b"DGEMMA_DTYPE must be one of auto, bfloat16, float16, float32" in done.stderr
