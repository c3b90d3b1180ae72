"""Settings: options override variables, which override config.toml, which overrides defaults. Bad values are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli.settings import SETTINGS, Settings, config_file
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED, SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.memory import DEQUANTIZE_CHOICES
from dgemma_mlx.generation.options import VERIFY
from dgemma_mlx.kernels.dispatch import MODES, VARIABLE
from dgemma_mlx.model.soft_tokens import IMAGE_ATTENTION

# One value of every setting that differs from its default: in TOML, in the environment, in Python.
OTHERS: dict[str, tuple[str, str, Any]] = {
    "model": ('"demo"', "demo", "demo"),
    "max_tokens": ("7", "7", 7),
    "seed": ("0", "0", 0),
    "system": ('"Sei kurz: ß"', "Sei kurz: ß", "Sei kurz: ß"),
    "thinking": ("true", "yes", True),
    "live": ("false", "off", False),
    "log": ("false", "no", False),
    "stats": ("true", "on", True),
    "markdown": ("false", "no", False),
    "temp": ("0", "0", 0.0),
    "max_denoising_steps": ("9", "9", 9),
    "entropy_bound": ("0.5", ".5", 0.5),
    "t_min": ("1", "1e0", 1.0),
    "t_max": ("1.5", "1.5", 1.5),
    "confidence_threshold": ("0.0", "0", 0.0),
    "stability_threshold": ("0", "0", 0),
    "speed": ('"fast"', "fast", "fast"),
    "verify": ('"flag"', "flag", "flag"),
    "memory_limit": ('"8GB"', "8GB", "8GB"),
    "dtype": ('"float16"', "float16", "float16"),
    "cpu_dequantize": ('"on"', "on", "on"),
    "image_attention": ('"causal"', "causal", "causal"),
    "kernels": ('"off"', "off", "off"),
}


def test_choices_are_those_of_the_modules_that_make_them() -> None:
    assert SETTINGS["kernels"].choices == MODES
    assert SETTINGS["cpu_dequantize"].choices == DEQUANTIZE_CHOICES
    assert SETTINGS["speed"].choices == tuple(SPEEDS)
    assert SETTINGS["speed"].default == DEFAULT_SPEED
    assert SETTINGS["verify"].choices == VERIFY
    assert SETTINGS["image_attention"].choices == IMAGE_ATTENTION
    assert f"DGEMMA_{'kernels'.upper()}" == VARIABLE


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_is_covered_here() -> None:
    assert OTHERS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: Path, name: str) -> None:
    in_file, in_environment, value = OTHERS[name]
    nothing = Settings({}, written(tmp_path, ""))
    assert (nothing[name].value, nothing[name].origin) == (SETTINGS[name].default, "default")
    path = written(tmp_path, f"{name} = {in_file}\n")
    filed = Settings({}, path)
    assert (filed[name].value, filed[name].origin) == (value, str(path))
    assert type(filed[name].value) is type(value)
    variable = f"DGEMMA_{name.upper()}"
    from_variable = Settings({variable: in_environment}, written(tmp_path, ""))
    assert (from_variable[name].value, from_variable[name].origin) == (value, variable)
    assert type(from_variable[name].value) is type(value)
    assert from_variable.pick(name, None) == value
    assert from_variable.pick(name, "flag") == "flag"
    assert from_variable.pick(name, False) is False
    others = {other: nothing[other] for other in SETTINGS if other != name}
    assert {other: from_variable[other] for other in others} == others


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "seed = 1\nmax_tokens = 2\n")
    settings = Settings({"DGEMMA_SEED": "3", "DGEMMA_MAX_TOKENS": ""}, path)  # an empty variable does not count
    assert (settings["seed"].value, settings["max_tokens"].value) == (3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown setting 'colour'"),
        ("[model]\nname = 1", "model must be a text"),
        ("max_tokens = 0", "max_tokens must be a whole number of at least 1, not 0"),
        ("max_tokens = 1.5", "max_tokens must be a whole number"),
        ("max_tokens = true", "max_tokens must be a whole number"),
        ('seed = "one"', "seed must be a whole number"),
        ("seed = -1", "seed must be a whole number of at least 0"),
        ("seed = 18446744073709551616", "seed must be a whole number of at least 0 and at most 18446744073709551615"),
        ("thinking = 1", "thinking must be true or false, not 1"),
        ("temp = nan", "temp must be a number of at least 0, not nan"),
        ("temp = inf", "temp must be a number"),
        ("t_max = true", "t_max must be a number"),
        (f"t_max = {'9' * 400}", "t_max must be a number"),
        ("system = 2020-01-01", "system must be a text"),
        ('kernels = "fast"', "kernels must be one of auto, off, reference, force, not 'fast'"),
        ("kernels = false", "kernels must be one of auto"),
        ("model = ", "cannot read"),
        ("model = demo", "cannot read"),
        ("seed = 1\nseed = 2", "cannot read"),
        ("x = " + "[" * 10_000, "cannot read"),
    ],
)
def test_a_bad_file_is_an_error_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DgemmaError) as caught:
        Settings({}, path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [("seed", "one"), ("seed", "1.0"), ("seed", "-1"), ("max_tokens", "0"), ("thinking", "maybe"), ("temp", "nan"),
     ("t_max", "1e999"), ("stability_threshold", "-1"), ("system", "caf\udce9"), ("seed", "9" * 5000)],
)  # fmt: skip
def test_a_bad_variable_is_an_error_that_names_it(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DgemmaError) as caught:
        Settings({f"DGEMMA_{name.upper()}": text}, written(tmp_path, ""))
    assert caught.value.message.startswith(f"DGEMMA_{name.upper()} must be ")
    assert caught.value.exit_code == 2


def test_the_file_may_be_missing_unless_it_was_named(tmp_path: Path) -> None:
    home = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    assert config_file({}).parts[-2:] == ("dgemma-mlx", "config.toml")
    named = {**home, "DGEMMA_CONFIG": str(tmp_path / "nowhere.toml")}
    assert config_file(named) == tmp_path / "nowhere.toml"
    with pytest.raises(DgemmaError, match="nowhere"):
        Settings(named)
    with pytest.raises(DgemmaError, match="cannot read"):
        Settings({"DGEMMA_CONFIG": str(tmp_path)})
    (tmp_path / "latin.toml").write_bytes(b'system = "caf\xe9"')
    with pytest.raises(DgemmaError, match="cannot read"):
        Settings({"DGEMMA_CONFIG": str(tmp_path / "latin.toml")})
    with pytest.raises(DgemmaError, match="nosuchuser"):
        Settings({"DGEMMA_CONFIG": "~nosuchuser/config.toml"})


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DGEMMA_")}
    env = {**inherited, "XDG_CONFIG_HOME": str(folder), "HOME": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        env=env, check=False,
    )


def test_config_shows_what_is_in_force_and_from_where(tmp_path: Path) -> None:
    path = written(tmp_path, 'max_tokens = 5\nsystem = "\x9b31m"')
    environment = {"DGEMMA_CONFIG": str(path), "DGEMMA_SEED": "3"}
    shown = json.loads(run("config", "--json", folder=tmp_path, **environment).stdout)
    assert shown["file"] == str(path)
    assert shown["settings"].keys() == SETTINGS.keys()
    assert shown["settings"]["max_tokens"] == {"value": 5, "from": str(path)}
    assert shown["settings"]["seed"] == {"value": 3, "from": "DGEMMA_SEED"}
    assert shown["settings"]["live"] == {"value": True, "from": "default"}
    rows = run("config", folder=tmp_path, **environment).stdout.decode()
    assert "\x9b" not in rows
    first, *others = (line.split() for line in rows.splitlines())
    assert first == ["file:", str(path)]
    assert [row[0] for row in others] == list(SETTINGS)
    assert next(row for row in others if row[0] == "seed")[1:3] == ["3", "DGEMMA_SEED"]


def test_settings_reach_generate_and_flags_go_before_them(tmp_path: Path) -> None:
    path = written(tmp_path, 'model = "demo"\nseed = 4\nmax_tokens = 40\nmax_denoising_steps = 1\n')
    environment = {"DGEMMA_CONFIG": str(path), "DGEMMA_MAX_TOKENS": "3", "DGEMMA_SEED": "5"}
    done = run("generate", "--json", "--seed", "6", "Count from 13 to 40.", folder=tmp_path, **environment)
    answer = json.loads(done.stdout)
    assert b"built-in demo" not in done.stderr  # a model was chosen, in the file
    assert answer["seed"] == 6
    assert (answer["statistics"]["generated_tokens"], answer["finish_reason"]) == (3, "length")
    assert answer["statistics"]["denoising_steps"] == 1


def test_settings_reach_chat(tmp_path: Path) -> None:
    path = written(tmp_path, 'model = "demo"\nseed = 4\nsystem = "Be brief."\nthinking = true\n')
    environment = {"DGEMMA_CONFIG": str(path), "DGEMMA_MAX_TOKENS": "3", "DGEMMA_STATE": str(tmp_path / "state")}
    with subprocess.Popen(
        [sys.executable, "-m", "dgemma_mlx", "chat", "--seed", "6"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **environment},
    ) as process:
        _, error = process.communicate(b"/show\n", timeout=60)
    shown = dict(line.split(maxsplit=1) for line in error.decode().splitlines())
    assert (shown["seed"], shown["max_tokens"], shown["thinking"]) == ("6", "3", "true")
    assert shown["system"] == "Be brief."


@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"], ["info"], ["config"]])
def test_bad_settings_end_every_command_with_2(tmp_path: Path, command: list[str]) -> None:
    path = written(tmp_path, "max_tokens = 0")
    done = run(*command, folder=tmp_path, DGEMMA_CONFIG=str(path))
    assert done.returncode == 2
    assert done.stdout == b""
    error, hint = done.stderr.decode().splitlines()
    assert error.startswith(f"dgemma-mlx: {path}: max_tokens must be")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"]])
def test_settings_that_do_not_go_together_are_refused_at_the_start(tmp_path: Path, command: list[str]) -> None:
    path = written(tmp_path, 'model = "demo"\nt_min = 0.9\nt_max = 0.5')
    done = run(*command, folder=tmp_path, DGEMMA_CONFIG=str(path))
    assert done.returncode == 2
    assert b"t_max (0.5) must be above 0 and not below t_min (0.9)" in done.stderr


@pytest.mark.parametrize(
    ("size", "code", "message"),
    [("much", 2, "not a size: 'much'"), ("5MB", 1, "more than the memory limit of 5.0 MB"), ("2GB", 0, "")],
)
def test_a_limit_of_memory(tmp_path: Path, size: str, code: int, message: str) -> None:
    done = run("generate", "-q", "-m", "demo", "--memory-limit", size, "Sort 2 1", folder=tmp_path)
    assert done.returncode == code
    assert message in done.stderr.decode()
    assert bool(done.stdout) is (code == 0)
