"""Tests of parsing an answer: text, thinking and tool calls are separated by token ids, in any chunks."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from dgemma_mlx.text import Parts, PartsParser, Tokenizer, ToolCall, parse_parts
from tests.text.gemma_like import SPECIAL, random_text, random_value


def _call(name: str, arguments: dict[str, Any] | None = None, number: int = 0) -> ToolCall:
    return ToolCall(name, arguments or {}, f"call_{number}")


def _parse(tokenizer: Tokenizer, text: str) -> Parts:
    return parse_parts(tokenizer, tokenizer.encode_control(text))


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("Plain <b>text</b>.<turn|>", Parts("Plain <b>text</b>.")),
        ("<|channel>thought\nHm,\nyes.\n<channel|>Done.<turn|><eos>", Parts("Done.", "Hm,\nyes.")),
        ("<|channel>thought\n<channel|>Done.", Parts("Done.")),
        ("<|channel>thought<channel|>Done.", Parts("Done.")),
        ("<|channel>thought\n\n\n<channel|>Done.", Parts("Done.", "\n")),
        ("<|channel>not a name<channel|>Done.", Parts("Done.", "not a name")),
        ("<|channel>thought\nstill going\n", Parts("", "still going\n")),
        ("<|channel>thought", Parts()),
        ("<|channel>Hmm\nyes\n<channel|>x", Parts("x", "Hmm\nyes")),
        ("<|channel>thoughts\n<channel|>x", Parts("x", "thoughts")),
        ("<|channel>thought of it\n<channel|>x", Parts("x", "thought of it")),
        ("<|channel>tho<channel|>x", Parts("x", "tho")),
        ("<|channel>tho", Parts("", "tho")),
        ("<|channel>thought\na<|channel>thought\nb<channel|>c<channel|>d", Parts("cd", "ab")),
        ('a<channel|>b<|turn>c<|"|>d<|image|><pad>', Parts("abcd")),
        ("See: <|tool_call>call:f{}<tool_call|><|tool_response>", Parts("See: ", "", (_call("f"),))),
        (
            "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{n:1}<tool_call|>",
            Parts(tool_calls=(_call("f"), _call("g", {"n": 1}, 1))),
        ),
        (
            "<|tool_call>call:f{}<|tool_call>call:g{}",
            Parts(tool_calls=(_call("f"), _call("g", number=1))),
        ),
        ("<|tool_call>call:f{}<turn|><eos>", Parts(tool_calls=(_call("f"),))),
        (
            "<|channel>thought\nHm <|tool_call>call:f{}<tool_call|>more\n<channel|>x",
            Parts("x", "Hm more", (_call("f"),)),
        ),
        ("<tool_call|>x<tool_response|>", Parts("x")),
        ("", Parts()),
    ],
)
def test_parts_of_an_answer(gemma: Tokenizer, answer: str, parts: Parts) -> None:
    assert _parse(gemma, answer) == parts


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ('key:<|"|>text<|"|>,n:3', {"key": "text", "n": 3}),
        ('a:{b:[1,{c:<|"|>}]{<|"|>}],d:{}},e:[]', {"a": {"b": [1, {"c": "}]{"}], "d": {}}, "e": []}),
        (
            "t:true,f:false,z:null,T:True,F:False,N:None",
            {"t": True, "f": False, "z": None, "T": True, "F": False, "N": None},
        ),
        ("a:-1,b:1.5,c:1e21,d:-2.5E-7,e:0", {"a": -1, "b": 1.5, "c": 1e21, "d": -2.5e-7, "e": 0}),
        ('<|"|>odd: key<|"|>:1,two words:2,x-y.z:3', {"odd: key": 1, "two words": 2, "x-y.z": 3}),
        (' a : <|"|> spaced <|"|> ,\n b : 2 ', {"a": " spaced ", "b": 2}),
        ('s:<|"|><|"|>,u:<|"|>東京 🙂 "q" \\ , : <|"|>', {"s": "", "u": '東京 🙂 "q" \\ , : '}),
        ('"city": "Pa\\"ris", "n": [1]', {"city": 'Pa"ris', "n": [1]}),
        ("a:1,a:2", {"a": 2}),
    ],
)
def test_arguments_of_a_call(gemma: Tokenizer, arguments: str, values: dict[str, Any]) -> None:
    call = _call("get_it", values)
    assert _parse(gemma, f"<|tool_call>call:get_it{{{arguments}}}<tool_call|>") == Parts(tool_calls=(call,))
    number_types = [type(value) for value in values.values()]
    parsed = _parse(gemma, f"<|tool_call>call:get_it{{{arguments}}}<tool_call|>").tool_calls[0].arguments
    assert [type(value) for value in parsed.values()] == number_types


@pytest.mark.parametrize(
    "body",
    [
        "",
        "call:f",
        "call:{}",
        "call{}",
        "call:f{a}",
        "call:f{a:[1,b:2}",
        "call:f{a:1]}",
        "call:f{a:1} and more",
        "Rain (see: page 3)",
        "call:f[1]",
        "call:f{a:1e999}",
        "call:f{a:NaN}",
        'call:f{a:"b}',
        "call:f{a:b:1}",
        "call:f{a:1 b:2}",
        "call:f{a:1}call:g{b}",
        "call:f{a:{b:1,c:2}",
        "call:f{a:" + "9" * 5000 + "}",
        "call:f{a:" + "[" * 20_000 + "}",
    ],
)
def test_malformed_calls_become_visible_text(gemma: Tokenizer, body: str) -> None:
    assert _parse(gemma, f"a <|tool_call>{body}<tool_call|>b") == Parts(f"a {body}b")


@pytest.mark.parametrize(
    "body",
    [
        'call:f{a:<|"|>b}',
        'call:f{a:<|"|>b<|"|><|"|>c<|"|>}',
        '<|"|>call:f{}<|"|>',
        'call:f{a:<|"|>b<|"|>',
        "call:f{a:1",
        "call:f{a:1}",
    ],
)
def test_calls_that_are_cut_off_show_what_was_written(gemma: Tokenizer, body: str) -> None:
    parser = PartsParser(gemma)
    parts = parser.feed(gemma.encode_control(f"a <|tool_call>{body}")) + parser.finish(is_cut=True)
    assert parts == Parts("a " + body.replace('<|"|>', '"'))


def test_calls_are_numbered_after_their_prefix_over_all_blocks(gemma: Tokenizer) -> None:
    parser = PartsParser(gemma, "x_")
    text = "<|tool_call>call:f{}call:g{}<tool_call|><|tool_call>no<tool_call|><|tool_call>call:f{}<tool_call|>"
    calls = parser.feed(gemma.encode_control(text)).tool_calls
    assert [(call.name, call.id) for call in calls] == [("f", "x_0"), ("g", "x_1"), ("f", "x_2")]


def test_text_that_looks_like_markup_is_text(tokenizer: Tokenizer) -> None:
    text = '<|channel>thought\nx<channel|><|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><turn|>'
    assert parse_parts(tokenizer, tokenizer.encode(text)) == Parts(text)


def test_strings_may_hold_text_that_looks_like_a_delimiter(gemma: Tokenizer) -> None:
    control = gemma.special_ids
    ids = [
        control["<|tool_call>"],
        *gemma.encode("call:f{a:"),
        control['<|"|>'],
        *gemma.encode('<|"|>}<tool_call|>'),
        control['<|"|>'],
        *gemma.encode("}"),
        control["<tool_call|>"],
    ]
    assert parse_parts(gemma, ids).tool_calls == (_call("f", {"a": '<|"|>}<tool_call|>'}),)


def test_calls_written_as_by_the_template_are_read_back(gemma: Tokenizer) -> None:
    """Random arguments, written in the format of Gemma's template, are parsed to equal arguments."""
    rng = random.Random(4)

    def write(value: Any) -> list[int]:
        quote = SPECIAL['<|"|>']
        if isinstance(value, str):
            return [quote, *gemma.encode(value), quote]
        if isinstance(value, dict):
            items = [[*gemma.encode(f"{key}:"), *write(item)] for key, item in value.items()]
        elif isinstance(value, list):
            items = [write(item) for item in value]
        else:
            return gemma.encode(json.dumps(value))
        comma = gemma.encode(",")
        inside = [id for n, item in enumerate(items) for id in ([*comma, *item] if n else item)]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        return [*gemma.encode(opening), *inside, *gemma.encode(closing)]

    for _ in range(200):
        arguments = {f"key_{n}": random_value(rng, 3) for n in range(3)}
        ids = [
            SPECIAL["<|tool_call>"],
            *gemma.encode("call:my_tool"),
            *write(arguments),
            SPECIAL["<tool_call|>"],
        ]
        assert parse_parts(gemma, ids).tool_calls == (_call("my_tool", arguments),)


