"""What machines with the whole model tell each other: an answer to a message is the answer to what it was made of."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.distributed.channel import Channel
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done
from dgemma_mlx.generation.api import stream
from dgemma_mlx.generation.load import LoadOptions, load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.team import (
    Team,
    answer_task,
    answer_together,
    done_from,
    options_message,
    request_message,
)
from dgemma_mlx.generation.worker import End
from dgemma_mlx.server.follower import event_message
from dgemma_mlx.server.machines import event_from
from tests.distributed.whole import joined
from tests.vision.seeing import png, write_seeing

# A machine that only answers the first message.
SILENT = """
from dgemma_mlx.distributed.channel import open_channel
from dgemma_mlx.distributed.launch import launched
channel = open_channel(launched())
channel.receive()
"""
TOOL = {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
}}  # fmt: skip


def there_and_back(value: Any) -> Any:
    return json.loads(json.dumps(value))


def without_times(done: Done) -> Done:
    counts = replace(done.statistics, prefill_seconds=0, seconds=0, tokens_per_second=0, peak_memory=0)
    return replace(done, statistics=counts)


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with joined(tmp_path_factory.mktemp("silent"), ("-c", SILENT)) as channel:
        yield channel


def check(model: Model, channel: Channel, requests: list[dict[str, Any]], options: dict[str, Any]) -> list[Done]:
    """Answer requests here, and as another machine would; return the answers, which are the same."""
    expected = answer_together(model, requests, options)
    messages = [request_message(request) for request in requests]
    task = {"kind": "answer", "options": options_message(options), "requests": messages}
    answer = there_and_back(answer_task(model, there_and_back(task), channel))
    found = [done_from(result) for result in answer["results"]]
    assert [asdict(without_times(done)) for done in found] == [asdict(without_times(done)) for done in expected]
    assert list(map(without_times, found)) == list(map(without_times, expected))
    return found


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.regex("[a-z]{2,9}"), Constraint.choice(["yes", "no"]), Constraint.grammar('a ::= "x" | "y" a'),
        Constraint.json_schema({"type": "array", "items": {"enum": [1, 2.5, None]}, "maxItems": 2}),
        Constraint.response_format({"type": "json_object"}),
    ],
)  # fmt: skip
def test_constraints_and_parameters(channel: Channel, constraint: Constraint) -> None:
    model = load("demo")
    options = {
        "speed": "fast", "temp": 0.5, "constraint": constraint, "thinking": False, "raw": False, "verify": "off",
        "generation": model.generation.override(max_denoising_steps=3, entropy_bound=0.2), "max_tokens": 30,
        "seed": None, "system": "Be short.", "tools": None, "tool_choice": None,
    }  # fmt: skip
    requests = [{"prompt": "What is 27 + 45?", "seed": 3, "id": "a"}, {"prompt": "Sort 7 3 5", "seed": 4}]
    for done in check(model, channel, requests, options):
        assert constraint.matches(done.text)


def test_tools_and_conversations(channel: Channel) -> None:
    model = load("demo")
    few = model.generation.override(max_denoising_steps=3)
    options = {"max_tokens": 40, "generation": few, "tools": [TOOL], "tool_choice": "required"}
    said = [{"role": "user", "content": "What is the weather in Rome?"}]
    [done, _] = check(model, channel, [{"prompt": said, "seed": 1}, {"prompt": "Rome?", "seed": 1}], options)
    assert done.tool_calls[0].name == "get_weather"


def test_images_are_sent(channel: Channel, tmp_path: Path) -> None:
    model, path = load(write_seeing(tmp_path / "model")), tmp_path / "a.png"
    path.write_bytes(png())
    part = {"type": "image", "path": str(path), "budget": 70}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    requests = [{"prompt": "What is it?", "images": [part], "seed": 1}, {"prompt": messages, "seed": 1}]
    first, second = check(model, channel, requests, {"max_tokens": 4})
    assert without_times(first) == without_times(second)
    for bad in ({"type": "image", "path": str(tmp_path / "gone.png")}, {"type": "video", "path": str(path)}):
        with pytest.raises(DgemmaError):
            request_message({"prompt": "What is it?", "images": [bad]})


def test_requests_without_a_seed_get_one_that_gives_the_answer_again() -> None:
    team = Team(load("demo"))
    [[done]] = team.answers([[{"prompt": "Count from 13 to 20."}]], {"max_tokens": 8})
    assert isinstance(done, Done)
    [[again]] = team.answers([[{"prompt": "Count from 13 to 20.", "seed": done.seed}]], {"max_tokens": 8})
    assert isinstance(again, Done) and again.tokens == done.tokens


def test_every_event_is_the_same_after_its_message() -> None:
    events = list(stream(load("demo"), "Count from 13 to 40.", seed=1, max_tokens=60))
    assert [event_from(there_and_back(event_message(event))) for event in events] == events
    end = event_from(there_and_back(event_message(End(DgemmaError("too long", "Shorten it.", 2)))))
    assert isinstance(end, End) and isinstance(end.error, DgemmaError)
    assert (end.error.message, end.error.hint, end.error.exit_code) == ("too long", "Shorten it.", 2)
    assert event_from(there_and_back(event_message(End()))) == End()


def test_options_of_loading_are_the_same_after_their_message() -> None:
    import mlx.core as mx

    options = LoadOptions("demo", mx.float32, "on", Path("/adapter"), "causal")
    assert LoadOptions.from_message(there_and_back(options.as_message())) == replace(options, dtype="float32")
    assert LoadOptions.from_message(there_and_back(LoadOptions().as_message())) == LoadOptions()
    found = LoadOptions.from_message(LoadOptions(".", adapter=Path("adapter")).as_message())
    assert (found.model, found.adapter) == (os.getcwd(), Path.cwd() / "adapter")
