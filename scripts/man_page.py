"""Write packaging/dgemma-mlx.1, the manual page, from the program's own help. The wheel installs it.

    python scripts/man_page.py [FILE]             write the page
    python scripts/man_page.py --check [FILE]     exit with 1 if the page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from written_page import write_or_check

from dgemma_mlx.cli.app import PROGRAM, app
from dgemma_mlx.cli.help import Page, page_of
from dgemma_mlx.version import __version__

PAGE = Path(__file__).parent.parent / "packaging" / f"{PROGRAM}.1"
HEAD = rf"""
.\" Written by `python scripts/man_page.py` from the help of the program. Change the help, not this page.
.TH {PROGRAM.upper()} 1 "" "{PROGRAM} {__version__}" "User Commands"
.SH NAME
""".strip()


def manual() -> str:
    """Return the page: the program's own help, then all commands and subcommands in the order of the help."""
    program = get_command(app)
    context = program.context_class(program, info_name=PROGRAM, **program.context_settings)
    front = page_of(program, context)
    summary, _, rest = front.description.partition("\n")
    lines = [HEAD, rf"{PROGRAM} \- {roff(summary)}", ".SH SYNOPSIS", roff(front.usage), ".SH DESCRIPTION"]
    lines += [*paragraphs(rest), ".SH OPTIONS", *options(front), ".SH NOTES", *paragraphs(front.notes), ".SH COMMANDS"]
    for rows in front.commands.values():
        for name, _ in rows:
            lines += command(program.commands[name], name, context)  # type: ignore[attr-defined]
    lines += [".SH EXAMPLES", *examples(front.examples)]
    return "\n".join(lines) + "\n"


def command(found: Any, name: str, parent: Any) -> Iterator[str]:
    """Yield the lines about a command and its subcommands."""
    context = found.context_class(found, info_name=name, parent=parent)
    page = page_of(found, context)
    yield from (f".SS {roff(context.command_path)}", ".B " + roff(page.usage), *paragraphs(page.description))
    yield from options(page)
    if page.notes:
        yield from (".PP", "Notes:", *paragraphs(page.notes))
    if page.examples:
        yield from (".PP", "Examples:", *examples(page.examples))
    for subname, subcommand in getattr(found, "commands", {}).items():
        yield from command(subcommand, subname, context)


def options(page: Page) -> Iterator[str]:
    """Yield the options and arguments of a command, by section."""
    for title, rows in page.options.items():
        yield from (".PP", f"{roff(title)}:")
        for term, meaning in rows:
            yield from (".TP", ".B " + roff(term.strip()), roff(meaning))


def paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs, list items, and indented lines as they are."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    "):
            yield from examples(re.sub("^    ", "", block, flags=re.MULTILINE))
        elif block.startswith("- "):
            for item in re.split(r"\n(?=- )", block):
                yield from (r".IP \(bu 2", roff(" ".join(item[2:].split())))
        elif block.strip():
            yield from (".PP", roff(" ".join(block.split())))


def examples(text: str) -> Iterator[str]:
    """Yield lines that are not filled."""
    yield from (".PP", ".RS 4", ".nf", *map(roff, text.splitlines()), ".fi", ".RE")


def roff(text: str) -> str:
    """Return a line of text with the characters escaped that mean something to roff."""
    line = text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga").replace("'", r"\(aq")
    return rf"\&{line}" if line.startswith(".") else line


if __name__ == "__main__":
    sys.exit(write_or_check("man_page.py", PAGE, manual))
