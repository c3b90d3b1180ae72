"""Write docs/cli.md, the reference of the command line, from the program's own help.

    python scripts/cli_reference.py [FILE]             write the page
    python scripts/cli_reference.py --check [FILE]     exit with 1 if the page is out of date
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
from dgemma_mlx.cli.help import Page, Row, page_of

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

<!-- Written by `python scripts/cli_reference.py` from the help of the program. Change the help, not this page. -->

`dgemma-mlx COMMAND --help` (or `-h`) prints what this page says about a command.
"""

NOT_RUN = {  # what examples contain that scripts/docs_commands.py cannot run
    "--url": "a running server; server.md runs it",
    "--steps 200": "minutes of training",
    "unset model": "the example that sets it, whose model is the Hub's",
    "config edit": "an editor in a terminal",
    "3f2a91bc": "a conversation of the reader",
    " trip": "a conversation of the reader",
    "search budget": "a conversation of the reader",
    "runs/sudoku": "the adapter of recipes/sudoku, whose training takes half an hour",
}


def reference() -> str:
    """Return the page: all commands by group, then the program's own options, then a section for each command."""
    program = get_command(app)
    context = program.context_class(program, info_name=PROGRAM, **program.context_settings)
    front = page_of(program, context)
    lines = [HEAD]
    for title, rows in front.commands.items():
        lines.append(f"| {title} | |\n| --- | --- |")
        lines += [f"| [{name}](#{PROGRAM}-{name}) | {meaning} |" for name, meaning in rows]
        lines.append("")
    lines += [f"## {PROGRAM}\n", *section(front)]
    for title, rows in front.commands.items():
        lines.append(f"## {title}\n")
        for name, _ in rows:
            lines += command_section(program.commands[name], name, context, "###")  # type: ignore[attr-defined]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def command_section(command: Any, name: str, parent: Any, heading: str) -> Iterator[str]:
    """Yield the lines about a command and its subcommands."""
    context = command.context_class(command, info_name=name, parent=parent)
    yield f"{heading} {context.command_path}\n"
    yield from section(page_of(command, context))
    for subname, subcommand in getattr(command, "commands", {}).items():
        yield from command_section(subcommand, subname, context, f"{heading}#")


def section(page: Page) -> Iterator[str]:
    """Yield the usage, the description, the options by section, the notes and the examples of one command."""
    yield f"```text\n{page.usage}\n```\n"
    yield f"{linked(page.description)}\n"
    for title, rows in page.options.items():
        shown = [f"| {term_of(row)} | {linked(row.meaning)} |" for row in rows if not row.term.endswith("--help")]
        if shown:
            yield "\n".join([f"| {title} | |", "| --- | --- |", *shown, ""])
    if page.notes:
        yield f"{linked(page.notes)}\n"
    if page.examples:
        yield "Examples:\n"
        yield from (f'<!-- not run "{text}": {why} -->' for text, why in NOT_RUN.items() if text in page.examples)
        yield f"```sh\n{page.examples}\n```\n"


def term_of(row: Row) -> str:
    """Return an option's names as code, such as `-m`, `--model MODEL`."""
    return ", ".join(f"`{name}`" for name in re.split(", | / ", row.term.strip()))


def linked(text: str) -> str:
    """Return the text with links to the other pages of this folder."""
    return re.sub(r"docs/([a-z_]+\.md)", r"[docs/\1](\1)", text)


if __name__ == "__main__":
    sys.exit(write_or_check("cli_reference.py", PAGE, reference))
