"""A tolerant reading of tool calls with the faults that models make, for blocks that break the grammar.

In a canvas every position is written on its own, so a fault is a token that is doubled, missing, or another one of the
same meaning: a parenthesis for a brace, ``=`` for ``:``, another kind of quotes or none. All rules are here:

* Head. ``call:`` may be doubled, in whole or in part, or be missing, or lack its word or its colon. Without a colon,
  the bracket must follow the name at once. The arguments may stand in parentheses.
* Several calls may follow each other in a block. If one of them cannot be read, the whole block is text.
* Separators. Extra commas and colons are dropped; ``=`` is a colon. A colon may be missing before a string or bracket,
  and a comma after a bracket, or before the next key after a string. A colon without a value before a comma or closer
  means null.
* Opening brackets. A doubled ``{`` counts once.
* Closing brackets. Extra ``}`` and ``)`` after the arguments are dropped, unless another fault explains them too:
  ``{a:}}`` may stand for ``{a:{}}``. Missing closers are supplied where the text or an enclosing bracket ends, but only
  when they could have stood nowhere else: in ``{a:{b:1,c:2}`` the missing one may belong after ``b:1``.
* Strings. An odd number of delimiters is mended when two of them touch at exactly one place: that one is doubled.
  Strings may have single quotes, or none. One without quotes ends at a comma, bracket or line end, and holds no colon
  and no ``=``, except in a time or an address (``10:30``, ``https://...``).
* Numbers may be ``108.``, ``.5`` and ``+5``; digits after a leading zero are a string (``007``). A number too large for
  a float, ``NaN`` and ``Infinity`` are refused. Constants may have capitals.

Whatever breaks these rules, too, is not a call. The tests drop and double each lexeme of random calls: what is read
then is the call that was meant, or nothing, wherever the fault leaves a trace at all.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100  # deepest nesting of a call's brackets: bounds the recursion of both parsers

# The parts of a name, joined by single colons: "get_weather", "files.read", "server:tool".
_PART = r"""[^\s{}()\[\],=:;"'\0]+"""
NAME = rf"{_PART}(?::{_PART})*"

_SPACE = re.compile(r"\s*")
_PREFIX = re.compile(r"(?:call\s*)*:(?:\s|:|call\s*:)*")
_LONE_PREFIX = re.compile(r"call\s+")
_NAME = re.compile(NAME)
_COLONS = re.compile(r"[\s:]*")
_SEPARATOR = re.compile(r"[\s:=]*")
_LOST_DELIMITER = re.compile(r",[^,]*:|^\s*,|,\s*$")
_BETWEEN_CALLS = re.compile(r"[\s,;})]*")
_KEY = re.compile(r"""[^\s{}()\[\],:="'\0][^{}()\[\],:="'\0\n]*""")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SINGLE_QUOTED = re.compile(r"""'((?:[^'\\]|\\['\\])*)'(?=\s*(?:[,:=})\]]|\Z))""")
_BARE = {"{": re.compile(r'[^{}\[\],"\0\n]+'), "(": re.compile(r'[^{}()\[\],"\0\n]+')}  # by the call's opening bracket
_TIME = re.compile(
    r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}[T ])?[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?"
    r"(?: ?(?:Z|[+-][0-9]{2}:?[0-9]{2}|[AaPp][Mm]))?"
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(\.[0-9]*)?|(\.[0-9]+))([eE][+-]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def read_tolerantly(pieces: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls, as (name, arguments), of a block with faults; an empty list when it cannot be read.

    ``pieces`` is the block's text split at its string delimiters; no piece with an even index holds a NUL.
    """
    if len(pieces) % 2 == 0:
        touching = [n for n in range(1, len(pieces) - 1) if not pieces[n]]
        if len(touching) != 1:
            return []
        pieces = [piece for n, piece in enumerate(pieces) if n != touching[0]]
        if any(_LOST_DELIMITER.search(string) for string in pieces[1::2]):  # an empty string, and another fault
            return []
    try:
        return _Reader("\0".join(pieces[::2]), pieces[1::2]).calls()
    except ValueError:
        return []


class _Reader:
    """A scanner over a block's text. All methods raise ``ValueError`` when the text cannot be read."""

    def __init__(self, text: str, strings: list[str]) -> None:
        """Begin at the start of the text, in which each NUL stands for the next one of the strings."""
        self._text, self._strings, self._at = text, iter(strings), 0
        self._bracket = "{"  # opening bracket of the current call
        self._open: list[str] = []  # the characters that close each open bracket, the innermost last
        # The brackets closed since the last item, each as the number of closers that, missing, would leave its reading
        # open; and how many closers are missing here.
        self._closed: list[int] = []
        self._missing = 0
        self._closers = 0  # number of brackets closed since the last item
        self._may_lack_an_opener = False  # whether extra closers at the end may be right, and something else wrong

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Read all calls of the block."""
        found: list[tuple[str, dict[str, Any]]] = []
        while not found or self._at < len(self._text):
            name = self._head()
            found.append((name, self._arguments()))
            end = self._take(_BETWEEN_CALLS)
            if self._may_lack_an_opener and ("}" in end or ")" in end):
                raise ValueError("an extra closer, or another fault")
            self._settle()
        return found

    def _head(self) -> str:
        """Read a call up to its opening bracket, which is the next character then; return the call's name."""
        self._take(_SPACE)
        has_prefix = bool(self._take(_PREFIX))
        is_alone = not has_prefix and not self._take(_LONE_PREFIX)
        name = self._take(_NAME)
        colons = self._take(_COLONS) if has_prefix else ""
        self._bracket = self._text[self._at : self._at + 1]
        if not name or name == "call" or (is_alone and name.startswith("call")) or self._bracket not in _BARE:
            raise ValueError("not a call")
        self._may_lack_an_opener = ":" in colons  # "name:{a:1}}" may stand for "na{me:{a:1}}"
        return name

    def _arguments(self) -> dict[str, Any]:
        """Read the arguments of a call, from the opening bracket on."""
        self._at += 1
        while self._skip("{"):
            pass
        return self._object("}" if self._bracket == "{" else ")}")

    def _object(self, closers: str) -> dict[str, Any]:
        """Read the rest of an object after its opening bracket. Any of ``closers`` ends it."""
        self._enter(closers)
        values: dict[str, Any] = {}
        items = 0
        while not self._closes(items):
            if self._skip(","):
                items = max(items, 1)  # a pair may be lost before a first comma
                continue
            # In "{a:{b:{c:1}},d:2}}" the extra closer may be the last one, or the second one.
            self._may_lack_an_opener |= self._closers > 1 and "]" not in self._open
            self._settle()
            key = self._key()
            values[key], ends_itself = self._value_of_key()
            items += 1
            self._end_item(ends_itself)
        return values

    def _array(self) -> list[Any]:
        """Read the rest of an array after its ``[``."""
        self._enter("]")
        values: list[Any] = []
        while not self._closes(len(values)):
            if self._skip(","):
                continue
            self._settle()
            is_bracket = self._peek() in "{["
            values.append(self._value()[0])
            self._end_item(is_bracket)
        return values

    def _key(self) -> str:
        """Read a key and the colon after it. The colon may be missing before a string or bracket."""
        key = self._string()
        if key is None:
            key = self._take(_KEY).strip()
            if not key:
                raise ValueError("missing key")
        separator = self._take(_SEPARATOR)
        if not separator.strip() and (not self._peek() or self._peek() not in "\0\"'{["):
            raise ValueError("missing colon")
        return key

    def _value_of_key(self) -> tuple[Any, bool]:
        """Read the value after a key, as ``_value`` does; nothing before a comma or closer is null."""
        char = self._peek()
        if char and (char == "," or char in self._open[-1]):
            self._may_lack_an_opener |= char != ","  # "{a:}}" may stand for "{a:{}}"
            return None, False
        return self._value()

    def _value(self) -> tuple[Any, bool]:
        """Read a value. Return also whether it is a string or bracket, which shows where it ends."""
        text = self._string()
        if text is not None:
            return text, True
        if self._skip("{"):
            return self._nested_object(), True
        if self._skip("["):
            return self._array(), True
        bare = self._take(_BARE[self._bracket]).strip()
        return _bare_value(bare), False

    def _nested_object(self) -> dict[str, Any]:
        """Read the rest of a nested object after its ``{``. When this is doubled, so must be the ``}``."""
        doubled = self._skip("{")
        values = self._object("}")
        if doubled and not self._skip("}"):
            raise ValueError("doubled {")
        return values

    def _string(self) -> str | None:
        """Read a string in any quotes; return None, and read nothing, where none begins."""
        char = self._peek()
        if char == "\0":
            self._at += 1
            return next(self._strings)
        if char == '"':
            return str(json.loads(self._take(_JSON_STRING), strict=False))
        if char == "'":
            quoted = self._take(_SINGLE_QUOTED)
            if not quoted:
                raise ValueError("unclosed quotes")
            return re.sub(r"\\(.)", r"\1", quoted[1:-1])
        return None

    def _enter(self, closers: str) -> None:
        """Note an opened bracket."""
        self._open.append(closers)
        if len(self._open) > MAX_DEPTH:
            raise ValueError("nested too deep")

    def _closes(self, items: int) -> bool:
        """Return whether the innermost bracket, which holds this many items, ends here; remove it and its closer.

        It ends at its own closer, where an enclosing bracket is closed, and at the end of the text.
        """
        char, own = self._peek(), self._open[-1]
        if char and char not in own and not any(char in closers for closers in self._open[:-1]):
            return False
        self._open.pop()
        self._closers += 1
        if char and char in own:
            self._at += 1
        else:
            self._missing += 1
        # Closed earlier, the bracket would leave its later items to the next bracket of its kind around it. And a
        # first [ may be a doubled one.
        around = next((n for n, closers in enumerate(reversed(self._open), 1) if ("]" in closers) == (own == "]")), 0)
        if around and (items > 1 or own == "]"):
            self._closed.append(around)
        return True

    def _settle(self) -> None:
        """Check that the missing closers before this place could have stood nowhere else."""
        if any(around <= self._missing for around in self._closed):
            raise ValueError("missing brackets")
        self._closed, self._missing, self._closers = [], 0, 0

    def _end_item(self, ends_itself: bool) -> None:
        """Check that an item ends where its text does: before a comma or closer, unless it shows its end."""
        char = self._peek()
        if char and char != "," and not ends_itself and not any(char in closers for closers in self._open):
            raise ValueError("missing comma")

    def _peek(self) -> str:
        """Skip white space; return the next character, or nothing at the end."""
        self._take(_SPACE)
        return self._text[self._at : self._at + 1]

    def _skip(self, char: str) -> bool:
        """Skip white space, and this character if it is the next one; return whether it was."""
        found = self._peek() == char
        self._at += found
        return found

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Remove and return what the pattern matches here; nothing when it does not match."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]


def _bare_value(text: str) -> Any:
    """Return the constant, the number or the string that a text without quotes spells."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    number = _NUMBER.fullmatch(text)
    if number is not None:
        value = int(text) if number.group(1, 2, 3) == (None, None, None) else float(text)
        if value not in (float("inf"), float("-inf")):
            return value
    holds_a_separator = (":" in text or "=" in text) and not (_TIME.fullmatch(text) or _ADDRESS.fullmatch(text))
    if not text or number or holds_a_separator or text.startswith(("'", "`")) or _NO_NUMBER.fullmatch(text):
        raise ValueError("not a value")
    return text
