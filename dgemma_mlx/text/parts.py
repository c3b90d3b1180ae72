"""An answer's token ids -> what the reader sees (text), what the model thought, and the tools it calls.

Gemma 4 writes ``<|channel>thought\\n...<channel|>`` around its thinking and
``<|tool_call>call:name{key:<|"|>text<|"|>,n:3}<tool_call|>`` for a tool call. The parser goes by token ids:
text that merely looks like markup stays text, and no control token ever reaches the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dgemma_mlx.text.detokenize import Detokenizer
from dgemma_mlx.text.tokenizer import Tokenizer

_CHANNEL_NAME = re.compile(r"\w*")
# One lexeme of a call's arguments: punctuation, a JSON string, or a bare word.
_LEXEME = re.compile(
    r"""\s*(?:(?P<mark>[{}\[\],:])|(?P<json>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}\[\],:"][^{}\[\],:"]*))"""
)
_CALL = re.compile(r"\s*call:\s*([^\s{}]+)\s*(?={)")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks for, with its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """An answer, or the part of it that is new, with all markup taken away."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: Parts) -> Parts:
        thinking, tool_calls = self.thinking + other.thinking, self.tool_calls + other.tool_calls
        return Parts(self.text + other.text, thinking, tool_calls)


class PartsParser:
    """Takes an answer's ids as they arrive and gives back the parts that are new and final.

    All that ``feed`` and ``finish`` return, added up, is the same however the ids were cut into feeds. A tool
    call is returned when it is complete. A malformed one becomes visible text, with ``"`` for its string
    delimiters; so does one that never ends, unless its arguments are all there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._open_channel, self._close_channel = special.get("<|channel>"), special.get("<channel|>")
        self._open_call, self._close_call = special.get("<|tool_call>"), special.get("<tool_call|>")
        self._quote = special.get('<|"|>')
        self._detokenizer = Detokenizer(tokenizer)
        self._thinking = False
        self._name: str | None = None  # what may be the channel's name, while its line has not ended
        self._held = ""  # a newline at the end of thinking: part of the markup if the channel closes now
        self._call: list[list[int]] | None = None  # ids of an open call, cut at the string delimiters

    def feed(self, ids: Iterable[int]) -> Parts:
        """The parts that these ids complete."""
        parts = Parts()
        plain: list[int] = []
        for id in ids:
            if not self._tokenizer.is_control(id):
                (plain if self._call is None else self._call[-1]).append(id)
            elif id in self._markup():
                parts += self._plain(plain) + self._control(id)
                plain = []
        return parts + self._plain(plain)

    def finish(self) -> Parts:
        """What was held back: thinking that was not closed is thinking."""
        return self._end_call() + self._end_text(closed=False)

    def _markup(self) -> set[int | None]:
        """The control tokens that mean something here; others are dropped without a trace."""
        if self._call is not None:
            return {self._quote, self._open_call, self._close_call}
        return {self._open_channel, self._close_channel, self._open_call}

    def _control(self, id: int) -> Parts:
        """Follows a control token of ``_markup``."""
        if self._call is not None:
            if id == self._quote:
                self._call.append([])
                return Parts()
            parts = self._end_call()
            if id == self._open_call:
                self._call = [[]]
            return parts
        parts = self._end_text(closed=id == self._close_channel)
        self._thinking = id == self._open_channel or (self._thinking and id == self._open_call)
        if id == self._open_channel:
            self._name = ""
        elif id == self._open_call:
            self._call = [[]]
        return parts

    def _plain(self, ids: list[int]) -> Parts:
        return self._route(self._detokenizer.feed(ids))

    def _route(self, text: str) -> Parts:
        """Text, or thinking without the channel's name and without the newline that ends it."""
        if not self._thinking:
            return Parts(text=text)
        if self._name is not None:
            text = self._name + text
            name = _CHANNEL_NAME.match(text)
            end = name.end() if name else 0
            if end == len(text):
                self._name = text
                return Parts()
            self._name = None
            text = text[end + 1 :] if text[end] == "\n" else text
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        return Parts(thinking=text.removesuffix("\n"))

    def _end_text(self, *, closed: bool) -> Parts:
        """Ends a run of text or thinking; ``closed`` by the end of its channel."""
        parts = self._route(self._detokenizer.finish())
        if not closed:
            parts += Parts(thinking=self._held)
        self._name, self._held = None, ""
        return parts

    def _end_call(self) -> Parts:
        """The open call, if there is one, as a tool call or as text."""
        if self._call is None:
            return Parts()
        pieces = [self._tokenizer.decode(ids) for ids in self._call]
        self._call = None
        call = parse_call(pieces)
        return Parts(text='"'.join(pieces)) if call is None else Parts(tool_calls=(call,))


