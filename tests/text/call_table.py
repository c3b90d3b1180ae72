"""Tool calls for tests: the table of docs/tool_calls.md, and random calls as lists of lexemes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "tool_calls.md"
QUOTE = '<|"|>'

Calls = list[tuple[str, dict[str, Any]]]


def table() -> list[tuple[str, dict[str, Calls]]]:
    """Return each row of the page: the block, and the calls that each program reads in it."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rows = []
    for _, block, *outcomes in cells[2:]:
        ours = _calls(outcomes[0], [])
        calls = [_calls(cell, ours) for cell in outcomes]
        rows.append((block.strip("`"), dict(zip(cells[0][2:], calls, strict=True))))
    return rows


def _calls(cell: str, ours: Calls) -> Calls:
    """Read a cell such as ``f {"a": 1}``; ``ours`` are the calls of a cell that says "the same"."""
    if cell in ("text", "no call", "the same"):
        return ours if cell == "the same" else []
    return [(name, json.loads(arguments)) for name, arguments in re.findall(r"`(\S+) (\{.*?\})`", cell)]


def same(left: Calls, right: Calls) -> bool:
    """Return whether calls are equal, also in the types and the order of their arguments."""
    return json.dumps(left) == json.dumps(right)


def lexemes(value: Any) -> list[str]:
    """Return the lexemes of an argument as the template writes it."""
    if isinstance(value, str):
        return [QUOTE, value, QUOTE]
    if isinstance(value, dict):
        items = [[key, ":", *lexemes(item)] for key, item in value.items()]
    elif isinstance(value, list):
        items = [lexemes(item) for item in value]
    else:
        return [json.dumps(value)]
    inside = [lexeme for n, item in enumerate(items) for lexeme in ([",", *item] if n else item)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return [opening, *inside, closing]
