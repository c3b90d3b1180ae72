"""Separation of an answer into visible text, thinking and tool calls.

Gemma 4 encloses its thinking in ``<|channel>thought\\n...<channel|>`` and writes a tool call as
``<|tool_call>call:name{key:<|"|>text<|"|>,n:3}<tool_call|>``. The parser recognises this markup by token ids, not by
text. Text that only looks like markup therefore stays text, and no control token ever reaches the reader.
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
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model requests.

    The text ``call:get_weather{city:<|"|>Rome<|"|>,days:3}`` becomes
    ``ToolCall("get_weather", {"city": "Rome", "days": 3})``.

    Attributes:
        name: Name of the tool.
        arguments: Arguments by name. The values are JSON values: dict, list, str, int, float, bool or None. They are
            not checked against the tool's parameters.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """The parts of an answer, or of a new piece of an answer, without markup.

    The sum of two ``Parts`` is the parts of the two pieces in a row.

    Attributes:
        text: Text that the reader sees.
        thinking: Text that the model wrote in its thinking channel.
        tool_calls: Complete tool calls, in the order in which the model wrote them.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: Parts) -> Parts:
        thinking, tool_calls = self.thinking + other.thinking, self.tool_calls + other.tool_calls
        return Parts(self.text + other.text, thinking, tool_calls)


