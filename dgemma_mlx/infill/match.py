"""Where a regular expression from outside matches a text, within a bound of time."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

_SECONDS = 2  # of processor time
# Python's re cannot be stopped in a thread, so a process of its own searches: it takes some 20 ms and no model.
_SEARCH = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
pattern, text, begin, end = json.load(sys.stdin)
print(json.dumps([found.span() for found in re.compile(pattern).finditer(text, begin, end) if found[0]]))
"""


def matches(pattern: str, text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where the pattern matches ``text[begin:end]``, in characters of the text, without empty matches.

    Raises ``DgemmaError`` (exit code 2) for what is not a regular expression, and for one whose search takes longer
    than two seconds of processor time, as ``(a+)+$`` does.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, TypeError, ValueError, MemoryError) as error:
        raise DgemmaError(
            f"not a regular expression: {shown(pattern)}: {reason(error)}",
            "The syntax is that of Python's re module.", exit_code=2,
        ) from None
    searched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SEARCH], input=json.dumps([pattern, text, begin, end]).encode(),
        capture_output=True, check=False,
    )  # fmt: skip
    if searched.returncode:
        raise DgemmaError(
            f"the search for {shown(pattern)} takes too long", "Avoid a repetition within a repetition.", exit_code=2
        )
    return [(start, stop) for start, stop in parse_json(searched.stdout)]
