"""Templates: gaps, settings, errors, and the commands that list, show and edit them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.template import load_template, template_names, templates_folder
from dgemma_mlx.errors import DgemmaError
from tests.cli.terminal import Terminal

SORT = 'prompt = "Sort {input}"\nmax_tokens = 32\nseed = 1\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the templates."""
    (tmp_path / "config.toml").write_text("seed = 7\n")
    monkeypatch.setenv("DGEMMA_CONFIG", str(tmp_path / "config.toml"))
    folder = tmp_path / "templates"
    folder.mkdir()
    return folder


def write(folder: Path, text: str, name: str = "x") -> None:
    (folder / f"{name}.toml").write_text(text)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_gaps_are_filled_once_and_other_braces_are_text(folder: Path) -> None:
    write(folder, """
prompt = 'Answer {{input}} as {"a": 1, b: {}} in {language}: {input} {input}'
system = "Use {language}."
[params]
language = "French"
""")
    template = load_template("x")
    assert template.filled("{language}") == 'Answer {input} as {"a": 1, b: {}} in French: {language} {language}'
    assert template.settings["system"] == "Use French." and not template.is_complete
    assert load_template("x", ["language=a=b {input}"]).filled("!").endswith("in a=b {input}: ! !")
    assert load_template(str(folder / "x.toml")) == template


def test_the_input_follows_a_prompt_without_its_gap(folder: Path) -> None:
    write(folder, 'prompt = "Tell a joke.\\n"')
    assert load_template("x").is_complete
    assert [load_template("x").filled(text) for text in ("", "About cats.")] == [
        "Tell a joke.", "Tell a joke.\n\nAbout cats."
    ]  # fmt: skip
    write(folder, 'system = "Be brief."')
    assert load_template("x").filled("Why?") == "Why?" and not load_template("x").is_complete


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("prompt = 3", [], "prompt must be a text, not 3"), ("promt = 'x'", [], "unknown setting 'promt'"),
        ("max_tokens = 0", [], "max_tokens must be a whole number"), ("params = 3", [], "params must be a table"),
        ("[params]\nn = 3", [], "params must be a table of texts"), ("prompt = ", [], "cannot read"),
        ("prompt = '{a} {b} {c}'", ["a=1"], "needs a value for b, c"), ("prompt = 'x'", ["a=1"], "has no gap for a"),
        ("system = '{input}'", [], "system cannot have the gap"), ("", ["a"], "--param cannot be 'a'"),
        ("prompt = '{input}'", ["input=1"], "--param cannot be 'input=1'"),
        ("prompt = '{a}'", ["a=1", "a=2"], "--param cannot be 'a=2'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_template_is_named(folder: Path, text: str, given: list[str], words: str) -> None:
    write(folder, text)
    with pytest.raises(DgemmaError) as caught:
        load_template("x", given)
    assert words in caught.value.message and caught.value.exit_code == 2 and caught.value.hint


def test_a_name_stays_in_the_folder_and_a_missing_template_names_the_others(folder: Path) -> None:
    for name in ("../config", "", "a/b", ".x"):
        with pytest.raises(DgemmaError, match="cannot be a template's name"):
            load_template(name)
    write(folder, SORT, "sort")
    (folder / "notes.txt").touch()
    assert template_names() == ["sort"]
    with pytest.raises(DgemmaError, match="there is no template") as caught:
        load_template("srot")
    assert caught.value.hint == "Templates: sort."


def test_settings_of_a_template_are_over_the_users() -> None:
    settings = Settings({"DGEMMA_SEED": "3", "DGEMMA_TEMP": "0"}).under({"seed": 1}, "template x")
    assert settings.pick("seed", None) == 1 and settings.pick("seed", 2) == 2 and settings.pick("temp", None) == 0
    assert settings["seed"].origin == "template x"


def test_generate_answers_a_template(folder: Path) -> None:
    write(folder, SORT, "sort")
    done = run("generate", "-m", "demo", "-t", "sort", "7 3 5")
    assert done.stdout == "3 5 7\n" and "seed 1" in done.stderr, done.stderr
    for options, words in (((), "the prompt is empty"), (("--raw", "x", "-t", "s"), "--raw excludes a template")):
        write(folder, 'system = "Be brief."', "s")
        done = run("generate", "-m", "no/model", "-t", "sort", *options)
        assert done.returncode == 2 and words in done.stderr


def test_an_editor_writes_a_template_that_is_then_checked(folder: Path, tmp_path: Path) -> None:
    editor = tmp_path / "an editor"
    for script, words, names in (
        ("true", "nothing was changed", ""), ("echo 'promt = 1' > \"$2\"", "unknown setting 'promt'", "new\n"),
        ("echo 'prompt = \"Hi\"' > \"$2\"", "saved", "new\n"), ("exit 3", "failed (exit code 3)", "new\n"),
    ):  # fmt: skip
        editor.write_text(f"#!/bin/sh\n{script}\n")
        editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
        with Terminal(["templates", "edit", "new"], env={"VISUAL": f"'{editor}' --wait"}, columns=200) as terminal:
            code = terminal.finish()
        assert words in terminal.text and (code == 0) == (script == "true" or words == "saved")
        assert "".join(f"{name}\n" for name in template_names()) == names
    assert run("templates").stdout == "new\n" and run("templates", "show", "new").stdout == 'prompt = "Hi"\n'
    done = run("templates", "edit", "other")
    assert done.returncode == 2 and "not a terminal" in done.stderr and template_names() == ["new"]
    assert f"Write {templates_folder() / 'other.toml'}." in done.stderr
