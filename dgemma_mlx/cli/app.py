"""The ``dgemma-mlx`` program: its commands, and its errors as one line, a hint and an exit code."""

from __future__ import annotations

import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.cli.bench import bench, measure_task
from dgemma_mlx.cli.chat.repl import chat
from dgemma_mlx.cli.choose import choose
from dgemma_mlx.cli.cluster import cluster
from dgemma_mlx.cli.config import config
from dgemma_mlx.cli.convert import convert
from dgemma_mlx.cli.doctor import doctor
from dgemma_mlx.cli.edit import edit
from dgemma_mlx.cli.evaluate import evaluate
from dgemma_mlx.cli.fill import fill
from dgemma_mlx.cli.fuse import fuse
from dgemma_mlx.cli.generate import generate
from dgemma_mlx.cli.help import WIDEST, Command, Group
from dgemma_mlx.cli.info import info
from dgemma_mlx.cli.machines import is_follower, join_launched, run_follower
from dgemma_mlx.cli.models import models
from dgemma_mlx.cli.pages import located
from dgemma_mlx.cli.parameters import expand
from dgemma_mlx.cli.pipe import prepare_streams, quiet_when_closed
from dgemma_mlx.cli.pull import pull
from dgemma_mlx.cli.serve import serve
from dgemma_mlx.cli.sessions import sessions
from dgemma_mlx.cli.signals import SIGNALS, say
from dgemma_mlx.cli.templates import templates
from dgemma_mlx.cli.train import train
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.version import __version__

PROGRAM = "dgemma-mlx"
INTERRUPTED = 130  # 128 + SIGINT, as in a shell

# The parent class of Typer's usage errors. Typer exports only this subclass of it.
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]

HELP = """Run the language model DiffusionGemma on Apple silicon.

DiffusionGemma is a block-diffusion model and does not write word by word: it fills a canvas of tokens with noise and
refines the whole canvas in a few denoising steps.

Begin with `dgemma-mlx generate "Sort 7 3 5"`, which the built-in demo answers. The demo shows what the program does;
it is not a useful language model. Its 2 million parameters solve 4x4 Sudoku, sort, reverse, add, count 30 numbers,
write JSON from a sentence and recall a name, not always correctly, and it replies "I do not know that." to most other
prompts in English. Choose a real model with `-m` or DGEMMA_MODEL.

Notes:
    - `dgemma-mlx COMMAND --help` explains a command.
    - A model is a folder, a Hub id `owner/name[@revision]`, or `demo`. A model from the Hub is downloaded once and used
      offline from then on.
    - Pages such as docs/pipes.md are installed in `share/doc/dgemma-mlx`.
    - `dgemma-mlx --install-completion` sets up completion for bash, zsh or fish.
    - `dgemma-mlx config` shows the settings, which come from options, environment variables and `config.toml`.
    - An error is one line, usually followed by a hint. The exit code is 0 for success, 1 for a run-time error, 2 for
      wrong usage and 130 after Ctrl-C. `dgemma-mlx --debug COMMAND` also prints the traceback.

Examples:
    dgemma-mlx generate "Sort 7 3 5"
    dgemma-mlx chat -m mlx-community/diffusiongemma-26B-A4B-it-4bit
    dgemma-mlx doctor
"""

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Write": (chat, generate, fill, edit, choose, serve),
    "Models": (pull, info, convert),
    "Fine-tune": (train, evaluate, fuse),
    "Machine": (doctor, bench),
}


class _ErrorOutput:
    """What an error prints.

    Attributes:
        tracebacks: Whether the traceback is printed, as --debug asks for.
    """

    tracebacks = False


app = typer.Typer(
    name=PROGRAM, cls=Group, help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
)  # fmt: skip
for title, commands in COMMANDS.items():
    for command in commands:
        name = "eval" if command is evaluate else None
        app.command(name, cls=Command, rich_help_panel=title)(expand(command))
app.add_typer(models, name="models", rich_help_panel="Models")
app.add_typer(config, name="config", rich_help_panel="Machine")
app.add_typer(cluster, name="cluster", rich_help_panel="Machine")
app.add_typer(sessions, name="sessions", rich_help_panel="Write")
app.add_typer(templates, name="templates", rich_help_panel="Write")


