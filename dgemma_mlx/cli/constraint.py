"""The options of ``generate`` that say what an answer has to match."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.constrain.constraint import Constraint

Regex = Annotated[
    str | None, typer.Option("--regex", help="The answer matches this regular expression from beginning to end.")
]
Choice = Annotated[str | None, typer.Option("--choice", help="The answer is one of these, as yes,no,maybe.")]
JsonSchema = Annotated[
    str | None, typer.Option("--json-schema", help="The answer is JSON that validates: a file, or a schema as it is.")
]
Grammar = Annotated[
    str | None, typer.Option("--grammar", help="The answer follows this EBNF without recursion: a file, or rules.")
]


def constraint_of(
    regex: str | None, choice: str | None, json_schema: str | None, grammar: str | None
) -> Constraint | None:
    """The one that is given; ``DgemmaError`` (exit code 2) where there are two, or where it is no good."""
    given = {"--regex": regex, "--choice": choice, "--json-schema": json_schema, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise DgemmaError(f"{' and '.join(names)} exclude each other", "The answer matches one of them.", exit_code=2)
    if not names:
        return None
    from dgemma_mlx.constrain.constraint import Constraint

    if regex is not None:
        return Constraint.regex(regex)
    if choice is not None:
        return Constraint.choice(_texts(choice))
    if json_schema is not None:
        return Constraint.json_schema(_read(json_schema, inline=json_schema.lstrip()[:1] in ("{", "t", "f")))
    assert grammar is not None
    return Constraint.grammar(_read(grammar, inline="=" in grammar or "\n" in grammar))


def _texts(choice: str) -> list[str]:
    """``a,b,c``; blanks around the commas do not count."""
    texts = [text.strip() for text in choice.split(",")]
    if not all(texts):
        raise DgemmaError("--choice has an empty text", "Like yes,no,maybe", exit_code=2)
    return texts


def _read(value: str, inline: bool) -> str:
    """What an option says, or the file that it names."""
    path = Path(value)
    try:
        if inline and not (len(value) < 256 and path.is_file()):
            return value
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DgemmaError(f"cannot read {value[:80]}: {reason}", exit_code=2) from None
