"""Errors are one line that can be seen, whatever is quoted in them."""

from __future__ import annotations

import pytest

from dgemma_mlx.checks import reason
from dgemma_mlx.errors import DgemmaError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no folder é 日本 '\U0001f642'", "there is no folder é 日本 '\U0001f642'"),
        ("two\nlines\r\x1b]0;title\x07", "two\\nlines\\r\\x1b]0;title\\x07"),
        ("\u202eright to left, \u2028 and \ud800", "\\u202eright to left, \\u2028 and \\ud800"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    error = DgemmaError(text, text)
    assert (error.message, error.hint, str(error)) == (shown, shown, shown)


@pytest.mark.parametrize("character", ["x", "\x1b", "\ud800"])
def test_a_long_text_is_cut_in_its_middle(character: str) -> None:
    message = DgemmaError(f"cannot read {character * 100_000}: it is a folder").message
    assert len(message) <= 500
    assert message.startswith("cannot read ")
    assert message.endswith(": it is a folder")
    assert "…" in message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (ValueError("first\nsecond"), "first"),
        (RuntimeError("\n  [load] failed\n"), "[load] failed"),
        (RuntimeError(), "RuntimeError"),
        (OSError("no number"), "no number"),
    ],
)
def test_the_reason_of_an_exception_is_one_line_without_a_number(error: Exception, expected: str) -> None:
    assert reason(error) == expected
