"""The ``dgemma-mlx`` program: commands, and errors as one line, a hint and an exit code."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from dgemma_mlx import __version__
from dgemma_mlx.cli.generate import generate
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.errors import DgemmaError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""Typer's parent of all usage errors, of which it exports only this child."""

HELP = """DiffusionGemma on Apple silicon: text that is denoised a canvas at a time.

Without a model the built-in demo answers. It is a demonstration of the program, not a language model: 2 million
parameters that solve 4x4 Sudoku, sort, reverse, add, count, fill in JSON and recall a name, not always rightly, and
say "I do not know that." to most other things. The README has its score card.
"""

app = typer.Typer(
    name="dgemma-mlx", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)


def _print_version(value: bool) -> None:
    if value:
        print(f"dgemma-mlx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Options before the command."""


def main() -> NoReturn:
    """Runs the program and exits: 0 ok, 1 run-time error, 2 usage, 130 interrupted."""
    sys.exit(run())


def run() -> int:
    """Runs the program; returns the exit code."""
    try:
        with quiet_when_closed():
            result = app(standalone_mode=False)
            return result if isinstance(result, int) else 0
        return 0
    except DgemmaError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _fail(*_usage(error), exit_code=2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _usage(error: Any) -> tuple[str, str]:
    """Message and hint of one of Typer's usage errors."""
    command = error.ctx.command_path if error.ctx else "dgemma-mlx"
    return error.format_message(), f"see {command} --help"


def _fail(message: str, hint: str, exit_code: int) -> int:
    print(f"dgemma-mlx: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return exit_code
