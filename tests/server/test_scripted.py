"""The scripted model that other tests rely on."""

from __future__ import annotations

from dgemma_mlx import PromptCache, generate
from tests.server.scripted import scripted_model


def test_a_script_is_written_over_several_canvases_with_and_without_a_prompt_cache() -> None:
    words = " ".join(str(number) for number in range(40))
    model = scripted_model(lambda prompt: f"<|channel>thought\nHm<channel|>{words}" if "long" in prompt else "short")
    assert generate(model, "hi").text == "short"
    cache = PromptCache()
    for _ in range(2):
        done = generate(model, "long", prompt_cache=cache)
        assert (done.text, done.thinking, done.finish_reason) == (words, "Hm", "stop")
        assert done.statistics.canvases > 2


def test_a_scripted_call_is_read_as_a_call() -> None:
    model = scripted_model(lambda prompt: "<|tool_call>call:add{a:2}<tool_call|>")
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
    done = generate(model, "2?", tools=tools)
    assert done.tool_calls[0].arguments == {"a": 2} and done.finish_reason == "tool_calls"


def test_the_turn_goes_on_after_a_result() -> None:
    model = scripted_model(lambda prompt: "sunny" if "response:weather" in prompt else "no result")
    call = {"id": "a", "function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "20 degrees"},
    ]  # fmt: skip
    assert generate(model, messages).text == "sunny"