class PartsParser:
    """An incremental parser: token ids of an answer -> the ``Parts`` that are new and final.

    Call ``feed`` with the ids as they arrive, and ``finish`` once after the last id:

        parser = PartsParser(tokenizer)
        for ids in canvases:
            new = parser.feed(ids)
            print(new.text, end="")
        print(parser.finish().text)

    The sum of all returned parts does not depend on how the ids are split into calls of ``feed``. The parser returns a
    tool call when the call is complete. A malformed call becomes visible text, in which ``"`` replaces the string
    delimiter ``<|"|>``. A call without a closing token is parsed when the next call begins or the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, reads_calls: bool = True, opening: Iterable[int] = ()) -> None:
        """Create a parser for one answer.

        Without ``reads_calls``, what looks like a call is text. ``opening`` holds the ids with which the answer begins
        because its prompt ends with them, such as the beginning of a call; none of its parts may be complete. A call
        to which the answer adds nothing is left out.
        """
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._open_channel, self._close_channel = special.get("<|channel>"), special.get("<channel|>")
        self._open_call, self._close_call = special.get("<|tool_call>"), special.get("<tool_call|>")
        self._quote = special.get('<|"|>')
        self._detokenizer = Detokenizer(tokenizer)
        self._thinking = False
        # Text after <|channel> that may still belong to the channel's name; None when the name is complete.
        self._channel_name: str | None = None
        # A newline at the end of the thinking so far. It is markup if the channel closes right after it.
        self._held_newline = ""
        self._call: list[list[int]] | None = None  # ids of the open call, split at the string delimiters
        self._reads_calls = reads_calls
        self._begun: list[list[int]] | None = None  # the open call as far as the prompt has it
        self.feed(opening)
        self._begun = self._call and [list(ids) for ids in self._call]

    def feed(self, ids: Iterable[int]) -> Parts:
        """Return the parts that these ids complete."""
        parts = Parts()
        plain: list[int] = []
        for id in ids:
            if not self._tokenizer.is_control(id):
                (plain if self._call is None else self._call[-1]).append(id)
            elif id in self._markup_ids():
                parts += self._feed_plain(plain) + self._feed_markup(id)
                plain = []
        return parts + self._feed_plain(plain)

    def finish(self) -> Parts:
        """Return the parts that the parser still holds back. Unclosed thinking stays thinking."""
        return self._end_call() + self._end_text(closed=False)

    def _markup_ids(self) -> set[int | None]:
        """Return the control ids that have a meaning in the current state. The parser drops all other control ids."""
        if self._call is not None:
            return {self._quote, self._open_call, self._close_call}
        return {self._open_channel, self._close_channel, self._open_call}

    def _feed_markup(self, id: int) -> Parts:
        """Change the state for a control id of ``_markup_ids``; return the parts that it completes."""
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
            self._channel_name = ""
        elif id == self._open_call:
            self._call = [[]]
        return parts

    def _feed_plain(self, ids: list[int]) -> Parts:
        """Decode ordinary ids outside tool calls; return the parts that they complete."""
        return self._as_parts(self._detokenizer.feed(ids))

    def _as_parts(self, text: str) -> Parts:
        """Return new text as visible text or as thinking.

        Thinking omits the channel's name, the newline after the name, and the newline before ``<channel|>``.
        """
        if not self._thinking:
            return Parts(text=text)
        if self._channel_name is not None:
            text = self._channel_name + text
            name = _CHANNEL_NAME.match(text)
            end = name.end() if name else 0
            if end == len(text):
                self._channel_name = text
                return Parts()
            self._channel_name = None
            text = text[end + 1 :] if text[end] == "\n" else text
        text = self._held_newline + text
        self._held_newline = "\n" if text.endswith("\n") else ""
        return Parts(thinking=text.removesuffix("\n"))

    def _end_text(self, *, closed: bool) -> Parts:
        """End a run of text or thinking. ``closed`` says that ``<channel|>`` ends it."""
        parts = self._as_parts(self._detokenizer.finish())
        if not closed:
            parts += Parts(thinking=self._held_newline)
        self._channel_name, self._held_newline = None, ""
        return parts

    def _end_call(self) -> Parts:
        """End the open call, if any. Return it as a tool call, or as text when it is malformed."""
        ids, self._call, begun, self._begun = self._call, None, self._begun, None
        if ids is None or ids == begun:
            return Parts()
        pieces = [self._tokenizer.decode(piece) for piece in ids]
        call = parse_call(pieces) if self._reads_calls else None
        return Parts(text='"'.join(pieces)) if call is None else Parts(tool_calls=(call,))


def parse_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> Parts:
    """Return the parts of a whole answer, given its token ids."""
    parser = PartsParser(tokenizer)
    return parser.feed(ids) + parser.finish()


def parse_call(pieces: list[str]) -> ToolCall | None:
    """Parse the text ``call:name{...}`` of a tool call; return None when it is malformed.

    ``pieces`` is the text split at its string delimiters, so the pieces with odd indices are the strings. Keys are bare
    words or strings. Other values are objects, arrays, numbers, and true, false and null. The parser accepts the JSON
    and the Python spelling of the latter three, because a template may print ``None``.
    """
    head = _CALL.match(pieces[0])
    if head is None or len(pieces) % 2 == 0:
        return None
    try:
        parser = _ArgumentsParser([pieces[0][head.end() :], *pieces[1:]])
        arguments = parser.value()
        parser.end()
    except (ValueError, RecursionError):
        return None
    return ToolCall(head[1], arguments)


class _ArgumentsParser:
    """A recursive-descent parser of a call's arguments. All methods raise ``ValueError`` for malformed arguments."""

    def __init__(self, pieces: list[str]) -> None:
        """Split the pieces, of which those with odd indices are strings, into lexemes."""
        self._lexemes: list[tuple[str, str]] = []  # (kind, text) of the remaining lexemes, the next one last
        for n, piece in enumerate(pieces):
            self._lexemes += [("string", piece)] if n % 2 else _lexemes(piece)
        self._lexemes.reverse()

    def value(self) -> Any:
        """Parse one value."""
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
        """Check that no lexeme is left."""
        if self._lexemes:
            raise ValueError("text after the arguments")

    def _object(self) -> dict[str, Any]:
        """Parse the rest of an object after its ``{``."""
        values: dict[str, Any] = {}
        if self._skip("}"):
            return values
        while True:
            kind, key = self._next()
            if kind == "mark" or not self._skip(":"):
                raise ValueError("missing key")
            values[key] = self.value()
            if self._skip("}"):
                return values
            self._comma()

    def _array(self) -> list[Any]:
        """Parse the rest of an array after its ``[``."""
        values: list[Any] = []
        if self._skip("]"):
            return values
        while True:
            values.append(self.value())
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


def _lexemes(text: str) -> list[tuple[str, str]]:
    """Split text outside string delimiters into lexemes (kind, text).

    A lexeme is punctuation ("mark"), a string in JSON's own quotes ("string", unescaped), or a bare word ("word").
    """
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
