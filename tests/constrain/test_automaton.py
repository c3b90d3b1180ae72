"""Tests of automata: they accept the same texts as Python's ``re``."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx import Constraint, DgemmaError
from tests.constrain.small import automaton_of_regex, text_of

REGEXES = (
    "a|ab", "ab|a", "(a|ab)(c|bcd)", "a*?b", "a??", "", "a*", "(a*)*", "(ab|ba)*", "[^a]", "a{2,4}", "(a|b){3}c?",
    "a.c", "[a-c]+-[0-9]{2}", "(?i:aB)c", "(?:)", "a+b+|b+a+", "é+", "[à-ü]b",
    "x|.{0,2}é", r"[0-9]+(\.[0-9]+)?", "日本|日.",
)  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_that_match_and_texts_that_do_not(regex: str) -> None:
    automaton, machine = automaton_of_regex(regex), Constraint.regex(regex).machine
    rng = np.random.default_rng(0)
    alphabet = np.array(list("abcxé1.-à日本\n"))
    texts = ["", *("".join(rng.choice(alphabet, rng.integers(1, 6))) for _ in range(300))]
    texts += [text_of(machine, rng, 8).decode() for _ in range(50)]
    for text in texts:
        whole = re.fullmatch(regex, text) is not None
        assert automaton.matches(text.encode()) == machine.matches(text.encode()) == whole, text


@pytest.mark.parametrize(
    "regex", ["^a|b$", "^a|b", "(a|b)$", r"^\$$", r"\\$", "^^a", "(^a|b$)", "a(?:$|$)|^b", "(?:^|)a"]
)
def test_anchors_around_a_regular_expression_have_no_effect(regex: str) -> None:
    automaton = automaton_of_regex(regex)
    for text in ("a", "b", "$", "\\", "\\$", "ab", "a$", ""):
        whole = re.fullmatch(regex, text) is not None
        assert automaton.matches(text.encode()) == whole, text


@pytest.mark.parametrize(
    ("regex", "says"),
    [("(", "compiled"), ("a)(b|c", "compiled"), ("a)|(b", "compiled"), ("a{2,1}", "compiled"), (r"\bword", "compiled"),
     ("(?=a)b", "no text"), (r"(a)\1", "compiled"), ("[^\\x00-\\x{10FFFF}]", "matches no character"),
     ("[", "compiled")],
)  # fmt: skip
def test_an_expression_that_cannot_be_compiled_is_one_error(regex: str, says: str) -> None:
    with pytest.raises(DgemmaError, match=says) as caught:
        Constraint.regex(regex)
    assert caught.value.exit_code == 2


@given(texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=15)
def test_choices_are_taken_literally(texts: list[str]) -> None:
    constraint = Constraint.choice(texts)
    rng = np.random.default_rng(0)
    assert {text_of(constraint.machine, rng).decode() for _ in range(40)} <= set(texts)
    assert all(map(constraint.matches, texts))


@pytest.mark.parametrize("choices", [5, [], "yes,no", [1], ["\ud800"]])
def test_invalid_choices_are_rejected(choices: object) -> None:
    with pytest.raises(DgemmaError):
        Constraint.choice(choices)  # type: ignore[arg-type]
