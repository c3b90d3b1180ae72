"""Help texts: their layout on terminals of several widths, and what every command has to say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from dgemma_mlx.cli.app import COMMANDS, PROGRAM, app
from dgemma_mlx.cli.help import Command, Page, Row, as_text, page_of
from dgemma_mlx.cli.parameters import ModelOptions, expand

ROOT = Path(__file__).parents[2]


def pages(command: Any, name: str, parent: Any = None, **settings: Any) -> Iterator[Page]:
    context = command.context_class(command, info_name=name, parent=parent, **settings)
    yield page_of(command, context)
    for subname, subcommand in getattr(command, "commands", {}).items():
        yield from pages(subcommand, subname, context)


PROGRAM_COMMAND = get_command(app)
PAGES = list(pages(PROGRAM_COMMAND, PROGRAM, **PROGRAM_COMMAND.context_settings))
NAMES = [page.usage.partition(" [")[0].partition(" --")[0] for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_help_is_complete(page: Page) -> None:
    first, *_ = page.description.splitlines()
    assert first.endswith(".") and len(first) <= 66  # fits beside the longest name on 80 columns
    examples = [line for line in page.examples.splitlines() if "dgemma-mlx " in line]
    assert 2 <= len(examples) <= 6
    rows = [row for section in page.options.values() for row in section]
    assert rows
    for row in rows:
        sentence = row.meaning.partition(" [")[0]
        assert sentence[0].isupper() or sentence[0] == "`"
        assert row.meaning.endswith((".", "]"))
        assert "<" not in row.term
    assert list(page.options)[-1] == "Options" and page.options["Options"][-1].term == "-h, --help"


@pytest.mark.parametrize("width", [50, 78, 118])
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_help_fits_the_width(page: Page, width: int) -> None:
    text = as_text(page._replace(examples=""), width)
    longest = max((line for line in text.splitlines() if not line.startswith("    model = ")), key=len)
    assert len(longest) <= width
    assert "..." not in " ".join(row.meaning for rows in page.commands.values() for row in rows)


def test_commands_are_listed_in_groups_on_one_line_each() -> None:
    front = PAGES[0]
    assert list(front.commands) == ["Write", "Models", "Fine-tune", "Machine"] == list(COMMANDS)
    lines = as_text(front, 78).splitlines()
    for row in (row for rows in front.commands.values() for row in rows):
        assert f"  {row.term:11}{row.meaning}" in lines


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout


def test_the_terminals_width_is_used_up_to_a_limit() -> None:
    widths = {columns: max(map(len, run("convert", "-h", COLUMNS=str(columns)).splitlines())) for columns in (100, 300)}
    assert 90 < widths[100] <= 98
    assert 110 < widths[300] <= 118


def test_paragraphs_items_and_indented_lines_are_laid_out() -> None:
    page = Page(
        "program [OPTIONS]", "Say something.\n\nA paragraph\nof two lines.\n\n    as = it is",
        {"Output": [Row("-q, --quiet", "Say less."), Row("    --an-option-with-a-very-long-name INT", "Be long.")]},
        {"Commands": [Row("rm", "Remove it.")]}, "- One item that\n  has two lines.\n- Another.", "program | cat",
    )  # fmt: skip
    assert as_text(page, 72) == """Usage: program [OPTIONS]

  Say something.

  A paragraph of two lines.

    as = it is

Commands:
  rm  Remove it.

Output:
  -q, --quiet                     Say less.
      --an-option-with-a-very-long-name INT
                                  Be long.

Notes:
  - One item that has two lines.
  - Another.

Examples:
  program | cat
"""


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", "-w", min=1, help="Width.", rich_help_panel="Size")] = 3
    name: Annotated[str | None, typer.Option("--name", help="Name.")] = None


def test_a_group_of_options_is_expanded_and_handed_over_as_one_object() -> None:
    seen: list[Any] = []

    def command(path: Annotated[Path, typer.Option()] = Path(), *, size: Size, model: ModelOptions) -> None:
        """Take a group."""
        seen.append((path, size, model))

    program = typer.Typer(rich_markup_mode=None)
    program.command(cls=Command)(expand(command))
    made = get_command(program)
    made(["-w", "5", "-m", "demo", "--path", "x"], standalone_mode=False)
    assert seen == [(Path("x"), Size(width=5), ModelOptions(model="demo"))]
    page = page_of(made, made.context_class(made, info_name="command"))
    assert page.options["Size"] == [Row("-w, --width INT", "Width. [default: 3; at least 1]")]
    assert Row("    --name TEXT", "Name.") in page.options["Options"]


def test_two_groups_with_the_same_option_are_refused() -> None:
    def command(*, first: Size, second: Size) -> None: ...

    with pytest.raises(AssertionError, match="two groups of command have an option width"):
        expand(command)


@pytest.mark.parametrize("name", ["generate", "fill", "edit", "choose", "info", "convert"])
def test_examples_with_the_demo_run(name: str, tmp_path: Path) -> None:
    page = PAGES[NAMES.index(f"dgemma-mlx {name}")]
    program = tmp_path / "bin" / "dgemma-mlx"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-m", "dgemma_mlx"])} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    lines = page.examples.replace("|\n", "|").replace("\\\n", "").splitlines()
    examples = [line for line in lines if re.search(f"dgemma-mlx {name} (-m )?demo ?", line)]
    assert examples
    for line in examples:
        done = subprocess.run(
            ["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
            env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout, done.stderr


IMPORTS = """
import importlib, pkgutil, sys
import dgemma_mlx.cli
for module in pkgutil.walk_packages(dgemma_mlx.cli.__path__, "dgemma_mlx.cli."):
    importlib.import_module(module.name)
print("mlx.core" in sys.modules or "mlx" in sys.modules)
"""


def test_no_module_of_the_command_line_imports_mlx_before_it_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
