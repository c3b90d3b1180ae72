"""The ``dgemma-mlx`` program: commands, and errors as one line, a hint and an exit code."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

import typer

from dgemma_mlx.cli.bench import bench
from dgemma_mlx.cli.chat.repl import chat
from dgemma_mlx.cli.choose import choose
from dgemma_mlx.cli.config import config
from dgemma_mlx.cli.convert import convert
from dgemma_mlx.cli.doctor import doctor
from dgemma_mlx.cli.edit import edit
from dgemma_mlx.cli.evaluate import evaluate
from dgemma_mlx.cli.fill import fill
from dgemma_mlx.cli.fuse import fuse
from dgemma_mlx.cli.generate import generate
from dgemma_mlx.cli.info import info
from dgemma_mlx.cli.models import models
from dgemma_mlx.cli.pipe import quiet_when_closed, reopen_streams
from dgemma_mlx.cli.train import train
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.version import __version__

PROGRAM = "dgemma-mlx"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""Typer's parent of all usage errors, of which it exports only this child."""

HELP = """DiffusionGemma on Apple silicon: text that is denoised a canvas at a time.

Without a model the built-in demo answers. It is a demonstration of the program, not a language model: 2 million
parameters that solve 4x4 Sudoku, sort, reverse, add, count, fill in JSON and recall a name, not always rightly, and
say "I do not know that." to most other things. The README has its score card.
"""


class _Shown:
    """What --debug adds."""

    tracebacks = False


app = typer.Typer(
    name=PROGRAM, help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (chat, generate, fill, edit, choose, convert, train, fuse, evaluate, info, doctor, bench, config):
    app.command("eval" if command is evaluate else None)(command)
app.add_typer(models, name="models")


def _print_version(value: bool) -> None:
    if value:
        print(f"dgemma-mlx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
) -> None:
    """Options before the command."""
    _Shown.tracebacks = debug


def main() -> NoReturn:
    """Runs the program and exits: 0 ok, 1 run-time error, 2 usage, 130 interrupted."""
    sys.exit(run())


def run() -> int:
    """Runs the program; returns the exit code."""
    reopen_streams()
    warnings.showwarning = _show_warning
    try:
        with quiet_when_closed():
            # Its own name also as `python -m dgemma_mlx`: completion and errors go by it.
            result = app(args=sys.argv[1:] or ["--help"], prog_name=PROGRAM, standalone_mode=False)
            if result == INTERRUPTED:
                raise KeyboardInterrupt  # Typer made an exit code of it
            return result if isinstance(result, int) else 0
        return 0
    except DgemmaError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _fail(*_usage(error), exit_code=2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        return _fail(message, "This is a bug; `dgemma-mlx --debug ...` shows where.", exit_code=1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the place in the code."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def _usage(error: Any) -> tuple[str, str]:
    """Message and hint of one of Typer's usage errors."""
    command = error.ctx.command_path if error.ctx else PROGRAM
    return error.format_message(), f"see {command} --help"


def _fail(message: str, hint: str, exit_code: int) -> int:
    """Prints the error, each of its parts on one line."""
    from dgemma_mlx.cli.render.visible import visible

    if _Shown.tracebacks:
        import traceback

        traceback.print_exc()
    for name, text in ((PROGRAM, message), ("hint", hint)):
        if text:
            print(f"{name}: {' '.join(visible(text).splitlines())}", file=sys.stderr)
    return exit_code
