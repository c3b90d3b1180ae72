"""The program around its commands: help, errors, tracebacks, completion."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma_mlx

PROGRAM = [sys.executable, "-m", "dgemma_mlx"]
COMMANDS = ["chat", "generate", "convert", "info", "doctor", "bench", "config", "models", "serve"]
SLOW = {
    "mlx", "numpy", "tokenizers", "jinja2", "huggingface_hub", "rich", "prompt_toolkit", "platformdirs", "starlette",
    "uvicorn", "msgspec", "anyio", "asyncio",
}  # fmt: skip


def run(*arguments: str, command: list[str] = PROGRAM, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_without_arguments_the_program_explains_itself() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("--help").stdout == run("-h").stdout
    assert done.stdout.startswith("Usage: dgemma-mlx ")
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_its_version() -> None:
    assert run("--version").stdout == f"dgemma-mlx {dgemma_mlx.__version__}\n"


IMPORTS = """
import sys
from dgemma_mlx.cli.app import run
try:
    run()
except SystemExit:
    pass
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS), ["models", "rm"]])
def test_help_imports_nothing_slow(command: list[str]) -> None:
    done = run(*command, "--help", command=[sys.executable, "-c", IMPORTS])
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: dgemma-mlx")
    assert set(done.stderr.splitlines()[-1].split()).isdisjoint(SLOW)


def test_completion_imports_nothing_slow() -> None:
    done = run(
        command=[sys.executable, "-c", IMPORTS], _DGEMMA_MLX_COMPLETE="complete_zsh",
        _TYPER_COMPLETE_ARGS="dgemma-mlx gen",
    )  # fmt: skip
    assert "generate" in done.stdout
    assert set(done.stderr.splitlines()[-1].split()).isdisjoint(SLOW - {"rich"})  # Typer prints help texts with it


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_made_for_each_shell(shell: str) -> None:
    done = run(_DGEMMA_MLX_COMPLETE=f"source_{shell}")
    assert done.returncode == 0
    assert "_DGEMMA_MLX_COMPLETE" in done.stdout and f"complete_{shell}" in done.stdout
    assert "complete" in done.stdout and " dgemma-mlx" in done.stdout
    if shutil.which(shell):
        assert run(done.stdout, command=[shell, "-n", "-c"]).stderr == ""


@pytest.mark.parametrize(
    ("shell", "typed", "expected"),
    [
        ("bash", "dgemma-mlx mod", "models"),
        ("bash", "dgemma-mlx models r", "rm"),
        ("bash", "dgemma-mlx generate --max-d", "--max-denoising-steps"),
        ("zsh", "dgemma-mlx info --js", '"--json":"Print the result as one JSON object."'),
        ("fish", "dgemma-mlx --deb", "--debug\tPrint the traceback of an error."),
    ],
)
def test_words_are_completed(shell: str, typed: str, expected: str) -> None:
    words = typed.split()
    done = run(
        _DGEMMA_MLX_COMPLETE=f"complete_{shell}", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1),
        _TYPER_COMPLETE_ARGS=typed, _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout
    assert "generate" not in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script_it_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "dgemma-mlx"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    script = """
    eval "$(dgemma-mlx --show-completion)"
    COMP_WORDS=(dgemma-mlx ge) COMP_CWORD=1
    _dgemma_mlx_completion dgemma-mlx
    echo "${COMPREPLY[@]}"
    complete -p dgemma-mlx
    """
    done = run(script, command=["bash", "-c"], PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout.splitlines() == ["generate", "complete -o default -F _dgemma_mlx_completion dgemma-mlx"]


@pytest.fixture
def broken_library(tmp_path: Path) -> dict[str, str]:
    """An environment in which a library of the program fails, as after an incomplete installation."""
    (tmp_path / "jinja2.py").write_text('raise RuntimeError("half\\n\\x1b[2Jinstalled")\n')
    return {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}


def test_an_unexpected_error_is_one_line_and_a_hint(broken_library: dict[str, str]) -> None:
    done = run("generate", "-m", "demo", "Hi", **broken_library)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error == "dgemma-mlx: unexpected RuntimeError: half\\n\\x1b[2Jinstalled"
    assert hint == "hint: This is a bug; `dgemma-mlx --debug ...` shows where."


def test_too_little_memory_is_no_bug(broken_library: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise MemoryError")
    done = run("generate", "-m", "demo", "Hi", **broken_library)
    assert done.stderr.splitlines()[0] == "dgemma-mlx: the memory does not suffice"
    assert "bug" not in done.stderr


def test_debug_shows_where_an_unexpected_error_was(broken_library: dict[str, str]) -> None:
    done = run("--debug", "generate", "-m", "demo", "Hi", **broken_library)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "jinja2.py" in done.stderr
    assert done.stderr.splitlines()[-2].startswith("dgemma-mlx: unexpected RuntimeError")


@pytest.mark.parametrize(
    "arguments", [["generate", "-m", "./nowhere", "Hi"], ["generate", "--seed", "x", "Hi"], ["info", "./nowhere"]]
)
def test_a_traceback_comes_with_debug_alone(arguments: list[str]) -> None:
    plain, debug = run(*arguments), run("--debug", *arguments)
    assert plain.returncode == debug.returncode != 0
    assert "Traceback" not in plain.stderr
    assert plain.stderr.count("\n") == 2
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(plain.stderr)


@pytest.mark.parametrize(
    "arguments", [["chat", "--bogus"], ["models", "bogus"], ["config", "bogus"], ["--bogus"], ["--debug"]]
)
def test_wrong_usage_is_explained_by_the_programs_own_name(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("dgemma-mlx: ")
    assert hint.startswith("hint: `dgemma-mlx ") and hint.endswith("--help` lists the options.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "-m", "demo", "Sort", "7"], "Put a text of several words in quotes"),
        (["-m", "demo", "Sort 7 3 5"], "the command comes first"),
        (["Sort 7 3 5"], "the command comes first"),
    ],
)
def test_a_prompt_in_the_wrong_place_has_a_hint(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["generate", "-q", "Sort 7 3 5"], ["chat"], ["info"]])
def test_a_closed_stream_is_an_empty_one(tmp_path: Path, arguments: list[str]) -> None:
    command = shlex.join([*PROGRAM, *arguments])
    for closed in ("<&-", "<&- >&- 2>&-"):
        done = run(f"{command} {closed}", command=["sh", "-c"], DGEMMA_MODEL="demo", DGEMMA_STATE=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert (done.stdout == "") == (">&-" in closed or arguments == ["chat"])
