"""The options of ``generate`` that constrain an answer, and the constraint they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dgemma_mlx.cli.parameters import section
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.constrain.constraint import Constraint

constraint_option = section("Constraints")

Regex = Annotated[
    str | None,
    constraint_option(
        "--regex", metavar="REGEX", help="The answer matches this regular expression from beginning to end."
    ),
]
Choice = Annotated[
    str | None, constraint_option("--choice", metavar="A,B,C", help="The answer is one of these texts.")
]
JsonSchema = Annotated[
    str | None,
    constraint_option(
        "--json-schema", metavar="SCHEMA", help="The answer is JSON that this schema allows: a file or the text."
    ),
]
Grammar = Annotated[
    str | None,
    constraint_option(
        "--grammar", metavar="GRAMMAR", help="The answer follows this grammar (EBNF, GBNF or Lark): a file or the text."
    ),
]


@dataclass(frozen=True)
class ConstraintOptions:
    """The options that constrain an answer. At most one of them may be given."""

    regex: Regex = None
    choice: Choice = None
    json_schema: JsonSchema = None
    grammar: Grammar = None


def constraint_of(
    regex: str | None, choice: str | None, json_schema: str | None, grammar: str | None
) -> Constraint | None:
    """Return the constraint of the option that is given, or None.

    Raises `DgemmaError` (exit code 2) when two options are given, or when the value is not a valid constraint.
    """
    given = {"--regex": regex, "--choice": choice, "--json-schema": json_schema, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise DgemmaError(f"{' and '.join(names)} exclude each other", "An answer can match only one constraint.", 2)
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
    return Constraint.grammar(_read(grammar, inline=any(mark in grammar for mark in "=:\n")))


def _texts(choice: str) -> list[str]:
    """Split ``a,b,c`` at the commas and strip the spaces around each text."""
    texts = [text.strip() for text in choice.split(",")]
    if not all(texts):
        raise DgemmaError("--choice has an empty text", "Write the texts like yes,no,maybe.", exit_code=2)
    return texts


def _read(value: str, inline: bool) -> str:
    """Return the value itself when it is ``inline`` and not the name of a file; otherwise read the file it names."""
    path = Path(value)
    try:
        if inline and not (len(value) < 256 and path.is_file()):
            return value
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DgemmaError(f"cannot read {value[:80]}: {reason}", "Check the file and its permissions.", 2) from None
