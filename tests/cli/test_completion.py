"""Completion as a user installs it, in the shells that are here; and what is offered after each option."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from dgemma_convert.recipes import RECIPES
from dgemma_mlx.cli import complete
from dgemma_mlx.cli.app import app
from dgemma_mlx.cli.offer import PUBLISHED
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.train.finetune import OPTIMIZERS, SCHEDULES
from tests.cli.terminal import Terminal

PROGRAM = [sys.executable, "-m", "dgemma_mlx"]


def offered(command: str, option: str, typed: str = "") -> list[str]:
    """Return what is offered after an option or for an argument of a command such as "config set"."""
    found: Any = get_command(app)
    for name in command.split():
        found = found.commands[name]
    parameter = next(p for p in found.params if option in (*p.opts, p.name))
    context = found.context_class(found, info_name=command)
    return [item.value for item in parameter.shell_complete(context, typed)]


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("generate", "--speed", SETTINGS["speed"].choices), ("eval", "--speed", SETTINGS["speed"].choices),
        ("generate", "--verify", SETTINGS["verify"].choices), ("chat", "--dtype", SETTINGS["dtype"].choices),
        ("fill", "--cpu-dequantize", SETTINGS["cpu_dequantize"].choices), ("eval", "--task", ("sudoku",)),
        ("convert", "--recipe", tuple(RECIPES)), ("train", "--optimizer", OPTIMIZERS),
        ("train", "--schedule", SCHEDULES), ("config set", "name", tuple(SETTINGS)),
        ("pull", "name", tuple(PUBLISHED.values())),
        ("config unset", "name", tuple(SETTINGS)), ("generate", "--tool-choice", ("auto", "none", "required")),
    ],
)  # fmt: skip
def test_the_values_of_an_option_are_offered(command: str, option: str, values: tuple[str, ...]) -> None:
    assert tuple(offered(command, option)) == values
    assert offered(command, option, values[-1]) == [values[-1]]
    assert offered(command, option, "./") == []  # then the shell offers files


def test_models_of_the_cache_are_offered_and_other_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, kind in (("b--two--three", "diffusion_gemma"), ("a--one", "diffusion_gemma"), ("c--other", "llama")):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "models--d--empty").mkdir()
    for command, option in (("generate", "--model"), ("convert", "source"), ("info", "model"), ("bench", "-m")):
        assert offered(command, option) == ["demo", "a/one", "b/two--three"]
    assert offered("generate", "-m", "b") == ["b/two--three"]
    assert offered("models rm", "names") == ["a/one", "b/two--three"]
    shutil.rmtree(tmp_path)
    assert offered("generate", "-m") == ["demo"]


class Words:
    """The words before the cursor, as ``setting_values`` sees them."""

    def __init__(self, name: str | None) -> None:
        self.params = {"name": name}


def test_the_values_of_a_setting_are_offered_after_its_name() -> None:
    assert complete.setting_values(Words("speed"), "") == list(SETTINGS["speed"].choices or ())
    assert complete.setting_values(Words("live"), "f") == ["false"]
    assert complete.setting_values(Words("model"), "de") == ["demo"]
    assert complete.setting_values(Words("seed"), "") == complete.setting_values(Words("no such"), "") == []


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with a home of its own and the program on the path."""
    program = tmp_path / "bin" / "dgemma-mlx"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    return {
        "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config"), "PS1": "$ ",
        "PATH": f"{program.parent}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "hub"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "shell", ["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish"))]
)
def test_completion_works_in_a_shell_after_its_installation(shell: str, home: dict[str, str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    (tmp_path / "notes.txt").write_text("a gap: ___")
    installed = subprocess.run(
        [shell, "-c", "dgemma-mlx --install-completion; true"], env={**os.environ, **home}, capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert f"{shell} completion installed in {tmp_path}" in installed.stdout
    with Terminal(["-i"], 100, 24, home, program=[shell]) as terminal:
        terminal.type(f"cd {tmp_path}; echo be''gun\r")
        terminal.wait_for(lambda: terminal.text.partition("begun")[2].endswith(("$", "#", ">")))
        if shell == "zsh":  # where the first Tab only loads what Typer has installed
            terminal.type("dgemma-mlx \t")
            terminal.wait_for_text("dgemma-mlx")
            terminal.type("\x15")
        for typed, expected in (
            ("dgemma-mlx gene", "dgemma-mlx generate"),
            ("--spee", "dgemma-mlx generate --speed"),
            ("bal", "dgemma-mlx generate --speed balanced"),
            ("-m de", "dgemma-mlx generate --speed balanced -m demo"),
            ("--batch no", "dgemma-mlx generate --speed balanced -m demo --batch notes.txt"),
        ):
            terminal.type(typed)
            terminal.wait_for_text(typed)
            terminal.type("\t")
            terminal.wait_for_text(expected)
