"""Constraints on an answer: regular expressions, choices, JSON schemas and grammars.

The compilers of schemas and grammars are imported where they are used, because every program that generates an answer
imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import shown
from dgemma_mlx.constrain import languages
from dgemma_mlx.constrain.limits import MOST_DIGITS, compiling
from dgemma_mlx.constrain.machine import Machine
from dgemma_mlx.constrain.own_types import is_own_type, schema_of
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.text.tools import OPEN_CALL


class Constraint:
    """A set of texts that an answer must be one of.

    A class method creates a constraint from each kind of description, and ``generate``, ``stream`` and
    ``generate_batch`` take it as their ``constraint`` argument:

        from dgemma_mlx import Constraint, generate, load

        model = load("demo")
        answer = generate(model, "Is 17 a prime number?", constraint=Constraint.choice(["yes", "no"]))

    The answer then always matches, whatever the model would prefer to write. A constraint is compiled when it is
    created, and may be used for many answers and several models. Equal constraints are compiled once.

    All class methods raise ``DgemmaError`` (exit code 2) when the description is malformed, uses a feature that is not
    supported, takes more than two seconds of CPU time to compile, or matches no text at all. docs/constrained.md lists
    what is supported.

    Attributes:
        machine: The machine that accepts exactly these texts (``dgemma_mlx.constrain.machine``).
        source: The class method that has created the constraint, and its argument as JSON, such as
            ``("regex", "[0-9]+")``; None for a constraint that was created of a machine.
    """

    def __init__(self, machine: Machine, kind: str, source: tuple[str, Any] | None = None) -> None:
        """Create a constraint of a machine. Use the class methods instead, which check and translate a description.

        ``kind`` names the description in error messages, such as "the regular expression". Raises ``DgemmaError``
        (exit code 2) when no text matches.
        """
        self.machine, self.source = machine, source
        if not machine.is_alive(machine.start):
            raise DgemmaError(f"{kind} matches no text at all", "Loosen the constraint.", exit_code=2)

    def matches(self, text: str) -> bool:
        """Return whether a whole text matches. A text that UTF-8 cannot encode does not."""
        return self.machine.matches(text.encode("utf-8", "surrogatepass"))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Create a constraint from a regular expression, which must match the whole answer.

            Constraint.regex("[0-9]{4}-[0-9]{2}-[0-9]{2}")

        The syntax is that of Rust's ``regex`` crate, without word boundaries, and with look-aheads outside repetitions.
        Raises ``DgemmaError`` as described for the class.
        """
        machine = languages.of_regex(_checked_text(pattern, "a regular expression"))
        return cls(machine, "the regular expression", ("regex", pattern))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """Create a constraint that allows exactly the given texts.

            Constraint.choice(["yes", "no", "maybe"])

        Raises ``DgemmaError`` when ``choices`` is empty, is a single string or a number, or contains something other
        than text.
        """
        if isinstance(choices, str) or not isinstance(choices, Iterable) or not choices:
            raise DgemmaError(
                "choices must be a list of at least one text", 'Give a list like ["yes", "no"].', exit_code=2
            )
        texts = tuple(_checked_text(text, "a choice") for text in choices)
        return cls(languages.of_choices(texts), "the choice", ("choice", texts))

    @classmethod
    def json_schema(cls, schema: Any) -> Constraint:
        """Create a constraint that allows JSON texts that validate against a JSON schema (drafts 4 to 2020-12).

            Constraint.json_schema({
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
                "required": ["name"],
            })

        ``schema`` is a dict, a boolean, or JSON text. With pydantic it may also be a model, a dataclass, a TypedDict,
        another type hint such as ``list[Person]``, or a function, whose arguments by name the text then holds. The
        constraint may be narrower than the schema, never wider: properties appear in the order of the schema, others
        after them, unless ``"additionalProperties": False`` (pydantic's ``extra="forbid"``) excludes others. A keyword
        that looks like a typo gives a ``UserWarning``. Raises ``DgemmaError``, which gives the path within the schema,
        for what is malformed or not supported.
        """
        if is_own_type(schema):
            schema = schema_of(schema)
        text = json.dumps(_json_value(schema, "the JSON schema"))
        return cls(languages.of_schema(text), "the JSON schema", ("json_schema", text))

    @classmethod
    def grammar(cls, grammar: str) -> Constraint:
        """Create a constraint from a context-free grammar. Its first rule describes the whole answer.

            Constraint.grammar('sum ::= number ("+" number | "+(" sum ")")*  number ::= [1-9] [0-9]*')

        The grammar is EBNF, or has the spelling of llama.cpp (GBNF) or of Lark, where the rule ``root`` or ``start``
        describes the whole answer. docs/constrained.md describes the syntax. Raises ``DgemmaError``, which gives the
        line, when the grammar is malformed or uses what is not supported, and when a rule has no text.
        """
        return cls(languages.of_grammar(_checked_text(grammar, "a grammar")), "the grammar", ("grammar", grammar))

    @classmethod
    def from_source(cls, kind: str, value: Any) -> Constraint:
        """Create a constraint again from the ``source`` of an equal one. Raises ``DgemmaError`` as the class does."""
        makers = {"regex": cls.regex, "choice": cls.choice, "json_schema": cls.json_schema, "grammar": cls.grammar}
        return makers[kind](value)

    @classmethod
    def response_format(cls, response_format: Mapping[str, Any]) -> Constraint | None:
        """Create a constraint from the ``response_format`` of an OpenAI client.

            Constraint.response_format({
                "type": "json_schema",
                "json_schema": {"name": "numbers", "schema": {"type": "array", "items": {"type": "integer"}}},
            })

        The type ``json_schema`` is the same as ``Constraint.json_schema`` of its ``schema``; other keys, such as
        ``name`` and ``strict``, are ignored. The type ``json_object`` allows any JSON object. The type ``text`` imposes
        no constraint, so the result is None. Raises ``DgemmaError`` for anything but a dict, for any other type, and
        for ``json_schema`` without a schema.
        """
        if not isinstance(response_format, Mapping):
            raise DgemmaError(f"response_format must be a dict, not {shown(response_format)}", _FORMAT_HINT, 2)
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            schema = '{"type": "object"}'
            return cls(languages.of_schema(schema), "the JSON object", ("json_schema", schema))
        if kind == "json_schema":
            outer = response_format.get("json_schema")
            if outer is None:  # the form of OpenAI's Responses API
                outer = response_format
            if isinstance(outer, Mapping) and "schema" in outer:
                return cls.json_schema(outer["schema"])
            raise DgemmaError("response_format has no schema", _FORMAT_HINT, exit_code=2)
        raise DgemmaError(
            f"response_format must be of type text, json_object or json_schema, not {shown(kind)}", _FORMAT_HINT, 2
        )

    def over(self, tokenizer: Tokenizer, config: GenerationConfig, vocab_size: int) -> TokenMachine:
        """Return the constraint over a model's tokens.

        ``vocab_size`` is the model's vocabulary size. The end-of-text ids of ``config`` end a text, except
        ``<|tool_response>``, which ends tool calls, in a constraint without these. Constraints with the same machine
        share the result: the last ``_MAX_KEPT`` results are kept for each tokenizer, as long as the tokenizer exists.
        Threads may share it too. Raises ``DgemmaError`` (exit code 2) when the tokenizer lacks tokens for bytes that
        the constraint needs, and when the shortest text is too long for any answer.
        """
        has_calls = OPEN_CALL in self.machine.controls
        tool_response_id = None if has_calls else tokenizer.special_ids.get("<|tool_response>")
        eos_ids = tuple(id for id in config.eos_token_ids if id != tool_response_id)
        key = (self.machine, eos_ids, config.pad_token_id, vocab_size)
        with _lock:  # two threads with the same constraint compile it once
            kept = _token_machines.setdefault(tokenizer, {})
            if key not in kept:
                with compiling("the constraint"):
                    kept[key] = TokenMachine(self.machine, tokenizer, *key[1:])
            kept[key] = kept.pop(key)  # to the end; the first entry was then not used for the longest time
            if len(kept) > _MAX_KEPT:
                del kept[next(iter(kept))]
            return kept[key]


