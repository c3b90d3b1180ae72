"""Help texts in plain text: options in named sections, commands in groups, examples at the end.

The help of a command is its docstring: a one-line summary, then paragraphs, then optional parts headed ``Notes:`` and
``Examples:``. A paragraph is wrapped to the terminal's width, a line that begins with ``- `` starts a list item, and
indented lines are printed as they are. The section of an option and the group of a command are their
``rich_help_panel``, which Typer stores but prints only with Rich.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup

from dgemma_mlx.cli.pages import pages_folder

WIDEST = 120  # columns; longer lines are hard to read
_TERM_WIDTH = 30  # a longer term has a line of its own
# Sections that many commands have, in this order after the command's own sections.
_COMMON = ("Model", "Prompt", "Output", "Decoding", "Constraints", "Speed and memory", "Options")
_PART = re.compile(r"^(Notes|Examples):\n", re.MULTILINE)


class Row(NamedTuple):
    """One line of a section: an option, argument or command, and what it does."""

    term: str
    meaning: str


class Page(NamedTuple):
    """The help of one command, before it is laid out.

    Attributes:
        usage: The usage line.
        description: The summary and the paragraphs after it.
        options: Options and arguments by section.
        commands: The subcommands of a group, by section.
        notes: Paragraphs and list items about details.
        examples: Command lines, one per line.
    """

    usage: str
    description: str
    options: dict[str, list[Row]]
    commands: dict[str, list[Row]]
    notes: str
    examples: str


class _PlainHelp:
    """Prints the help of a command or a group as this module describes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help text."""
        text = as_text(page_of(self, ctx), formatter.width)
        if re.search(r"\bdocs/[a-z_]+\.md", text):
            text += f"\nThe pages of docs/ are in {pages_folder()}\n"
        formatter.write(text)

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the whole summary, for completion as well."""
        return summary(self)


class Command(_PlainHelp, TyperCommand):
    """A command with plain help."""


class Group(_PlainHelp, TyperGroup):
    """A group of commands with plain help."""


def summary(command: Any) -> str:
    """Return the first line of a command's help."""
    return str(command.help or "").partition("\n")[0]


def page_of(command: Any, context: Any) -> Page:
    """Collect the help of a command. ``context`` is its Click context, which knows the full name."""
    description, *rest = _PART.split((command.help or "").strip() + "\n")
    parts = {name: textwrap.dedent(text).strip("\n") for name, text in zip(rest[::2], rest[1::2], strict=True)}
    parameters = [parameter for parameter in command.get_params(context) if not parameter.hidden]
    options: dict[str, list[Row]] = {}
    for parameter in parameters:
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        options.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(_row(parameter))
    order = sorted(options, key=lambda title: _COMMON.index(title) if title in _COMMON else -1)
    options = {title: options[title] for title in order}
    commands: dict[str, list[Row]] = {}
    for name, subcommand in getattr(command, "commands", {}).items():
        commands.setdefault(subcommand.rich_help_panel or "Commands", []).append(Row(name, summary(subcommand)))
    usage = " ".join([context.command_path, *_usage(command, parameters)])
    return Page(usage, description.strip(), options, commands, parts.get("Notes", ""), parts.get("Examples", ""))


def _usage(command: Any, parameters: Iterable[Any]) -> Iterator[str]:
    """Yield the parts of the usage line after the command's name: required options, ``[OPTIONS]``, arguments."""
    arguments = []
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            arguments.append(_argument(parameter) if parameter.required else f"[{_argument(parameter)}]")
        elif parameter.required:
            yield f"{max(parameter.opts, key=len)} {parameter.metavar}"
    yield "[OPTIONS]"
    yield from arguments
    if hasattr(command, "commands"):
        yield command.subcommand_metavar


def _argument(parameter: Any) -> str:
    """Return the name of an argument in capitals, with dots when it takes several values."""
    return f"{parameter.metavar or parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}"


def _row(parameter: Any) -> Row:
    """Return an option or argument with its help, its default and its smallest value."""
    is_flag = getattr(parameter, "is_flag", False)
    if parameter.param_type_name == "argument":
        term = _argument(parameter)
    else:
        names = ", ".join(sorted(parameter.opts, key=len)) + "".join(f" / {name}" for name in parameter.secondary_opts)
        term = ("" if re.match("-[^-]", names) else "    ") + names + ("" if is_flag else f" {parameter.metavar}")
    notes = ["required"] if parameter.required else []
    shown, default = parameter.show_default, parameter.default
    if isinstance(shown, str):
        notes.append(f"default: {shown}")
    elif shown and not is_flag and default not in (None, ""):
        notes.append(f"default: {default}")
    limits = parameter if hasattr(parameter, "min") else getattr(parameter, "type", None)  # Typer below 0.29
    if (least := getattr(limits, "min", None)) and least > 0:
        notes.append(f"at least {least:g}")
    return Row(term, f"{parameter.help} [{'; '.join(notes)}]" if notes else parameter.help)


def as_text(page: Page, width: int) -> str:
    """Lay out the help of a command for a terminal of this width."""
    hanging = " " * len("Usage: ")
    lines = [_filled(f"Usage: {page.usage}", width, "", hanging), "", _reflowed(page.description, width)]
    lines += [*_columns(page.commands, width), *_columns(page.options, width)]
    if page.notes:
        lines += ["", "Notes:", _reflowed(page.notes, width)]
    if page.examples:
        lines += ["", "Examples:", textwrap.indent(page.examples, "  ")]
    return "\n".join(lines) + "\n"


def _columns(sections: dict[str, list[Row]], width: int) -> Iterator[str]:
    """Yield the lines of all sections: terms on the left, meanings in one column on the right."""
    longest = max((len(row.term) for rows in sections.values() for row in rows), default=0)
    column = min(min(longest, _TERM_WIDTH) + 4, width // 2)
    for title, rows in sections.items():
        yield f"\n{title}:"
        for term, meaning in rows:
            text = _filled(meaning, width, " " * column, " " * column)
            yield f"  {term:{column - 2}}{text[column:]}" if len(term) <= column - 4 else f"  {term}\n{text}"


def _reflowed(text: str, width: int) -> str:
    """Wrap paragraphs and list items and indent everything by two columns; leave indented lines as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("    "):
            blocks.append(textwrap.indent(textwrap.dedent(block), "    "))
        elif block.startswith("- "):
            blocks.append("\n".join(_filled(item, width, "  ", "    ") for item in re.split(r"\n(?=- )", block)))
        else:
            blocks.append(_filled(block, width, "  ", "  "))
    return "\n\n".join(blocks)


def _filled(text: str, width: int, first: str, others: str) -> str:
    """Wrap a paragraph. ``first`` and ``others`` are the indents of its lines."""
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
