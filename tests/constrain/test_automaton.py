"""Tests of automata: they accept the same texts as Python's ``re``."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.regex import integers, quoted
from tests.constrain.small import text_of

REGEXES = (
    "a|ab", "ab|a", "(a|ab)(c|bcd)", "a*?b", "a??", "", "a*", "(a*)*", "(ab|ba)*", "[^a]", "a{2,4}", "(a|b){3}c?",
    "a.c", "[a-c]+-[0-9]{2}", "(?i:aB)c", "(?:)", "a+b+|b+a+", "é+", "[à-ü]b",
    "x|.{0,2}é", r"[0-9]+(\.[0-9]+)?", "日本|日.",
)  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_that_match_and_texts_that_do_not(regex: str) -> None:
    automaton = Constraint.regex(regex).automaton
    rng = np.random.default_rng(0)
    alphabet = np.array(list("abcxé1.-à日本\n"))
    texts = ["", *("".join(rng.choice(alphabet, rng.integers(1, 6))) for _ in range(300))]
    texts += [text_of(automaton, rng, 8).decode() for _ in range(50)]
    for text in texts:
        assert automaton.matches(text.encode()) == (re.fullmatch(regex, text) is not None), text
    for state, completion in enumerate(automaton.completions()):
        end = automaton.after(state, completion)
        assert end >= 0 and automaton.accepting[end]


@pytest.mark.parametrize(
    "regex", ["^a|b$", "^a|b", "(a|b)$", r"^\$$", r"\\$", "^^a", "(^a|b$)", "a(?:$|$)|^b", "(?:^|)a"]
)
def test_anchors_around_a_regular_expression_have_no_effect(regex: str) -> None:
    automaton = Constraint.regex(regex).automaton
    for text in ("a", "b", "$", "\\", "\\$", "ab", "a$", ""):
        whole = re.fullmatch(regex, text) is not None
        assert automaton.matches(text.encode()) == whole, text


@pytest.mark.parametrize(
    ("regex", "says"),
    [("(", "compiled"), ("a)(b|c", "compiled"), ("a)|(b", "compiled"), ("a{2,1}", "compiled"), (r"\bword", "compiled"),
     ("(?=a)b", "compiled"), (r"(a)\1", "compiled"), ("[^\\x00-\\x{10FFFF}]", "no character matches"),
     ("a{30000}", "too large"), ("[", "compiled")],
)  # fmt: skip
def test_an_expression_that_cannot_be_compiled_is_one_error(regex: str, says: str) -> None:
    with pytest.raises(DgemmaError, match=says) as caught:
        Constraint.regex(regex)
    assert caught.value.exit_code == 2


@given(bounds=st.tuples(st.integers(-1200, 1200), st.integers(0, 1500)))
@settings(max_examples=40, deadline=None)
def test_ranges_of_integers(bounds: tuple[int, int]) -> None:
    least, most = bounds[0], bounds[0] + bounds[1]
    matcher = re.compile(integers(least, most))
    for number in range(least - 30, most + 31):
        assert (matcher.fullmatch(str(number)) is not None) == (least <= number <= most)
    for text in ("-0", "01", "+1", "", "-"):
        assert not matcher.fullmatch(text)


@given(texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_choices_are_taken_literally(texts: list[str]) -> None:
    automaton = Constraint.choice(texts).automaton
    rng = np.random.default_rng(0)
    assert {text_of(automaton, rng).decode() for _ in range(40)} <= set(texts)
    for text in texts:
        assert automaton.matches(text.encode())
        assert re.fullmatch(quoted(text), text)


@pytest.mark.parametrize("choices", [[], "yes,no", [1], ["\ud800"]])
def test_invalid_choices_are_rejected(choices: object) -> None:
    with pytest.raises(DgemmaError):
        Constraint.choice(choices)  # type: ignore[arg-type]
