"""Separation of an answer into visible text, thinking and tool calls.

Gemma 4 encloses its thinking in ``<|channel>thought\\n...<channel|>`` and writes a tool call as
``<|tool_call>call:name{key:<|"|>text<|"|>,n:3}<tool_call|>``. The parser recognises this markup by token ids, not by
text. Text that only looks like markup therefore stays text, and no control token ever reaches the reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dgemma_mlx.text.detokenize import Detokenizer
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.text.tool_calls import parse_calls

_CHANNEL_NAME = "thought\n"  # the first line of a channel of thinking


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the model requests.

    The text ``call:get_weather{city:<|"|>Rome<|"|>,days:3}`` becomes
    ``ToolCall("get_weather", {"city": "Rome", "days": 3}, "call_0")``.

    Attributes:
        name: Name of the tool.
        arguments: Arguments by name. The values are JSON values: dict, list, str, int, float, bool or None. They are
            not checked against the tool's parameters.
        id: The call's id, which the message with the tool's result repeats as its ``tool_call_id``.
    """

    name: str
    arguments: dict[str, Any]
    id: str


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
    tool call when the call is complete. What is not a call becomes visible text, in which ``"`` replaces the string
    delimiter ``<|"|>``; ``tool_calls.py`` and ``call_repair.py`` say what a call is. A call without a closing token is
    parsed when the next call begins or the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, call_prefix: str = "call_", *, reads_calls: bool = True) -> None:
        """Create a parser for one answer. The ids of its calls are ``call_prefix`` and the call's number, from 0.

        Without ``reads_calls``, what looks like a call is text.
        """
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._open_channel, self._close_channel = special.get("<|channel>"), special.get("<channel|>")
        self._open_call, self._close_call = special.get("<|tool_call>"), special.get("<tool_call|>")
        self._quote = special.get('<|"|>')
        self._detokenizer = Detokenizer(tokenizer)
        self._thinking = False
        # Text after <|channel> that may still be the channel's name; None when it is known.
        self._channel_name: str | None = None
        # A newline at the end of the thinking so far. It is markup if the channel closes right after it.
        self._held_newline = ""
        self._call: list[list[int]] | None = None  # ids of the open call, split at the string delimiters
        self._call_prefix, self._calls = call_prefix, 0
        self._reads_calls = reads_calls

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

    def finish(self, *, is_cut: bool = False) -> Parts:
        """Return the parts that the parser still holds back. Unclosed thinking stays thinking.

        ``is_cut`` says that the answer was cut off, so that an unclosed call is incomplete: it becomes text.
        """
        return self._end_call(is_cut) + self._end_text(closed=False)

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

        Thinking omits a first line that is the channel's name, ``thought``, and the newline before ``<channel|>``.
        """
        if not self._thinking:
            return Parts(text=text)
        if self._channel_name is not None:
            text = self._channel_name + text
            if _CHANNEL_NAME.startswith(text):
                self._channel_name = text
                return Parts()
            self._channel_name = None
            text = text.removeprefix(_CHANNEL_NAME)
        text = self._held_newline + text
        self._held_newline = "\n" if text.endswith("\n") else ""
        return Parts(thinking=text.removesuffix("\n"))

    def _end_text(self, *, closed: bool) -> Parts:
        """End a run of text or thinking. ``closed`` says that ``<channel|>`` ends it."""
        parts = self._as_parts(self._detokenizer.finish())
        if self._channel_name is not None and self._channel_name.rstrip("\n") != _CHANNEL_NAME.rstrip("\n"):
            parts += Parts(thinking=self._channel_name)
        if not closed:
            parts += Parts(thinking=self._held_newline)
        self._channel_name, self._held_newline = None, ""
        return parts

    def _end_call(self, is_cut: bool = False) -> Parts:
        """End the open block of calls, if any. Return its calls, or its text when it is not a call or is cut off."""
        ids, self._call = self._call, None
        if ids is None:
            return Parts()
        pieces = [self._tokenizer.decode(piece) for piece in ids]
        found = parse_calls(pieces) if self._reads_calls and not is_cut else []
        if not found:
            return Parts(text='"'.join(pieces))
        first, self._calls = self._calls, self._calls + len(found)
        calls = [ToolCall(*call, f"{self._call_prefix}{number}") for number, call in enumerate(found, first)]
        return Parts(tool_calls=tuple(calls))


def parse_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> Parts:
    """Return the parts of a whole answer, given its token ids."""
    parser = PartsParser(tokenizer)
    return parser.feed(ids) + parser.finish()
