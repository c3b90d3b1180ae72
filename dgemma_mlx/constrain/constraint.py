"""What an answer has to match, as callers say it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.automaton import automaton_of
from dgemma_mlx.constrain.grammar import regex_of_grammar
from dgemma_mlx.constrain.regex import any_of, checked_text, quoted, without_anchors
from dgemma_mlx.constrain.schema import regex_of_any_object, regex_of_schema
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer


class Constraint:
    """A set of texts: an answer that is written under it is one of them. Made by the class methods.

    All of them raise ``DgemmaError`` (exit code 2) for what is malformed, unsupported, too large, or matches nothing.
    """

    def __init__(self, pattern: str, kind: str) -> None:
        """``pattern`` matches the whole text, in the syntax of Rust's ``regex``; errors call it ``kind``."""
        self.pattern = pattern
        self.automaton = automaton_of(pattern, kind)
        self._over: tuple[tuple[Any, ...], TokenAutomaton] | None = None

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Texts that match a regular expression from beginning to end; ``^`` and ``$`` around it are not needed."""
        return cls(without_anchors(checked_text(pattern, "a regular expression")), "the regular expression")

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of these texts."""
        if isinstance(choices, str) or not choices:
            raise DgemmaError("a choice takes a list of texts", "Like yes,no", exit_code=2)
        return cls(any_of(*(quoted(checked_text(text, "a choice")) for text in choices)), "the choice")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool) -> Constraint:
        """JSON that validates against a schema, given as a dict or as JSON text."""
        return cls(regex_of_schema(_parsed(schema, "the JSON schema")), "the JSON schema")

    @classmethod
    def grammar(cls, grammar: str) -> Constraint:
        """Texts of a grammar in EBNF without recursion; the first rule is where it starts. See ``grammar``."""
        return cls(regex_of_grammar(grammar), "the grammar")

    @classmethod
    def response_format(cls, response_format: Mapping[str, Any]) -> Constraint | None:
        """What OpenAI's clients send: ``{"type": "text"}`` (no constraint), ``{"type": "json_object"}`` or
        ``{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}``."""
        kind = response_format.get("type") if isinstance(response_format, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return cls(regex_of_any_object(), "the JSON object")
        if kind == "json_schema":
            outer = response_format.get("json_schema")
            if isinstance(outer, Mapping) and "schema" in outer:
                return cls.json_schema(outer["schema"])
            raise DgemmaError("response_format has no schema", _FORMAT_HINT, exit_code=2)
        raise DgemmaError(f"response_format cannot be of type {kind!r}", _FORMAT_HINT, exit_code=2)

    def over(self, tokenizer: Tokenizer, config: GenerationConfig, vocab_size: int) -> TokenAutomaton:
        """The same over a model's tokens; the last one is kept. ``DgemmaError`` where they cannot write all of it."""
        response = tokenizer.special_ids.get("<|tool_response>")  # ends a text, too: one that calls a tool
        ends = [id for id in config.eos_token_ids if id != response]
        key = (tokenizer, ends, config.pad_token_id, vocab_size)
        if self._over is None or self._over[0] != key:
            self._over = key, TokenAutomaton(self.automaton, tokenizer, ends, config.pad_token_id, vocab_size)
        return self._over[1]


_FORMAT_HINT = '{"type": "json_schema", "json_schema": {"schema": {...}}}, or of type json_object or text.'


def _parsed(value: Any, what: str) -> Any:
    """What JSON text says; of anything else, what it would be after a way through JSON."""
    try:
        return json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise DgemmaError(f"{what} is not JSON: {error}", exit_code=2) from None
