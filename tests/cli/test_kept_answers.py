"""What each command keeps of its answers, and how generate goes on with a conversation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from dgemma_mlx.cli import app as program
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.log import Entry, Log
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.events import Done
from dgemma_mlx.text.parts import ToolCall
from tests.cli.kept import log_of, messages
from tests.cli.test_tool_run import STATISTICS

Run = Callable[..., tuple[int, str, str]]
JSON = "Make a JSON object: Simon is 59 years old and lives in Rome."


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """An empty log."""
    monkeypatch.setenv("DGEMMA_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("DGEMMA_MODEL", "demo")
    monkeypatch.setenv("DGEMMA_MAX_DENOISING_STEPS", "4")
    return Log()


@pytest.fixture
def run(log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dgemma-mlx", *arguments])
        with open(os.devnull) as nothing:
            monkeypatch.setattr("sys.stdin", nothing)
            code = program.run()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def only(log: Log) -> tuple[Entry, list[str]]:
    """Return the only conversation and its texts."""
    (entry,) = log.entries()
    return entry, [message["content"] for message in log.load(entry.id).messages]


def test_prompts_of_generate_form_conversations(log: Log, run: Run) -> None:
    generate = partial(run, "generate", "-q", "--seed", "1")
    assert generate("-c", "Hi")[0] == 1 and not log.path.exists()
    alone = generate("My name is Ana.")
    assert generate("--continue", "What is my name?") == (0, "Your name is Ana.\n", "")
    assert only(log)[1] == ["My name is Ana.", alone[1].strip(), "What is my name?", "Your name is Ana."]
    assert generate("--session", "sorts", "--system", "Be brief.", "Sort 7 3 5")[0] == 0
    assert generate("--session", "sorts", "Sort 2 1")[0] == 0
    last = log.load(str(log.last()))
    assert (last.name, last.system, last.turns, last.model) == ("sorts", "Be brief.", 2, "demo")
    assert [row.get("seed") for row in log.answers(str(last.id))] == [None, 1, None, 1]
    for options, error in (
        (["-c", "--raw", "x"], "--raw cannot be combined with --continue or --session"),
        (["-c", "--session", "x", "x"], "exclude each other"),
    ):  # fmt: skip
        code, out, err = generate(*options)
        assert (code, out) == (2, "") and error in err
    assert len(log.entries()) == 2


def test_each_command_keeps_its_answer(log: Log, run: Run, tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text('"Sort 7 3 5"\n{"prompt": "Sort 2 1", "system": "Be brief."}\n')
    assert run("generate", "--batch", str(tmp_path / "batch.jsonl"))[0] == 0
    assert run("generate", "--raw", "-n", "8", "--seed", "1", "The cat")[0] == 0
    assert run("choose", "What is 27 + 45?", "--from", "71,72")[0] == 0
    gaps, city = '{"name": "___", "age": ___, "city": "___"}', '{"name": "Simon", "age": 59, "city": "Oslo"}'
    (tmp_path / "gaps").write_text(gaps)
    (tmp_path / "city").write_text(city)
    assert run("fill", str(tmp_path / "gaps"), "--prompt", JSON, "--candidates", "1")[0] == 0
    assert run("edit", JSON, str(tmp_path / "city"), "--match", "Oslo", "--candidates", "1", "--seed", "1")[0] == 0
    entries = log.entries()
    assert [entry.kind for entry in entries] == ["edit", "fill", "choose", "raw", "batch", "batch"]
    texts = {entry.kind: [row["content"] for row in log.answers(entry.id)] for entry in entries}
    assert texts["edit"][0] == f"{JSON}\n\n{city}" and texts["edit"][1].startswith('{"name": "Simon", "age": 59')
    assert texts["fill"][0] == f"{JSON}\n\n{gaps}" and texts["fill"][1].startswith('{"name": "')
    assert texts["choose"][0] == "What is 27 + 45?\n\n71,72" and texts["choose"][1].endswith("  71")
    assert log.load(entries[-2].id).system == "Be brief." and log.last() is None


def test_with_the_log_off_no_answer_is_kept(log: Log, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_LOG", "off")
    assert run("generate", "Sort 7 3 5")[1] == "3 5 7\n"
    assert run("choose", "What is 27 + 45?", "--from", "71,72")[0] == 0
    assert not log.path.parent.exists()


def test_what_was_written_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    endless = {
        "DGEMMA_MAX_DENOISING_STEPS": "15", "DGEMMA_STABILITY_THRESHOLD": "99999", "DGEMMA_SPEED": "reference",
        "DGEMMA_MAX_TOKENS": "64",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "dgemma_mlx", "generate", "-m", "demo", "--seed", "1", "Count from 13 to 40."],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **endless, "DGEMMA_STATE": str(tmp_path / "state")},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.read(8)  # the first canvas is committed
        process.send_signal(signal.SIGINT)
        printed = first + process.stdout.read()
        assert process.wait(60) == 130
    _, answer = messages(tmp_path / "state")
    assert answer["cancelled"] is True and answer["content"].split() == printed.decode().split()
    assert len(log_of(tmp_path / "state").entries()) == 1


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_results_of_tools_are_kept_when_no_answer_follows_them(log: Log, answered: int) -> None:
    calls = tuple(ToolCall("clock", {"city": city}, f"call_{city}") for city in ("Rome", "Oslo"))
    done = Done("", "", calls, (), "tool_calls", 1, STATISTICS)
    session = Session([{"role": "user", "content": "What time is it?"}])
    with suppress(KeyboardInterrupt), Keeper(Settings()).keeping(session, "generate", "demo") as watched:
        list(watched([done]))
        for call in calls[:answered]:
            session.messages.append({"role": "tool", "tool_call_id": call.id, "content": "noon"})
        raise KeyboardInterrupt
    (entry,) = log.entries()
    kept = log.load(entry.id).messages
    ends = ["assistant"] if answered else []
    assert [message["role"] for message in kept] == ["user", "assistant", *["tool"] * answered, *ends]
    assert len(kept[1]["tool_calls"]) == (answered or 2)
    assert [message["content"] for message in kept if message["role"] == "tool"] == ["noon"] * answered
    if answered:
        assert kept[-1]["cancelled"] and not kept[-1]["content"]
