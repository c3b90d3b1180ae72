"""How gaps are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_mlx import DgemmaError, Gap
from dgemma_mlx.infill.template import lines_of, parse_gaps, shown


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a ___ b", ["a ", Gap(), " b"]),
        ("___", ["", Gap(), ""]),
        ("_____", ["", Gap(), ""]),  # a longer run is one gap
        ("x___:20___y", ["x", Gap(20), "y"]),
        ("___:3______", ["", Gap(3), "", Gap(), ""]),
        ("a{{fill: a docstring}}b", ["a", Gap(hint="a docstring"), "b"]),
        ("{{fill}}{{fill:}}", ["", Gap(), "", Gap(), ""]),
        ("__init__ ___", ["__init__ ", Gap(), ""]),
        ("___:x___", ["", Gap(), ":x", Gap(), ""]),
    ],
)  # fmt: skip
def test_gaps(text: str, parts: list[str | Gap]) -> None:
    assert parse_gaps(text) == parts


def test_another_mark() -> None:
    assert parse_gaps("a [?] ___ [?]:2[?]", "[?]") == ["a ", Gap(), " ___ ", Gap(2), ""]


@pytest.mark.parametrize("text", ["", "a text", "__ init", "{{fil}}", "___:0___"])
def test_no_gap_is_an_error_that_says_how(text: str) -> None:
    with pytest.raises(DgemmaError, match="gap") as caught:
        parse_gaps(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@given(st.lists(st.text(st.characters(exclude_characters="_{:"), min_size=1), min_size=2, max_size=6), st.data())
def test_what_is_around_the_gaps_is_kept(texts: list[str], data: st.DataObject) -> None:
    marks = {"___": Gap(), "___:7___": Gap(7), "{{fill: this}}": Gap(hint="this")}
    chosen = [data.draw(st.sampled_from(sorted(marks))) for _ in texts[1:]]
    written = texts[0] + "".join(mark + text for mark, text in zip(chosen, texts[1:], strict=True))
    parts = parse_gaps(written)
    assert parts[::2] == texts
    assert parts[1::2] == [marks[mark] for mark in chosen]


def test_the_model_sees_gaps_and_hints() -> None:
    assert shown(parse_gaps("a ___:4___ b {{fill: a name}}.")) == "a ___ b ___ (a name)."


def test_only_line_feeds_end_lines() -> None:
    assert lines_of("a\r\nb\x0bc\u2028d\n\ne") == ["a\r\n", "b\x0bc\u2028d\n", "\n", "e"]


def test_a_gap_with_a_count_of_5000_digits_is_one_error() -> None:
    with pytest.raises(DgemmaError, match="is too long") as caught:
        parse_gaps(f"A ___:{'9' * 5000}___")
    assert len(caught.value.message) < 200