_MAX_KEPT = 8
_lock = Lock()
_token_machines: WeakKeyDictionary[Tokenizer, dict[tuple[Machine, tuple[int, ...], int, int], TokenMachine]] = (
    WeakKeyDictionary()
)
_FORMAT_HINT = 'Give {"type": "json_schema", "json_schema": {"schema": {...}}}, or the type json_object or text.'


def _checked_text(value: object, label: str) -> str:
    """Return the value if it is text that UTF-8 can encode. Raises ``DgemmaError`` (exit code 2) otherwise.

    ``label`` names the value in the message.
    """
    if not isinstance(value, str):
        raise DgemmaError(f"{label} must be text, not {type(value).__name__}", "Give a string.", exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(
            f"{label} contains a lone surrogate, which is not a Unicode character",
            "Remove the characters U+D800 to U+DFFF.", exit_code=2,
        ) from None
    return value


def _json_value(value: Any, label: str) -> Any:
    """Parse JSON text; convert any other value to what JSON would make of it (tuples to lists, keys to strings).

    Raises ``DgemmaError`` when the value is not JSON. ``label`` names it in the message.
    """
    try:
        return parse_json(value if isinstance(value, str) else json.dumps(value), MOST_DIGITS)
    except (TypeError, ValueError, RecursionError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise DgemmaError(
            f"{label} is not JSON: {problem}", "Give a dict, a boolean, or valid JSON text.", exit_code=2
        ) from None
