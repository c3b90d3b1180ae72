"""Bounds on the work and the memory of a chat template, which is untrusted code.

A template cannot be interrupted from outside, so its own operations count: each repetition of a loop, each call, and
the characters and items of each value that an operation makes. Operations whose result may be much larger than their
arguments are checked before they run.
"""

from __future__ import annotations

import re
import string
import sys
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

# For each rendering. All three grow with the conversation.
_MOST_STEPS = 200_000  # repetitions and calls
_LARGEST = 1 << 22  # characters of one value
_MOST_BYTES = 1 << 28  # of all values together
_ITEM = 16  # an item of a list or a dict counts like this many characters
# Of the processor: a program that is suspended is not to blame. Ends what the counts do not, such as a million calls of
# a slow filter.
_MOST_SECONDS = 10.0
_WIDTHS = frozenset({
    "batch", "center", "expandtabs", "indent", "ljust", "rfind", "rindex", "rjust", "rpartition", "rsplit", "slice",
    "tojson", "translate", "wordwrap", "zfill",
})  # fmt: skip
# A width or precision of five digits, or one that is an argument.
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{5}|\d*\.(?:\*|\d{5}))")
_WIDE_SPEC = re.compile(r"\{|\d{5}")


class TooMuch(TemplateError):  # noqa: N818
    """A template takes more steps, time or memory than any chat template needs."""


class Budget:
    """What one rendering of a template may still use."""

    def __init__(self, size: int = 0) -> None:
        """Create the budget for a conversation of ``size`` characters."""
        self.largest = _LARGEST + 8 * size
        self._most_steps = self._steps = _MOST_STEPS + size
        self._most_bytes = self._bytes = _MOST_BYTES + 256 * size
        self._end = time.thread_time() + _MOST_SECONDS

    def step(self, size: int = 0) -> None:
        """Count one step, which makes a value of ``size`` bytes. Raises ``TooMuch`` when the budget is used up."""
        self._steps -= 1
        self._bytes -= max(size, 0)
        if self._steps < 0:
            raise TooMuch(f"it takes more than {self._most_steps:,} steps")
        if self._bytes < 0:
            raise TooMuch(f"it makes more than {self._most_bytes >> 20:,} MiB of text")
        if time.thread_time() > self._end:
            raise TooMuch(f"it takes more than {_MOST_SECONDS:.0f} s of the processor")

    def kept(self, value: Any) -> Any:
        """Return a value that an operation has made, after counting it."""
        if isinstance(value, (str, bytes)):
            self.check(len(value))
            self.step(sys.getsizeof(value))
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self.size(value)
            self.step(4 * _ITEM * len(value))  # bytes
        else:
            self.step()
        return value

    def check(self, size: int) -> None:
        """Raise ``TooMuch`` when a value of this size would be too large."""
        if size > self.largest:
            raise TooMuch(f"a value in it has more than {self.largest:,} characters")

    def size(self, value: Any) -> int:
        """Return the number of characters of a value, everything inside it included and ``_ITEM`` for each item.

        Raises ``TooMuch`` when that is more than ``largest``.
        """
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            inside: Iterable[Any] = ()
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, dict):
                inside = [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                inside = item
            elif isinstance(item, Namespace):
                inside = object.__getattribute__(item, "_Namespace__attrs").values()
            elif isinstance(item, int):
                total += item.bit_length() // 3
            self.check(total + _ITEM * len(waiting))
            before = len(waiting)
            waiting.extend(inside)
            total += _ITEM * (len(waiting) - before)
        return total

    def before_binop(self, operator: str, left: Any, right: Any) -> None:
        """Check ``left operator right`` before it is computed. The operator is ``*``, ``**``, ``+`` or ``%``."""
        if operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "+" and not isinstance(left, (int, float)):
            self.check(self.size(left) + self.size(right))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                self.check(left.bit_length() + right.bit_length())
            elif isinstance(left, int) or isinstance(right, int):
                value, times = (right, left) if isinstance(left, int) else (left, right)
                self.check(self.size(value) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.check(left.bit_length() * max(right, 0))

    def before_call(self, name: str, value: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Check a filter ``name`` of ``value``, or a method ``name`` of the text ``value``, before it is called."""
        self.step()
        given = [*arguments, *named.values()]
        if name == "replace" and len(given) >= 2:
            text, old, new = (str(part) for part in (value, *given[:2]))
            self.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join":
            separator, parts = (value, given[0]) if isinstance(value, str) and given else (given[:1], value)
            self.check(self.size(parts) + self.size(separator) * (len(parts) if hasattr(parts, "__len__") else 0))
        elif name == "format":
            self.check_percent(str(value), given)
        elif name in _WIDTHS:
            factors = (max(part, 1) if isinstance(part, int) else self.size(part) for part in given)
            self.check(self.size(value) * max(factors, default=1))
        elif name == "sum" and any(isinstance(part, (list, tuple)) for part in given):
            raise TooMuch("it adds up lists")
        elif name in ("string", "pprint", "escape", "e", "forceescape", "urlize", "xmlattr"):
            self.size(value)

    def check_percent(self, text: str, arguments: Any) -> None:
        """Check ``text % arguments`` before it is computed."""
        if _WIDE_PERCENT.search(text):
            raise TooMuch("it formats with a width of five digits or more")
        self.check(len(text) + text.count("%") * self.size(arguments))

    def check_format(self, text: str, arguments: Any) -> None:
        """Check ``text.format(arguments)`` before it is computed."""
        if any(_WIDE_SPEC.search(spec or "") for _, _, spec, _ in string.Formatter().parse(text)):
            raise TooMuch("it formats with a width of five digits or more")
        self.check(len(text) + text.count("{") * self.size(arguments))


current: ContextVar[Budget] = ContextVar("budget")