def test_parts_do_not_depend_on_the_chunks_of_ids(gemma: Tokenizer) -> None:
    rng = random.Random(5)
    markup = [
        "<|channel>",
        "<channel|>",
        "thought",
        "\n",
        "<|tool_call>",
        "<tool_call|>",
        '<|"|>',
        "call:f{a:",
        "f(",
        "}",
        "th",
        "ought",
        "<turn|>",
        "🙂",
    ]
    bytes_only = [id for id in range(gemma.vocab_size) if gemma.token(id).startswith("<0x")]
    for _ in range(500):
        ids: list[int] = []
        for _ in range(rng.randrange(12)):
            ids += (
                gemma.encode_control(rng.choice(markup)) if rng.random() < 0.8 else [rng.choice(bytes_only)]
            )
        whole = parse_parts(gemma, ids)
        parser, parts, rest = PartsParser(gemma), Parts(), ids
        while rest:
            cut = rng.randrange(1, 4)
            parts, rest = parts + parser.feed(rest[:cut]), rest[cut:]
        assert parts + parser.finish() == whole
        assert not any(token in whole.text + whole.thinking for token in SPECIAL)


def test_ordinary_ids_are_never_lost(tokenizer: Tokenizer) -> None:
    """Without markup, the text equals the decoded ids."""
    rng = random.Random(6)
    for _ in range(100):
        ids = tokenizer.encode(random_text(rng))
        assert parse_parts(tokenizer, ids) == Parts(tokenizer.decode(ids))


