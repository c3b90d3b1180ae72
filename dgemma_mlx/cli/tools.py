"""The tools of ``generate``: the options, the files of ``--tool``, and the choice, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dgemma_mlx.checks import reason
from dgemma_mlx.cli import complete
from dgemma_mlx.cli.parameters import prompt_option
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

if TYPE_CHECKING:
    from dgemma_mlx.cli.tool_run import ToolProgram

_HINT = "--tool names a JSON file with a declaration of a tool, or a list of them."

Tool = Annotated[
    list[Path] | None,
    prompt_option("--tool", "--tools", metavar="FILE",
                  help="Tools that the model may call: a JSON file with a declaration or a list of them. May be given "
                       "several times."),
]  # fmt: skip
Choose = Annotated[
    str | None,
    prompt_option("--tool-choice", metavar="CHOICE", show_default="auto",
                  autocompletion=complete.one_of("auto", "none", "required"),
                  help="Whether a tool is called: auto, none, required, or the name of a tool."),
]  # fmt: skip
Run = Annotated[
    str | None,
    prompt_option("--tool-run", metavar="PROGRAM",
                  help="Answer calls with this program, until the model answers. It reads a call as JSON from its "
                       "standard input and prints the result."),
]  # fmt: skip
Rounds = Annotated[
    int | None,
    prompt_option("--tool-rounds", min=1, show_default="10", help="Number of times that --tool-run answers calls."),
]
Seconds = Annotated[
    float | None,
    prompt_option("--tool-timeout", min=0.01, metavar="SECONDS", show_default="60",
                  help="Time after which --tool-run ends its program, and the call has failed."),
]  # fmt: skip


@dataclass(frozen=True)
class ToolOptions:
    """The options about tools."""

    tool: Tool = None
    tool_choice: Choose = None
    tool_run: Run = None
    tool_rounds: Rounds = None
    tool_timeout: Seconds = None

    def check(self) -> None:
        """Raise `DgemmaError` (exit code 2) for options that need others."""
        if self.tool_run is None and (self.tool_rounds, self.tool_timeout) != (None, None):
            raise DgemmaError("--tool-rounds and --tool-timeout need --tool-run", "It names the program.", exit_code=2)
        if self.tool_run is not None and not self.tool:
            raise DgemmaError("--tool-run needs --tool", "It names the file that declares the tools.", exit_code=2)

    def program(self) -> ToolProgram | None:
        """Return the program that answers calls, or None. Raises `DgemmaError` when there is no such program."""
        if self.tool_run is None:
            return None
        from dgemma_mlx.cli.tool_run import ToolProgram, program_of

        limits = self.tool_rounds or ToolProgram.rounds, self.tool_timeout or ToolProgram.seconds
        return ToolProgram(program_of(self.tool_run), *limits)


def read_tools(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the declarations in JSON files, each of which holds one or a list of them.

    Raises `DgemmaError` (exit code 2), which names the file, when it cannot be read, when a declaration is malformed,
    or when an earlier file declares the same name.
    """
    tools: list[dict[str, Any]] = []
    for path in paths:
        tools += _read(path, tools)
    return tools


def _read(path: Path, earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the declarations in a file, which must go together with the ``earlier`` ones."""
    from dgemma_mlx.text.tools import declarations

    try:
        value = parse_json(path.read_bytes())
        if value is None:  # to ``declarations`` it means that there are no tools
            raise DgemmaError(f"tools must be a list of tools, not {value}", _HINT)
        tools: list[dict[str, Any]] = [value] if isinstance(value, dict) else value
        declarations(tools)
        declarations([*earlier, *tools])
        return tools
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {reason(error)}", _HINT, exit_code=2) from None
    except ValueError as error:
        raise DgemmaError(f"{path} is not JSON: {error}", _HINT, exit_code=2) from None
    except DgemmaError as error:
        raise DgemmaError(f"{path}: {error.message}", error.hint, exit_code=2) from None


def check_choice(tools: Any, choice: str | Mapping[str, Any] | None) -> None:
    """Raise `DgemmaError` (exit code 2) when the tools do not offer the choice, or calls cannot be held to them."""
    from dgemma_mlx.constrain.turns import Turn, calls_of, of_turn
    from dgemma_mlx.text.tools import chosen, declarations

    if names := chosen(declarations(tools), choice).names:
        of_turn(Turn(calls=calls_of(tools, names)))
