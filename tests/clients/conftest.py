"""Real clients: programs that others wrote, against a server on this machine. Nothing else is on the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import serving
from tests.server.scripted import scripted_model

HERE = Path(__file__).parent
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm fetches a list of prices otherwise

# What clients declare, in OpenAI's form. The scripted model calls it.
WEATHER: dict[str, Any] = {
    "name": "get_weather", "description": "The weather of a city.",
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
    },
}  # fmt: skip
CALL = '<|tool_call>call:get_weather{city:<|"|>São "Tomé"<|"|>,days:3}<tool_call|>'
ARGUMENTS = {"city": 'São "Tomé"', "days": 3}
THOUGHT = "Hm, 😀."
LONG = " ".join(str(number) for number in range(60))  # several canvases
# What the demo model can do with a schema.
QUESTION = "Make a JSON object: Simon is 59 years old and lives in Rome."
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["name", "age", "city"], "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
}  # fmt: skip
PERSON = '{"name":"Simon","age":59,"city":"Rome"}'  # without spaces

# Runs one scenario of an npm client's script, and returns the JSON that it prints: run(script, scenario, address).
RunNode = Callable[[str, str, str], Any]


def script(prompt: str) -> str:
    """Return what the scripted model writes: a call where a tool may be called, and an answer after its result."""
    if "sunny" in prompt:
        return "It is sunny."
    if "get_weather" in prompt:
        return f"<|channel>thought\nI need the weather.\n<channel|>I shall look.{CALL}"
    return f"<|channel>thought\n{THOUGHT}\n<channel|>{LONG}"


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """The address of a server with the demo model."""
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def scripted() -> Iterator[str]:
    """The address of a server whose model writes what ``script`` says."""
    with serving(lambda: scripted_model(script)) as address:
        yield address


@pytest.fixture(scope="session")
def run_node() -> RunNode:
    """A function that runs a script of this folder with node. Skips where the npm clients are not installed."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules").is_dir():
        pytest.skip("the npm clients are not installed; make test-clients does it where npm is")

    def run(script: str, scenario: str, address: str) -> Any:
        command = [node, str(HERE / script), scenario, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
