"""What a scripted model plays in the tests of several protocols: thoughts, texts, calls, and failures."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

# A tool in Anthropic's form, and in that of OpenAI's responses.
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "input_schema": PARAMETERS}
FUNCTION = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
CALL = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'
NUMBERS = " ".join(str(number) for number in range(40))  # several canvases


class Play:
    """A script that remembers its prompts.

    Attributes:
        prompts: All prompts, with their control tokens, oldest first.
        waits: Set by a test that wants the model to wait at the prompt "wait" until ``goes_on`` is set.
        goes_on: See there.
    """

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.waits, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, prompt: str) -> str:
        """Return what the model writes."""
        self.prompts.append(prompt)
        if "boom" in prompt:
            raise RuntimeError("the network is broken")
        if "wait" in prompt:
            self.waits.set()
            assert self.goes_on.wait(30)
        if "response:" in prompt:
            return "It is sunny."
        if "twice" in prompt:
            return CALL + CALL
        if "declaration:get_weather" in prompt:
            return f"<|channel>thought\nHm, 😀.\n<channel|>I look.{CALL}"
        for name in ("box__open", "patch"):
            if f"declaration:{name}" in prompt:
                return f'<|tool_call>call:{name}{{input:<|"|>a "b"<|"|>}}<tool_call|>'
        return NUMBERS if "count" in prompt else "Fine."

    def wait(self, seconds: float) -> None:
        """Let the model wait for some time at the next prompt "wait"."""
        self.waits.clear()
        self.goes_on.clear()
        threading.Timer(seconds, self.goes_on.set).start()

    def last(self) -> str:
        """Return the last prompt."""
        return self.prompts[-1]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the data of all events of a stream, after checking that each event has the name of its type."""
    found = []
    for piece in response.text.split("\n\n")[:-1]:
        name, data = piece.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append(json.loads(data.removeprefix("data: ")))
        assert found[-1]["type"] == name.removeprefix("event: ")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return found
