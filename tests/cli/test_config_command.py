"""``config set``, ``unset``, ``edit`` and ``path``: the settings file keeps its comments, and stays valid."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli import app as program
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.settings_file import change_setting, changed
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_folder
from tests.cli.terminal import Terminal

FILE = '''# mine
max_tokens = 7  # a # short one
system = """two
temp = "lines"
"""

"seed" = 3'''


@pytest.mark.parametrize(
    ("name", "value", "old", "new"),
    [
        ("max_tokens", 9, "max_tokens = 7  #", "max_tokens = 9  #"),
        ("max_tokens", None, "max_tokens = 7  # a # short one\n", ""),
        ("system", 'a "#"\n\x7fb', 'system = """two\ntemp = "lines"\n"""\n', 'system = "a \\"#\\"\\n\\u007fb"\n'),
        ("seed", 4, '"seed" = 3', "seed = 4\n"),
        ("seed", None, '"seed" = 3', ""),
        ("temp", 0.5, '"seed" = 3', '"seed" = 3\ntemp = 0.5\n'),
        ("live", False, '"seed" = 3', '"seed" = 3\nlive = false\n'),
        ("temp", None, "", ""),
    ],
)
def test_a_change_leaves_everything_else_as_it_is(name: str, value: Any, old: str, new: str, tmp_path: Path) -> None:
    after = changed(FILE, name, value)
    assert after == FILE.replace(old, new)
    path = tmp_path / "config.toml"
    path.write_text(after)
    expected = {"max_tokens": 7, "system": 'two\ntemp = "lines"\n', "seed": 3, name: value}
    settings = Settings({}, path)
    for each, wanted in expected.items():
        assert settings[each].value == wanted or (wanted is None and settings[each].origin == "default")


def test_line_ends_and_a_byte_order_mark_stay() -> None:
    assert changed("\ufeffseed = 1\r\n# end", "temp", 0.0) == "\ufeffseed = 1\r\n# end\r\ntemp = 0.0\r\n"
    assert changed("\ufeffseed = 1\r\n", "seed", 2) == "\ufeffseed = 2\r\n"


def test_a_file_keeps_its_permissions_and_a_link_its_target(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text("seed = 1\n")
    (tmp_path / "real.toml").chmod(0o600)
    (tmp_path / "config.toml").symlink_to("real.toml")
    assert change_setting(tmp_path / "config.toml", "seed", 2)
    assert not change_setting(tmp_path / "config.toml", "seed", 2)
    assert (tmp_path / "config.toml").is_symlink()
    assert (tmp_path / "real.toml").read_text() == "seed = 2\n"
    assert stat.S_IMODE((tmp_path / "real.toml").stat().st_mode) == 0o600
    assert change_setting(tmp_path / "new" / "config.toml", "seed", 2)


@pytest.mark.parametrize("text", ["seed = x", "sed = 1", "[table]\nseed = 1"])
def test_a_file_that_is_not_valid_is_not_changed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(DgemmaError) as caught:
        change_setting(path, "seed", 2)
    assert caught.value.exit_code == 2 and path.read_text() == text


def test_two_processes_do_not_change_a_file_at_once(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(DgemmaError, match="another process is writing"):
        change_setting(tmp_path / "config.toml", "seed", 1)
    assert change_setting(tmp_path / "config.toml", "seed", 1)


def run(*arguments: str, **environment: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "config", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_a_setting_is_set_and_removed_again(tmp_path: Path) -> None:
    file = str(tmp_path / "config.toml")
    assert run("path", DGEMMA_CONFIG=file) == (0, f"{file}\n", [])
    assert run("set", "temp", "0", DGEMMA_CONFIG=file, DGEMMA_TEMP="1") == (
        0, "", [f"temp = 0.0 in {file}", "dgemma-mlx: the environment variable DGEMMA_TEMP still overrides it"],
    )  # fmt: skip
    assert Path(file).read_text() == "temp = 0.0\n"
    assert run("unset", "temp", DGEMMA_CONFIG=file) == (0, "", [f"removed temp from {file}"])
    assert Path(file).read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("set", "temp", "warm"), 2, "temp must be a number of at least 0, not 'warm'"),
        (("set", "temperature", "1"), 2, "unknown setting 'temperature'"),
        (("set", "memory_limit", "much"), 2, "not a size: 'much'"),
        (("set", "model", " "), 2, "model must be a text, not ' '"),
        (("set", "max_tokens", "9" * 26), 2, f"number of at least 1 and at most {2**64 - 1}"),
        (("set", "temp", "-1"), 2, "no such option: -1"),
        (("unset", "temp"), 1, "temp is not set in "),
        (("edit",), 2, "cannot open an editor"),
    ],
)
def test_a_mistake_changes_nothing(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("# empty\n")
    found, out, (error, hint) = run(*arguments, DGEMMA_CONFIG=str(file))
    assert (found, out) == (code, "") and message in error and hint.startswith("hint: ")
    assert file.read_text() == "# empty\n"


def test_an_edited_file_is_checked_before_it_replaces_the_settings(tmp_path: Path) -> None:
    editor, file = tmp_path / "editor", tmp_path / "config.toml"
    editor.write_text('#!/bin/sh\ngrep -q "seed = x" "$1" && seed=5\necho "seed = ${seed:-x}" > "$1"\n')
    editor.chmod(0o755)
    environment = {"DGEMMA_CONFIG": str(file), "EDITOR": str(editor), "VISUAL": ""}
    with Terminal(["config", "edit"], 200, 24, environment) as terminal:
        terminal.wait_for_text("Edit it again? [Y/n]:")
        assert f"dgemma-mlx: cannot read {file}: " in terminal.text and not file.exists()
        terminal.type("n\r")
        assert terminal.finish() == 2 and not file.exists()
    with Terminal(["config", "edit"], 200, 24, environment) as terminal:
        terminal.wait_for_text("Edit it again? [Y/n]:")
        terminal.type("\r")
        assert terminal.finish() == 0
        assert terminal.text.endswith(f"wrote {file}") and file.read_text() == "seed = 5\n"


def test_no_path_and_no_value_can_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DGEMMA_CONFIG", str(tmp_path / "c\x1b[31m" / "config.toml"))
    (tmp_path / "c\x1b[31m").mkdir()
    for arguments in (
        ("config", "set", "system", "a\x9b31m"), ("config",), ("config", "unset", "system"), ("templates",),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["dgemma-mlx", *arguments])
        assert program.run() == 0
        out, err = capsys.readouterr()
        assert "c␛[31m" in out + err and not {"\x1b", "\x9b"} & {*out, *err}
    monkeypatch.setattr("sys.argv", ["dgemma-mlx", "config", "path"])
    assert program.run() == 0 and capsys.readouterr().out == f"{tmp_path}/c\x1b[31m/config.toml\n"  # for a program
