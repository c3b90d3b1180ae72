"""Tool calls that Gemma's published template renders, in its own vocabulary, are parsed to equal arguments."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dgemma_mlx.text import ChatTemplate, PartsParser, Tokenizer, encode_chat
from tests.text.gemma_like import random_value

pytestmark = pytest.mark.vocabulary


def test_calls_come_back_however_the_ids_arrive(gemma4: Tokenizer, gemma4_folder: Path) -> None:
    rng = random.Random(11)
    template = ChatTemplate.load(gemma4_folder)

    for _ in range(500):
        arguments = {f"key_{n}": random_value(rng, 3) for n in range(rng.randrange(4))}
        call = {"type": "function", "function": {"name": "my_tool", "arguments": arguments}}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        ids = encode_chat(gemma4, template, messages, add_generation_prompt=False)
        written = ids[ids.index(gemma4.special_ids["<|tool_call>"]) :]
        parser, cut = PartsParser(gemma4), rng.randrange(len(written) + 1)
        parts = parser.feed(written[:cut]) + parser.feed(written[cut:]) + parser.finish()
        assert [(found.name, found.arguments) for found in parts.tool_calls] == [("my_tool", arguments)]
