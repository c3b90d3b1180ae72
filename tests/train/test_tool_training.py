"""A model that is trained on a conversation with a tool calls it, and answers with its result."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.optimizers as optim
import pytest

from dgemma_mlx import generate, load
from dgemma_mlx.train.batches import batch_pair_at
from dgemma_mlx.train.dataset import encode_example, read_examples
from dgemma_mlx.train.loop import TrainConfig, train

ADD = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}
USER = {"role": "user", "content": "Use add for 2 and 5."}
RESULT = {"role": "tool", "content": {"sum": 7}}


@pytest.mark.slow
def test_a_call_its_result_and_the_answer(tmp_path: Path) -> None:
    called = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 2, "b": 5}'}]}
    line = {"messages": [USER, called, RESULT, {"role": "assistant", "content": "It is 7."}], "tools": [ADD]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    model = load("demo")
    examples = [encode_example(model, example) for example in read_examples(tmp_path / "data.jsonl")]
    pad, canvas = model.config.pad_token_id, model.config.canvas_length
    train(
        model.network, optim.AdamW(1e-3), lambda step: batch_pair_at(step, lambda rng: rng.choice(examples), 4, canvas,
        pad, 7), pad, TrainConfig(steps=40, log_every=10, save_every=100), tmp_path / "run", lambda record: None,
    )  # fmt: skip
    first = generate(model, [USER], tools=[ADD], seed=1, max_tokens=32)
    assert [(call.name, call.arguments) for call in first.tool_calls] == [("add", {"a": 2, "b": 5})]
    assert first.text == ""
    last = generate(model, [USER, first.message(), RESULT], tools=[ADD], seed=1, max_tokens=32)
    assert last.text == "It is 7." and last.tool_calls == ()
