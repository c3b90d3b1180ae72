"""Turns over Gemma's own vocabulary: canvases of random logits hold valid calls, and the template's calls match."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from dgemma_mlx import Constraint
from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.constrain.turns import Turn, calls_of, of_turn
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.parts import parse_parts
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.text.tools import signatures

pytestmark = pytest.mark.vocabulary

SIZE = 262_144
EOS = (1, 106, 50)
WEATHER = {"name": "get_weather", "parameters": {
    "type": "object", "required": ["city", "unit"],
    "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]},
                   "days": {"type": "integer", "minimum": 1, "maximum": 7}},
}}  # fmt: skip
SEARCH = {"name": "search", "parameters": {
    "properties": {"query": {"type": "string"}, "since": {"type": "string", "format": "date"}, "filters": {
        "type": "array", "maxItems": 3, "items": {
            "type": "object", "required": ["field", "value"], "additionalProperties": False,
            "properties": {"field": {"enum": ["a", "ü b", "c\"}"]}, "value": {"type": ["number", "boolean", "null"]}},
        }}},
    "required": ["query", "filters"],
}}  # fmt: skip
TOOLS: list[Any] = [WEATHER, SEARCH, {"name": "clock"}]


def over(tokenizer: Tokenizer, turn: Turn) -> TokenMachine:
    """Return the machine of a turn over Gemma's tokens, which may end with <turn|> and <|tool_response>."""
    config = GenerationConfig(48, 0.1, 0.4, 0.8, 1, 0.005, EOS, 0)
    return Constraint(of_turn(turn), "the answer").over(tokenizer, config, SIZE)


def held(**options: Any) -> Turn:
    return Turn(calls=calls_of(TOOLS, ["get_weather", "search", "clock"]), **options)


def random_answer(machine: TokenMachine, tokenizer: Tokenizer, seed: int, room: int = 200, C: int = 64) -> list[int]:
    """Return the tokens of an answer that a model without knowledge writes, canvas by canvas."""
    rng, state, written = np.random.default_rng(seed), machine.start, list[int]()
    favoured = np.array([48, 49, 52, 100, 101, *tokenizer.encode("call:search{},[] true")], np.int32)
    while state is not machine.ended:
        projector = machine.projector(state, room - len(written))
        for _ in range(2):
            rows = [np.unique(np.r_[favoured, rng.integers(200, SIZE, 64)])[:64] for _ in range(C)]
            ids = np.stack(rows).astype(np.int32)
            skeleton = rng.normal(size=(C, len(projector.skeleton)))
            canvas = projector(skeleton, ids, rng.normal(size=ids.shape), rng.random(C))
        tokens = canvas.sample.tolist()
        after = machine.advance(state, tokens)
        assert after is not None
        state, written = after, written + tokens
    end = next(place for place, id in enumerate(written) if id in EOS)
    assert end < room
    return written[: end + 1]


@pytest.mark.parametrize("options", [{"must_call": True}, {"must_call": True, "thinks": True}, {"thinks": True}])
def test_calls_of_a_model_without_knowledge_validate(gemma4: Tokenizer, options: dict[str, Any]) -> None:
    machine, schemas = over(gemma4, held(**options)), {each.name: each.schema for each in signatures(TOOLS)}
    made = 0
    for seed in range(6):
        parts = parse_parts(gemma4, random_answer(machine, gemma4, seed))
        for call in parts.tool_calls:
            Draft202012Validator(schemas[call.name], format_checker=Draft202012Validator.FORMAT_CHECKER).validate(
                call.arguments
            )
        made += len(parts.tool_calls)
        assert not options.get("must_call") or (parts.tool_calls and not parts.text)
        assert options.get("thinks") or not parts.thinking
    assert made or not options.get("must_call")


def test_what_follows_the_thought_of_a_model_without_knowledge_matches(gemma4: Tokenizer) -> None:
    constraint = Constraint.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4})
    machine, thought = over(gemma4, Turn(constraint.machine, thinks=True)), 0
    for seed in range(8):
        parts = parse_parts(gemma4, random_answer(machine, gemma4, seed))
        assert constraint.matches(parts.text) and not parts.tool_calls
        thought += bool(parts.thinking)
    assert thought


def test_calls_as_the_published_template_writes_them_are_allowed(gemma4: Tokenizer, gemma4_folder: Any) -> None:
    template = ChatTemplate.load(gemma4_folder)
    made = [
        ("get_weather", {"city": "São Paulo, \"BR\"", "unit": "celsius"}), ("clock", {}),
        ("search", {"query": "a\n{b}: [c]",
                    "filters": [{"value": True, "field": "ü b"}, {"field": "c\"}", "value": -1.5}]}),
    ]  # fmt: skip
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in made]
    messages: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    ids = encode_chat(gemma4, template, messages, tools=TOOLS, add_generation_prompt=False)
    first = ids.index(48)
    answer = ids[first : len(ids) - ids[::-1].index(49)]
    for turn in (held(), held(must_call=True), held(thinks=True, must_call=True)):
        machine = over(gemma4, turn)
        for end in (50, 106):
            assert machine.advance(machine.start, [*answer, end]) is machine.ended
    assert [(call.name, call.arguments) for call in parse_parts(gemma4, answer).tool_calls] == made
