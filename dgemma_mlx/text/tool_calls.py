"""The grammar of a tool call as Gemma 4's template writes it: ``call:name{key:<|"|>text<|"|>,n:3}``.

``parse_calls`` reads a block by this grammar. Only a block that does not follow it goes to the tolerant reading of
``call_repair.py``, which therefore never changes what a well-formed call means.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dgemma_mlx.text.call_repair import MAX_DEPTH, NAME, read_tolerantly

# One lexeme of a call's arguments: punctuation, a delimited string, a JSON string, or a bare word.
_LEXEME = re.compile(
    r"""\s*(?:(?P<mark>[{}\[\],:])|(?P<delimited>\0)|(?P<json>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}\[\],:"\0][^{}\[\],:"\0]*))"""
)
_CALL = re.compile(rf"\s*call:\s*(?!call:)({NAME})\s*(?={{)")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


def parse_calls(pieces: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls, as (name, arguments), that a tool call's block holds; an empty list when it is no call.

    ``pieces`` is the block's text split at its string delimiters, so the pieces with odd indices are the strings. Keys
    are bare words or strings. Other values are objects, arrays, numbers, and true, false and null. The grammar accepts
    the JSON and the Python spelling of the latter three, because a template may print ``None``, and strings in JSON's
    quotes. When a key is repeated, its last value counts, as in JSON. Brackets nest at most ``MAX_DEPTH`` deep. The
    time is linear in the length of the block.
    """
    # The delimited strings are cut out and leave a NUL, which is part of no call: the rest is plain text.
    if any("\0" in text for text in pieces[::2]):
        return []
    try:
        return [_strict_call("\0".join(pieces[::2]), pieces[1::2], len(pieces))]
    except ValueError:
        return read_tolerantly(pieces)


def _strict_call(text: str, strings: list[str], pieces: int) -> tuple[str, dict[str, Any]]:
    """Parse one well-formed call. Raises ``ValueError`` for anything else."""
    head = _CALL.match(text)
    if head is None or pieces % 2 == 0:
        raise ValueError("not a call")
    parser = _ArgumentsParser(text[head.end() :].rstrip(), strings)
    arguments = parser.value(1)
    parser.end()
    return head[1], arguments


class _ArgumentsParser:
    """A recursive-descent parser of a call's arguments. All methods raise ``ValueError`` for malformed arguments."""

    def __init__(self, text: str, strings: list[str]) -> None:
        """Split the text, in which each NUL stands for the next one of the strings, into lexemes."""
        self._lexemes: list[tuple[str, str]] = []  # (kind, text) of the remaining lexemes, the next one last
        left, position = iter(strings), 0
        while position < len(text):
            match = _LEXEME.match(text, position)
            if match is None:
                raise ValueError(f"unexpected {text[position : position + 10]!r}")
            kind, position = str(match.lastgroup), match.end()
            lexeme = match[kind].rstrip()
            if kind == "delimited":
                kind, lexeme = "string", next(left)
            elif kind == "json":
                kind, lexeme = "string", json.loads(lexeme, strict=False)
            self._lexemes.append((kind, lexeme))
        self._lexemes.reverse()

    def value(self, depth: int) -> Any:
        """Parse one value; an object or array is nested ``depth`` deep, from 1."""
        kind, text = self._next()
        if kind == "string":
            return text
        if kind == "word":
            return _bare_value(text)
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        if text == "{":
            return self._object(depth)
        if text == "[":
            return self._array(depth)
        raise ValueError(f"unexpected {text}")

    def end(self) -> None:
        """Check that no lexeme is left."""
        if self._lexemes:
            raise ValueError("text after the arguments")

    def _object(self, depth: int) -> dict[str, Any]:
        """Parse the rest of an object after its ``{``."""
        values: dict[str, Any] = {}
        if self._skip("}"):
            return values
        while True:
            kind, key = self._next()
            if kind == "mark" or not self._skip(":"):
                raise ValueError("missing key")
            values[key] = self.value(depth + 1)
            if self._skip("}"):
                return values
            self._comma()

    def _array(self, depth: int) -> list[Any]:
        """Parse the rest of an array after its ``[``."""
        values: list[Any] = []
        if self._skip("]"):
            return values
        while True:
            values.append(self.value(depth + 1))
            if self._skip("]"):
                return values
            self._comma()

    def _next(self) -> tuple[str, str]:
        """Remove and return the next lexeme."""
        if not self._lexemes:
            raise ValueError("the arguments end too early")
        return self._lexemes.pop()

    def _skip(self, mark: str) -> bool:
        """Remove the next lexeme if it is this punctuation mark; return whether it was."""
        found = bool(self._lexemes) and self._lexemes[-1] == ("mark", mark)
        if found:
            self._lexemes.pop()
        return found

    def _comma(self) -> None:
        """Remove a comma."""
        if not self._skip(","):
            raise ValueError("missing comma")


def _bare_value(word: str) -> Any:
    """Return the constant or number that a bare word spells. Raises ``ValueError`` for any other word."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    number = _NUMBER.fullmatch(word)
    if number is None:
        raise ValueError(f"{word!r} is not a value")
    value = float(word) if number[1] or number[2] else int(word)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{word} is not a finite number")
    return value
