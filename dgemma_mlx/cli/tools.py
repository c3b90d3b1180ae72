"""The tools of ``generate``: the options, the file of ``--tools``, and the choice, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dgemma_mlx.checks import reason
from dgemma_mlx.cli import complete
from dgemma_mlx.cli.parameters import prompt_option
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

_HINT = "--tools names a JSON file with a declaration of a tool, or a list of them."

Tools = Annotated[
    Path | None,
    prompt_option("--tools", metavar="FILE", help="Tools that the model may call: a JSON file with declarations."),
]
Choose = Annotated[
    str | None,
    prompt_option("--tool-choice", metavar="CHOICE", show_default="auto",
                  autocompletion=complete.one_of("auto", "none", "required"),
                  help="Whether a tool is called: auto, none, required, or the name of a tool."),
]  # fmt: skip


@dataclass(frozen=True)
class ToolOptions:
    """The options about tools."""

    tools: Tools = None
    tool_choice: Choose = None


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Return the declarations in a JSON file, which holds one or a list of them.

    Raises `DgemmaError` (exit code 2), which names the file, when it cannot be read or a declaration is malformed.
    """
    from dgemma_mlx.text.tools import declarations

    try:
        value = parse_json(path.read_bytes())
        if value is None:  # to ``declarations`` it means that there are no tools
            raise DgemmaError(f"tools must be a list of tools, not {value}", _HINT)
        tools: list[dict[str, Any]] = [value] if isinstance(value, dict) else value
        declarations(tools)
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
