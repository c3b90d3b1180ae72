"""Strings of schemas: formats against ``jsonschema``'s checkers, and patterns as ECMAScript and Python read them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint, DgemmaError
from dgemma_mlx.constrain.ecma import read_search
from dgemma_mlx.constrain.formats import FORMATS
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.leaf import Letters, bytes_of, sets_of, term_of, utf8
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.terms import Terms
from tests.constrain.small import text_of


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_texts_of_a_format_are_valid(name: str) -> None:
    machine, rng = of_regex(FORMATS[name]), np.random.default_rng(0)
    validator = Draft202012Validator({"format": name}, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for _ in range(12):
        validator.validate(text_of(machine, rng, 60).decode())


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [("date", ["2020-02-29", "2000-12-31", "1999-01-01"], ["1900-02-29", "2023-02-29", "0000-01-01", "2023-13-01"]),
     ("time", ["23:59:59Z", "00:00:00.5+05:30"], ["24:00:00Z", "12:00:00"]),
     ("ipv4", ["0.0.0.0"], ["256.1.1.1", "01.1.1.1"]),
     ("ipv6", ["::", "1::2:3", "2001:db8::ff00:42:8329", "::ffff:1.2.3.4", "1:2:3:4:5:6:7:8"],
      ["1::2::3", "12345::", ":1"]),
     ("hostname", ["example.com", "a", "a-b.c1"], ["-a", "a-", "a..b", "a_b", "a" * 64]),
     ("uri", ["http://example.com:80/a?b#c", "urn:isbn:12", "mailto:a@b.c"], ["//a", "a b:c", "http://[", "1:x"]),
     ("uri-reference", ["", "a/b", "#x", "/a:b", "//h/p", "http://h"], ["a b", "\\"]),
     ("duration", ["P1Y2M", "PT3H", "P4W"], ["P", "P1", "PT"]),
     ("json-pointer", ["", "/a/~0~1"], ["a", "/~2"]),
     ("uri-template", ["/a/{b}{?c,d*}"], ["{", "{}"]), ("byte", ["", "YQ==", "YWI="], ["YQ="]),
     ("uuid4", ["00000000-0000-4000-8000-000000000000"], ["00000000-0000-1000-8000-000000000000"])],
)  # fmt: skip
def test_texts_that_are_in_a_format_and_texts_that_are_not(name: str, fits: list[str], does_not: list[str]) -> None:
    machine = of_regex(FORMATS[name])
    assert [text for text in (*fits, *does_not) if machine.matches(text.encode())] == fits


PATTERNS = (
    r"^\d+$", r"^\w+$", r"^\W$", r"^[^\d]$", r"^\S+$", r"^.{2,4}$", r"^[\w.-]+$", r"^(?!foo).*$", r"\d\s\d",
    r"^\u00e9$", r"^(?=.*\d)(?=.*[a-z]).{3,5}$", r"^[^\s@]+@[^\s@]+$", r"a{2,}b|^c", r"^a{b$",
    r"^\$\{.*\}$", r"^[\]x~y]+$",
    r"^[&|~-]+$", r"^(?i:abc)$", r"(?i)^é[a-c]$", r"^\/x\/$", r"^(?!.*--)[a-z-]+$", r"^((?!x)a|b)c$", r"^[^\W5]+$",
    r"^[^\S]\s[\Sa]$",
    r"^(?!\d)(?!.*[^\w]).+$", r"\Afoo\Z",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(st.sampled_from("ab1 é²٣\n\u2028\u00a0\ufeff_-.@xfoc${}/&|~]\x1c\x85B"), max_size=6),
    st.sampled_from(["foo", "abc", "ab1", "2 3", "a@b", "a--b", "ABC", "ÉB", "${x}", "/x/", "bc", "xa", "a{b", "aab"]),
)


def search(pattern: str, *, wide: bool) -> Machine:
    """Return the machine of the texts in which a pattern is found."""
    tree, terms = read_search(pattern, wide=wide), Terms(BYTES)
    letters = Letters(sets_of(tree))
    return Machine(terms, bytes_of(letters, term_of(letters, tree), terms, utf8(terms)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_read_narrowly_is_within_pythons_and_read_widely_around_it(pattern: str) -> None:
    narrow, wide, found = search(pattern, wide=False), search(pattern, wide=True), re.compile(pattern).search

    @given(TEXTS)
    @settings(max_examples=60)
    def check(text: str) -> None:
        if narrow.matches(text.encode()):
            assert found(text)
        elif not wide.matches(text.encode()):
            assert not found(text)

    check()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("(?<=a)b", "begins no group"), (r"\bword", "is not supported"), (r"(a)\1", "is not supported"),
     ("[", "is not closed"), ("a{,5}", "for some readers"), ("a**", "is repeated"),
     ("(?:(?=a)b)+", "within a repetition"),
     ("[z-a]", "before it begins"), (r"\p{Nothing}", "malformed"), ("a)", "was not opened"), ("\\", "last character"),
     (r"\u{110000}", "not a character")],
)  # fmt: skip
def test_a_pattern_that_cannot_be_read_is_one_error(pattern: str, says: str) -> None:
    with pytest.raises(DgemmaError, match=says) as caught:
        Constraint.json_schema({"type": "string", "pattern": pattern})
    assert caught.value.exit_code == 2 and "/pattern" in caught.value.message


def test_patterns_lengths_and_formats_are_combined() -> None:
    schema = {"type": "string", "pattern": "^[a-f]", "minLength": 3, "maxLength": 4, "format": "hostname"}
    constraint = Constraint.json_schema(schema)
    texts = ['"abc"', '"f-9z"', '"ab"', '"abcde"', '"gab"', '"ab-"']
    assert [text for text in texts if constraint.matches(text)] == texts[:2]
