"""Tests of reading tool calls: well-formed ones exactly, faulty ones as they were meant or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx.text.call_repair import MAX_DEPTH, read_tolerantly
from dgemma_mlx.text.tool_calls import parse_calls
from tests.text.call_table import QUOTE, Calls, lexemes, same, table

_KEYS = st.sampled_from(["a", "b", "city", "max_days", "x-y", "callee"])
_STRINGS = st.text(alphabet=st.sampled_from("ab ,:{}[]()='\"\\\n1é東"), max_size=8)
_NUMBERS = st.integers(-(10**20), 10**20) | st.sampled_from([0.5, -1e300, 2.5e-7, 1e21, 100.0])
_VALUES = st.recursive(
    _STRINGS | _NUMBERS | st.sampled_from([True, False, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=5,
)
_ARGUMENTS = st.dictionaries(_KEYS, _VALUES, max_size=3)
_CALLS = st.tuples(st.sampled_from(["f", "get_weather", "files.read", "a:b-c", "callback", "名"]), _ARGUMENTS)


def pieces_of(lexemes: list[str]) -> list[str]:
    """Return the text of lexemes, split at its string delimiters."""
    pieces = [""]
    for lexeme in lexemes:
        if lexeme == QUOTE:
            pieces.append("")
        else:
            pieces[-1] += lexeme
    return pieces


def parse(text: str) -> Calls:
    return parse_calls(text.split(QUOTE))


@settings(max_examples=80)
@given(_CALLS)
def test_calls_written_as_by_the_template_come_back(call: tuple[str, dict[str, Any]]) -> None:
    """They do in both readings, so that a fault in one place does not change what stands in another."""
    pieces = pieces_of(["call", ":", call[0], *lexemes(call[1])])
    assert same(parse_calls(pieces), [call])
    if not call[0].startswith("call"):
        assert same(read_tolerantly(pieces), [call])


@settings(max_examples=80)
@given(_CALLS, _CALLS)
def test_faults_of_the_shell_do_not_change_the_call(
    call: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    name, arguments = call
    body = lexemes(arguments)
    inside = body[1:-1]
    pairs = {key: lexemes(item) for key, item in arguments.items()}
    with_equals = [part for key, item in pairs.items() for part in (key, "=", *item, ", ")][:-1]
    with_commas = [part for key, item in pairs.items() for part in (",", key, ":", *item, ",")]
    in_json = [part for key, item in pairs.items() for part in (f'"{key}"', ": ", *item, ", ")][:-1]
    damaged = [
        ["call", ":", name, "{", *body, "}"],
        ["call", ":", name, "{", *body],
        ["call", ":", "call", ":", name, *body],
        ["call", "call", ":", name, *body],
        [":", name, *body],
        ["call", ":", ":", name, *body],
        ["call", ":", name, "(", *inside, ")"],
        ["call", ":", name, "(", *with_equals, ")"],
        ["call", ":", name, "(", *body, ")"],
        ["call", ":", name, "{", *with_equals, "}"],
        ["call", ":", name, "{", *with_commas, "}"],
        ["call", ":", name, "{", *in_json, "}"],
        *([["call ", name, *body], [name, *body]] if not name.startswith("call") else []),
    ]
    for faulty in damaged:
        assert same(parse_calls(pieces_of(faulty)), [call]), faulty
    both = ["call", ":", name, *body, "call", ":", other[0], *lexemes(other[1])]
    assert same(parse_calls(pieces_of(both)), [call, other])
    for faulty in ([*damaged[4], "}"], ["call", ":", name, *body[:-1]]):  # other faults may explain these, too
        assert parse_calls(pieces_of(faulty)) == [] or same(parse_calls(pieces_of(faulty)), [call])


@settings(max_examples=200)
@given(_ARGUMENTS.filter(bool), st.data())
def test_a_lexeme_too_many_or_too_few_gives_the_call_that_was_meant_or_none(
    arguments: dict[str, Any], data: st.DataObject
) -> None:
    """Only faults that leave no trace are left out: names, keys and values that are longer, shorter or missing."""
    written = ["call", ":", "f", *lexemes(arguments)]
    marks = [n for n, lexeme in enumerate(written) if lexeme in (*"{}[]:,", QUOTE, "call")]
    place = data.draw(st.sampled_from(marks))
    in_string = written[:place].count(QUOTE) % 2 == 1 and written[place] != QUOTE
    if in_string:
        return
    for copies in (0, 2):
        if written[place] == "," and copies == 0:
            continue  # "[1,2]" without its comma is "[12]"
        faulty = written[:place] + [written[place]] * copies + written[place + 1 :]
        found = parse_calls(pieces_of(faulty))
        assert found == [] or same(found, [("f", arguments)]), "".join(faulty)


@settings(max_examples=40)
@given(_ARGUMENTS)
def test_a_last_brace_too_many_or_too_few_in_flat_arguments_is_mended(arguments: dict[str, Any]) -> None:
    flat = {key: value for key, value in arguments.items() if not isinstance(value, (dict, list))}
    written = ["call", ":", "f", *lexemes(flat)]
    assert same(parse_calls(pieces_of([*written, "}"])), [("f", flat)])
    assert same(parse_calls(pieces_of(written[:-1])), [("f", flat)])


@pytest.mark.parametrize(("block", "outcomes"), table())
def test_the_table_of_the_documentation_is_right(block: str, outcomes: dict[str, Calls]) -> None:
    assert same(parse(block), outcomes["dgemma-mlx"])


def test_the_table_names_the_faults_that_are_known() -> None:
    assert len(table()) >= 40


@pytest.mark.parametrize(
    ("block", "calls"),
    [
        ("call:f{a:+5,b:.5,c:-1.,d:-.5e2}", [("f", {"a": 5, "b": 0.5, "c": -1.0, "d": -50.0})]),
        ("call:f{a:[Rome, New York,]}", [("f", {"a": ["Rome", "New York"]})]),
        ("call:f{a:Rome (Italy)}", [("f", {"a": "Rome (Italy)"})]),
        ("call:f(a=Rome (Italy))", []),
        ("call:f{a:it's}", [("f", {"a": "it's"})]),
        (r"call:f{a:'it\'s',b:1}", [("f", {"a": "it's", "b": 1})]),
        ("call:f{a:'it's'}", []),
        ("call:f{a:'x}", []),
        ("call:f{at:2026-01-02 10:30:00Z}", [("f", {"at": "2026-01-02 10:30:00Z"})]),
        ("call:f{a:{{b:1}},c:2}", [("f", {"a": {"b": 1}, "c": 2})]),
        ("call:f{a:{{b:1},c:2}", []),
        ("call:f{a:[{b:1,c:2},{b:3,c:4}]", [("f", {"a": [{"b": 1, "c": 2}, {"b": 3, "c": 4}]})]),
        ("call:f{a:[{b:1,c:2}", []),  # "]}" may be missing after "b:1", too
        ("call:f{a:[[1]}", []),
        ("call:f{a:}}", []),  # may be "{a:{}}"
        ("call:f{a:{b:{c:1}},d:2}}", []),
        ("call:f{a:", []),
        ("call:f{a:1}}}})", [("f", {"a": 1})]),
        ("call:f{a:1}]", []),
        ("call:f{a:1}; call:g{} , h{}", [("f", {"a": 1}), ("g", {}), ("h", {})]),
        ("call:f{a:1}call:g{b}", []),
        ("callback{a:1}", []),  # or "call:back"
        ("call:call{a:1}", [("call", {"a": 1})]),
        ("call:f:{a:1}", [("f", {"a": 1})]),
        ("call:f{a:Infinity}", []),
        ("call:f{a:-nan}", []),
        ("call:f{a:" + "9" * 5000 + "}", []),
        ("call:f{a:1\0}", []),
        (r'call:f{a:"\ud83e\udd8a"}', [("f", {"a": "🦊"})]),
        (r'call:f{a:"\ud83e"}', []),
        (r'call:f{a:"\ud83e",}', []),
        ('{"name": "f", "arguments": {}}', []),
        ("Rain (see: page 3)", []),
    ],
)
def test_further_faults(block: str, calls: Calls) -> None:
    assert same(parse(block), calls)


@pytest.mark.parametrize("opening", ["{a:", "["])
def test_nesting_is_bounded_in_both_readings(opening: str) -> None:
    closing = "}" if opening[0] == "{" else "]"

    def block(depth: int, end: str) -> str:
        return "call:f{a:" + opening * (depth - 1) + closing * (depth - 1) + end

    for end in ("}", ",}"):
        depth = MAX_DEPTH - (opening[0] == "{")
        text = block(depth, end).replace("a:}", "a:1}")
        assert len(parse(text)) == 1
        assert parse(block(MAX_DEPTH + 1, end).replace("a:}", "a:1}")) == []


@pytest.mark.parametrize(
    "block",
    [
        "call:f{" + "[" * 100_000,
        "call:f{a:" + "{a:" * 33_000,
        "call:" * 20_000,
        "call " * 20_000,
        ": " * 50_000,
        "a:" * 50_000,
        "call:f{" + "'a," * 30_000,
        'call:f{"' + "\\" * 100_000,
        "call:f{a:" + "1:" * 50_000 + "}",
        "call:f{" + "a:'x'   \n" * 10_000 + "!",
        "call:f{" + "\n" * 100_000 + "!",
        "call:f{}" * 12_000 + "!",
        "call:f{" + "a:1," * 25_000 + "!",
        "call:f{a:1" + "}" * 100_000 + "!",
        "call:f{a:[" + "[]," * 30_000 + ":",
        "call:f{a:" + (QUOTE + "," + QUOTE) * 20_000 + "}",
        QUOTE * 99_999,
    ],
    ids=range(17),
)
def test_hostile_blocks_take_linear_time(block: str) -> None:
    """A reading in quadratic time would take minutes here."""
    assert parse(block) == []