def parse_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> Parts:
    """The parts of a whole answer."""
    parser = PartsParser(tokenizer)
    return parser.feed(ids) + parser.finish()


def parse_call(pieces: list[str]) -> ToolCall | None:
    """Reads ``call:name{...}``, cut at its string delimiters; None if it is malformed.

    Pieces 1, 3, ... are the strings. Keys are bare words or strings; other values are objects, arrays,
    numbers, true, false and null, as JSON writes them or as Python does (a template prints ``None``).
    """
    head = _CALL.match(pieces[0])
    if head is None or len(pieces) % 2 == 0:
        return None
    try:
        reader = _Reader([pieces[0][head.end() :], *pieces[1:]])
        arguments = reader.value()
        reader.end()
    except (ValueError, RecursionError):
        return None
    return ToolCall(head[1], arguments)


class _Reader:
    """Recursive descent over the lexemes of a call's arguments; ``ValueError`` where they make no sense."""

    def __init__(self, pieces: list[str]) -> None:
        self._lexemes: list[tuple[str, str]] = []  # (kind, text), the last first
        for n, piece in enumerate(pieces):
            self._lexemes += [("string", piece)] if n % 2 else _lexemes(piece)
        self._lexemes.reverse()

    def value(self) -> Any:
        kind, text = self._next()
        if kind == "string":
            return text
        if kind == "word":
            return _bare_value(text)
        if text == "{":
            return self._object()
        if text == "[":
            return self._array()
        raise ValueError(f"unexpected {text}")

    def end(self) -> None:
        if self._lexemes:
            raise ValueError("text after the arguments")

    def _object(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self._skip("}"):
            return values
        while True:
            kind, key = self._next()
            if kind == "mark" or not self._skip(":"):
                raise ValueError("no key")
            values[key] = self.value()
            if self._skip("}"):
                return values
            self._comma()

    def _array(self) -> list[Any]:
        values: list[Any] = []
        if self._skip("]"):
            return values
        while True:
            values.append(self.value())
            if self._skip("]"):
                return values
            self._comma()

    def _next(self) -> tuple[str, str]:
        if not self._lexemes:
            raise ValueError("the arguments end too early")
        return self._lexemes.pop()

    def _skip(self, mark: str) -> bool:
        found = bool(self._lexemes) and self._lexemes[-1] == ("mark", mark)
        if found:
            self._lexemes.pop()
        return found

    def _comma(self) -> None:
        if not self._skip(","):
            raise ValueError("no comma")


def _lexemes(text: str) -> list[tuple[str, str]]:
    """Punctuation, strings in JSON's own quotes, and bare words of text outside string delimiters."""
    text = text.rstrip()
    found, position = [], 0
    while position < len(text):
        match = _LEXEME.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position : position + 10]!r}")
        kind = str(match.lastgroup)
        lexeme = match[kind].rstrip()
        found.append(("string", json.loads(lexeme, strict=False)) if kind == "json" else (kind, lexeme))
        position = match.end()
    return found


def _bare_value(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    number = _NUMBER.fullmatch(word)
    if number is None:
        raise ValueError(f"{word!r} is no value")
    value = float(word) if number[1] or number[2] else int(word)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{word} is no finite number")
    return value