def test_an_incomplete_character_becomes_a_replacement_character(gemma: Tokenizer) -> None:
    cut = gemma.encode("🦊")[:3]
    assert parse_parts(gemma, cut) == Parts("\ufffd")
    call = gemma.encode_control("<|tool_call>call:f{}<tool_call|>")
    assert parse_parts(gemma, [*cut, *call]) == Parts("\ufffd", "", (_call("f"),))
    channel = [SPECIAL["<|channel>"], *cut, SPECIAL["<channel|>"], *gemma.encode("x")]
    assert parse_parts(gemma, channel) == Parts("x", "\ufffd")


def test_thinking_and_text_arrive_early(gemma: Tokenizer) -> None:
    parser = PartsParser(gemma)
    assert parser.feed(gemma.encode_control("<|channel>thought")) == Parts()
    assert parser.feed(gemma.encode("\nOne")) == Parts(thinking="One")
    assert parser.feed(gemma.encode(" two\n")) == Parts(thinking=" two")
    assert parser.feed(gemma.encode_control("<channel|>An")) == Parts("An")
    assert parser.feed(gemma.encode_control("swer<|tool_call>call:f{")) == Parts("swer")
    assert parser.feed(gemma.encode_control("}<tool_call|>")) == Parts(tool_calls=(_call("f"),))
    assert parser.finish() == Parts()
