"""Machines of the kinds of constraints: regular expressions, choices, JSON schemas and grammars."""

from __future__ import annotations

from functools import lru_cache

from dgemma_mlx.constrain.leaf import Letters, bytes_of, sets_of, term_of, utf8
from dgemma_mlx.constrain.limits import MOST_DIGITS, compiling
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.pattern import read_pattern
from dgemma_mlx.constrain.spelling import JsonSpelling
from dgemma_mlx.constrain.terms import Terms
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json


@lru_cache(maxsize=8)
def of_regex(pattern: str) -> Machine:
    """Return the machine of a regular expression, which must match the whole text.

    The syntax is that of Rust's ``regex`` crate. Raises ``DgemmaError`` (exit code 2) when the expression is malformed.
    """
    with compiling("the regular expression"):
        try:
            tree = read_pattern(pattern)
        except ValueError as error:
            raise DgemmaError(
                f"the regular expression cannot be compiled: {error}",
                "Use the syntax of Rust's regex crate, without look-behinds, back references and word boundaries.", 2,
            ) from None
        letters, terms = Letters(sets_of(tree)), Terms(BYTES)
        machine = Machine(terms, bytes_of(letters, term_of(letters, tree), terms, utf8(terms)))
        machine.is_alive(machine.start)  # a search, which is bounded here
    return machine


@lru_cache(maxsize=8)
def of_choices(texts: tuple[str, ...]) -> Machine:
    """Return the machine of some texts."""
    terms = Terms(BYTES)
    words = (terms.word(text.encode()) for text in texts)
    return Machine(terms, terms.either(words))


@lru_cache(maxsize=8)
def of_schema(schema: str, spelling: type[JsonSpelling] = JsonSpelling) -> Machine:
    """Return the machine of the values that validate against a JSON schema, given as JSON text.

    The values are spelled as JSON or in another way. Raises ``DgemmaError`` (exit code 2), which gives the path within
    the schema, when it is malformed or uses what is not supported.
    """
    from dgemma_mlx.constrain.writing import Writer

    with compiling("the JSON schema"):
        writer = Writer(parse_json(schema, MOST_DIGITS), spelling)
        machine = Machine(writer.context.spelling.terms, writer.start, spelling.controls)
        machine.is_alive(machine.start)  # translates what the shortest text needs
    return machine


@lru_cache(maxsize=8)
def of_grammar(grammar: str) -> Machine:
    """Return the machine of a context-free grammar, in the spelling of EBNF, of GBNF or of Lark.

    Raises ``DgemmaError`` (exit code 2), which gives the line, when the grammar is malformed.
    """
    from dgemma_mlx.constrain.grammar import term_of_grammar

    terms = Terms(BYTES)
    with compiling("the grammar"):
        return Machine(terms, term_of_grammar(grammar, terms))
