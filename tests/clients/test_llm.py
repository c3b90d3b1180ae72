"""Simon Willison's llm, from its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import LONG, PERSON, QUESTION, SCHEMA

cli = pytest.importorskip("llm.cli")
testing = pytest.importorskip("click.testing")

FUNCTION = '''
def get_weather(city: str, days: int) -> str:
    "The weather of a city."
    assert (city, days) == ('São "Tomé"', 3)
    return "sunny"
'''


def run(folder: Path, address: str, *arguments: str) -> Any:
    """Run a command with the settings that the documentation gives."""
    settings = {
        "model_id": "demo", "model_name": "demo", "api_base": f"{address}/v1", "supports_tools": True,
        "supports_schema": True,
    }  # fmt: skip
    (folder / "extra-openai-models.yaml").write_text(json.dumps([settings]))
    environment = {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}
    return testing.CliRunner().invoke(cli.cli, ["-m", "demo", *arguments], env=environment)


@pytest.mark.parametrize("arguments", [[], ["--no-stream"]])
def test_the_demo_answers(tmp_path: Path, demo: str, arguments: list[str]) -> None:
    done = run(tmp_path, demo, "Sort 7 3 5", *arguments)
    assert done.stdout.strip() == "3 5 7", done.stderr


def test_a_stream_of_several_canvases(tmp_path: Path, scripted: str) -> None:
    assert run(tmp_path, scripted, "Count").stdout.strip() == LONG


def test_a_tool_is_called_and_its_result_answered(tmp_path: Path, scripted: str) -> None:
    done = run(tmp_path, scripted, "The weather?", "--functions", FUNCTION)
    assert done.stdout.strip().endswith("It is sunny."), done.stderr


def test_a_schema_holds(tmp_path: Path, demo: str) -> None:
    done = run(tmp_path, demo, QUESTION, "--schema", json.dumps(SCHEMA), "-o", "max_tokens", "64", "-o", "seed", "1")
    assert json.loads(done.stdout) == json.loads(PERSON), done.stderr


def test_an_error_is_one_line(tmp_path: Path, demo: str) -> None:
    done = run(tmp_path, demo, "hi", "-o", "max_tokens", "0")
    assert done.exit_code == 1 and "max_tokens must be at least 1" in done.stderr
