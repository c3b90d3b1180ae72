"""Code blocks of an answer, and ``generate --extract``, which prints the first one in place of the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.texts import print_exact
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Event


def first_block(text: str) -> str | None:
    """Return the content of the first fenced code block of a Markdown text, or None. It may lack its last fence."""
    from markdown_it import MarkdownIt

    fences = (token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence")
    return next((fence.content for fence in fences), None)


def print_block(events: Iterable[Event]) -> Done:
    """Print the first code block of an answer to stdout and return the last event.

    An answer without one goes to stderr, so that nothing but code gets into a file.
    """
    done = next(event for event in events if isinstance(event, Done))
    block = first_block(done.text)
    if block is not None:
        print_exact(block)
    elif done.text:
        print(visible(done.text) if sys.stderr.isatty() else done.text, file=sys.stderr)
    return done


def check_block(done: Done) -> None:
    """Raise `DgemmaError` when an answer has no code block."""
    if first_block(done.text) is None:
        hint = f"Without --extract, --seed {done.seed} prints the answer to stdout."
        raise DgemmaError("the answer has no code block", hint)