def _print_version(value: bool) -> None:
    """Print the version and exit when --version is given."""
    if value:
        print(f"dgemma-mlx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Store the options that come before the command, and connect the machines that mlx.launch has started."""
    _ErrorOutput.tracebacks = debug
    if context.invoked_subcommand != "cluster":  # which says of each machine whether it comes
        join_launched()


def run() -> int:
    """Run the program on ``sys.argv`` and return the exit code."""
    prepare_streams()
    warnings.showwarning = _show_warning
    try:
        with quiet_when_closed():
            if is_follower():
                return run_follower({"bench": measure_task})
            # `python -m dgemma_mlx` has the same name, because completion and errors print it.
            result = app(args=sys.argv[1:] or ["--help"], prog_name=PROGRAM, standalone_mode=False)
            if result == INTERRUPTED:
                raise KeyboardInterrupt  # Typer has turned it into an exit code
            return result if isinstance(result, int) else 0
        return 0
    except DgemmaError as error:
        return _fail(error)
    except UsageError as error:
        return _fail(DgemmaError(*_usage(error), exit_code=2))
    except (KeyboardInterrupt, typer.Abort):
        say(signal.SIGINT)
        return INTERRUPTED
    except OSError as error:  # a disk that is full or gone, for example
        place = "" if error.filename is None else f"{error.filename}: "
        return _fail(DgemmaError(f"{place}{reason(error)}", "Check the path, its permissions, and the disk."))
    except MemoryError:  # an endless device as a file, for example
        return _fail(DgemmaError("the memory does not suffice", "Check the size of the files that are read."))
    except SystemExit as ended:  # from a signal's handler, or from Typer after a completion script
        code = ended.code if isinstance(ended.code, int) else 0
        if code - 128 in SIGNALS:
            say(code - 128)
        return code
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        return _fail(DgemmaError(message, "This is a bug; `dgemma-mlx --debug ...` shows where."))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, without the place in the code."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


_INVALID = re.compile(r"Invalid value for (.*?): (?:(.+) is not (?:a valid|in the range) .*|(.*))", re.DOTALL)
# What the commands of other programs for models are called here.
_ELSEWHERE = {"run": "chat", "ls": "models", "list": "models", "ps": "models", "rm": "models rm", "show": "info"}
_NOUNS = {"int": "a whole number", "integer": "a whole number", "float": "a number"}


def _usage(error: Any) -> tuple[str, str]:
    """Return the message and the hint of one of Typer's usage errors, in the words of this program's own errors."""
    names = [name for name in sys.argv[1:] if not name.startswith("-")][:1]
    command = error.ctx.command_path if error.ctx else " ".join([PROGRAM, *names])
    message, hint = error.format_message().rstrip("."), f"`{command} --help` lists the options."
    if names and names[0] in _ELSEWHERE:
        hint = f"`{PROGRAM} {_ELSEWHERE[names[0]]}` does that here; {hint}"
    elif command == PROGRAM:
        hint = f"`{PROGRAM} generate \"...\"` asks a model: the command comes first; {hint}"
    elif "extra argument" in message and any(p.param_type_name == "argument" for p in error.ctx.command.params):
        hint = f"Put a text of several words in quotes; {hint}"
    if re.match(r"No such option: -\d", message):
        hint = f"Write -- before a value that begins with a dash; {hint}"
    if message.startswith("Missing") and getattr(error, "param", None) is not None:
        hint = f"{error.param.help} {hint}"
    invalid = _INVALID.fullmatch(message)
    if invalid is None or error.param is None:
        return message[:1].lower() + message[1:], hint
    name = error.param.opts[0] if error.param.param_type_name == "option" else error.param.human_readable_name.upper()
    noun = _NOUNS.get(error.param.type.name.partition(" ")[0])
    if invalid[2] is None or noun is None:
        return f"{name}: {invalid[3] or shown(invalid[2])}", hint
    least, most = (str(getattr(error.param.type, bound, None)).removesuffix(".0") for bound in ("min", "max"))
    bounds = "" if least == "None" else f" of at least {least}" if most == "None" else f" from {least} to {most}"
    return f"{name} must be {noun}{bounds}, not {shown(invalid[2].strip(chr(39)))}", hint


def _fail(error: DgemmaError) -> int:
    """Print the message and the hint, each on one line, and return the exit code."""
    if _ErrorOutput.tracebacks:
        import traceback

        traceback.print_exc()
    for name, text in ((PROGRAM, error.message), ("hint", located(error.hint))):
        if text:
            print(f"{name}: {text}", file=sys.stderr)
    return error.exit_code
