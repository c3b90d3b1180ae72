"""Tests of grammars: the texts they accept, and error messages that give the line."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma_mlx import Constraint, DgemmaError
from tests.constrain.small import text_of

POLITE = r"""
answer ::= greeting " " name+ ("!" | ".")?   # the first rule
greeting ::= "Hello" | 'Good ' [a-z]{3,8}
    | "\"\x41\u00e9\n"                       # continues the rule on a second line
name = [A-Z] [a-z]*; unused : .
"""


@pytest.mark.parametrize(
    ("text", "fits"),
    [("Hello Ann", True), ("Good morning Ann!", True), ("Hello AnnBob.", True), ('"Aé\n X', True), ("Hello", False),
     ("Hello ann", False), ("Good mo Ann", False), ("Hello Ann!.", False)],
)  # fmt: skip
def test_texts_that_a_grammar_accepts_and_rejects(text: str, fits: bool) -> None:
    assert Constraint.grammar(POLITE).automaton.matches(text.encode()) == fits


def test_arithmetic_with_written_out_levels() -> None:
    grammar = """
    sum ::= product (("+" | "-") product){0,2}
    product ::= factor ("*" factor)?
    factor ::= [1-9] [0-9]{0,2} | "(" [0-9] "+" [0-9] ")"
    """
    automaton, rng = Constraint.grammar(grammar).automaton, np.random.default_rng(0)
    for _ in range(100):
        assert isinstance(eval(text_of(automaton, rng)), int)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [("a ::= a", "line 1: recursion is not supported: a -> a"),
     ("a ::= b\nb ::= 'x' a | 'y'", "line 2: .* a -> b -> a"),
     ("a ::= (", "not closed"), ("a ::= ?", "no item before"), ("", "no rule"), ("a ::= b", "rule b does not exist"),
     ("x", "outside any rule"), ("a ::= 'x' )", r"unexpected \)"), ("\na ::= 'abc", "line 2: .*not valid syntax"),
     ("a ::= 'x'; 'y'", "outside any rule"),
     ("a ::= 'x'\na ::= 'y'", "defined twice"), (r"a ::= '\q'", "not a valid escape"),
     ("a ::= []", "class"), ("a ::= [^]", "class"), ("a ::= [z-a]", "compiled"), (r"a ::= '\ud800'", "Unicode"),
     (3, "text"), ("a ::= 'x'{9999}{9999}", "too large")],
)  # fmt: skip
def test_an_error_gives_the_line_and_the_problem(grammar: str, says: str) -> None:
    with pytest.raises(DgemmaError, match=says) as caught:
        Constraint.grammar(grammar)
    assert caught.value.exit_code == 2
