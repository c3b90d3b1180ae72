"""Tests of reading JSON from outside, and of quoting what it held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import MOST_DEPTH, parse_json, read_json


@pytest.mark.parametrize("text", ['\ufeff{"a": [1, 2.5]}', '\ufeff{"a": [1, 2.5]}'.encode(), b'{"a": [1, 2.5]}'])
def test_a_byte_order_mark_is_ignored(text: str | bytes) -> None:
    assert parse_json(text) == {"a": [1, 2.5]}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nope", b"\xff", b"\x00", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, f"[-{'9' * 22}]",
        r'"\ud800"', r'{"\udfff": 1}', "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_what_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_the_greatest_depth_and_the_largest_integers_are_read(opening: str, closing: str) -> None:
    parse_json(opening * MOST_DEPTH + "18446744073709551616" + closing * MOST_DEPTH)
    assert parse_json(r'["\ud83d\ude00", -18446744073709551616]') == ["😀", -(2**64)]


def test_a_file_that_holds_no_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(DgemmaError, match=r"has no config\.json"):
        read_json(path)
    for content in (b"[]", b"{", b"\xff\xfe{}", b"[" * 10**6):
        path.write_bytes(content)
        with pytest.raises(DgemmaError, match=r"config\.json") as caught:
            read_json(path)
        assert caught.value.hint
    with pytest.raises(DgemmaError, match="cannot read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10**6, "\x1b[2J\u202e" * 50, 10**10_000, [[1] * 1000] * 1000, {"a": "b" * 1000}, 1e300, "\ud800",
        b"\0" * 99,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_quoted_value_is_short_and_visible(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
