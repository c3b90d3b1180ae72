"""Tools on the command line: --tools and --tool-choice, batches, and saved chats with calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import load
from dgemma_mlx.cli.batch import read_batch
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.tools import read_tools
from dgemma_mlx.errors import DgemmaError

ADD = {"name": "add", "description": "Sum", "parameters": {"properties": {"a": {"type": "integer"}}}}
CALLS = [{"name": "add", "arguments": {"a": 2}, "id": "x"}]
LOOP: list[dict[str, Any]] = [
    {"role": "user", "content": "Add 2"}, {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "x", "content": {"sum": 2}}, {"role": "assistant", "content": "It is 2."},
]  # fmt: skip


def run(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], input=text, capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "DGEMMA_MAX_TOKENS": "32", "DGEMMA_SEED": "1",
                          "DGEMMA_MAX_DENOISING_STEPS": "4"},
    )  # fmt: skip


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_generate_with_tools(tmp_path: Path) -> None:
    tools = write(tmp_path / "tools.json", ADD)
    done = run("generate", "-m", "demo", "--json", "--tool", tools, "--tool-choice", "none", "Sort 7 3 5")
    assert done.returncode == 0 and json.loads(done.stdout)["text"] == "3 5 7"
    done = run("generate", "-m", "demo", "--tool", tools, "--tool-choice", "clock", "Sort 7 3 5")
    assert done.returncode == 2 and "tool_choice names 'clock', which no tool has" in done.stderr
    assert "hint: Use auto, none, required, or the name of a tool: add." in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read"), ("{", "is not JSON"), ("3", "tools must be a list of tools, not 3"),
        ("null", "tools must be a list of tools, not None"),
        ('[{"name": "a b"}]', "tool 1: 'a b' cannot be its name"), ('["f"]', "tool 1: 'f' is neither"),
    ],
)  # fmt: skip
def test_a_bad_file_of_tools_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DgemmaError) as error:
        read_tools([path])
    assert str(path) in error.value.message and words in error.value.message and error.value.exit_code == 2


def test_a_file_holds_one_tool_or_several(tmp_path: Path) -> None:
    several = [{"type": "function", "function": ADD}, {"name": "f"}]
    one, two = write(tmp_path / "one.json", ADD), write(tmp_path / "two.json", several)
    assert read_tools([one]) == [ADD]
    assert read_tools([two]) == several
    with pytest.raises(DgemmaError, match=r"two\.json: two tools have the name 'add'"):
        read_tools([one, two])


def test_lines_of_a_batch_have_tools_and_all_roles(tmp_path: Path) -> None:
    lines = [
        {"prompt": LOOP[:3], "tools": [ADD], "tool_choice": "auto"}, {"prompt": "Sort 7 3 5", "tools": [ADD],
        "tool_choice": "none"}, {"prompt": "Sort 7 3 5", "tool_choice": "required", "tools": [ADD]},
    ]  # fmt: skip
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_batch(path) == lines
    done = run("generate", "-m", "demo", "-q", "--batch", path, "--batch-size", "3")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 3 and records[1]["text"] == "3 5 7"


def test_a_choice_that_a_line_or_the_options_do_not_offer_is_an_error_before_anything_is_answered(
    tmp_path: Path,
) -> None:
    tools, path = write(tmp_path / "tools.json", ADD), tmp_path / "batch.jsonl"
    path.write_text('"Sort 7 3 5"\n{"prompt": "Sort 7 3 5", "tool_choice": "clock"}\n')
    for options in (("--tool", tools), ()):
        done = run("generate", "-m", "demo", "--batch", path, *options)
        assert done.returncode == 2 and done.stdout == "" and f"{path}, line 2: tool_choice " in done.stderr
    assert read_batch(path, [{"name": "clock"}], "auto")[1]["tool_choice"] == "clock"
    done = run("generate", "-m", "no/such model", "--tool", tools, "--tool-choice", "clock", "x")
    assert done.returncode == 2 and "tool_choice names 'clock', which no tool has" in done.stderr


def test_saved_chats_with_calls_are_loaded_rendered_and_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    path, copy = tmp_path / "talk.json", tmp_path / "copy.json"
    Session(messages=[*LOOP, *LOOP]).save(path)
    session = Session.load(path)
    assert session.turns == 2 and session.prompt(4) == LOOP
    model = load("demo")
    text = model.tokenizer.decode(model.encode_prompt(session.prompt()), keep_special=True)
    called = "<|tool_call>call:add{a:2}<tool_call|><|tool_response>response:add{sum:2}<tool_response|>It is 2.<turn|>"
    assert text.count(called) == 2
    done = run("chat", "-m", "demo", text=f"/load {path}\n/undo\n/show\n/save {copy}\n/undo\n/undo\n")
    assert Session.load(copy).messages == LOOP
    assert 'tool call: {"name": "add", "arguments": {"a": 2}, "id": "x"}' in done.stderr
    assert '[tool]\n{"sum": 2}' in done.stderr and "there is no turn yet" in done.stderr


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([*LOOP[:1], *LOOP[2:]], "no earlier call has the id 'x'"), (LOOP[:3], "a turn is a message of the user"),
        ([LOOP[0], {**LOOP[1], "tool_calls": [{"name": 5}]}], "a call has the name 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, LOOP[3]], "a part of type 'image_url' cannot be read"),
        ([*LOOP[:2], *LOOP], None), ([LOOP[0], LOOP[3], LOOP[3]], "a turn is"),
        ([LOOP[0], {**LOOP[3], "x": 1}], "'x' is not read"),
    ],
)  # fmt: skip
def test_saved_chats_that_are_none(tmp_path: Path, messages: Any, words: str | None) -> None:
    path = write(tmp_path / "talk.json", {"format": "dgemma-mlx session 1", "messages": messages})
    if words is None:
        assert Session.load(path).messages == messages
        return
    with pytest.raises(DgemmaError, match="do not make a conversation: ") as error:
        Session.load(path)
    assert words in error.value.message
