"""``generate --tool-run``: the loop of calls and results, and what can go wrong with the program."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import DgemmaError, Done
from dgemma_mlx.cli import tool_run
from dgemma_mlx.cli.tool_run import ToolProgram, answer_with_tools, program_of
from dgemma_mlx.errors import PromptTooLongError
from dgemma_mlx.events import Statistics
from dgemma_mlx.text.parts import ToolCall

STATISTICS = Statistics(1, 0, 1, 1, 1, 1.0, 0.0, 1.0, 1.0, 0)
CALLS = ToolCall("add", {"a": 2, "b": "ü"}, "c1"), ToolCall("now", {}, "c2")
ADD = {"name": "add", "description": "Sum", "parameters": {"properties": {"a": {"type": "integer"}}}}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def looped(program: ToolProgram, answers_with_calls: int = 1) -> tuple[Done, list[Any]]:
    """Return the answer and the results of a model that calls twice in each of its first answers."""
    results: list[Any] = []

    def answer(messages: list[dict[str, Any]]) -> Done:
        calls = CALLS if len(messages) < 1 + 3 * answers_with_calls else ()
        return Done(json.dumps(messages), "", calls, (), "tool_calls" if calls else "stop", 1, STATISTICS)

    begun = [{"role": "user", "content": "Go"}]
    return answer_with_tools(answer, begun, program, lambda call, result: results.append(result)), results


def test_results_follow_their_calls_until_the_model_answers() -> None:
    echo = "import json, sys; c = json.load(sys.stdin); print(json.dumps([c['name'], c['arguments'], c['id']]))"
    done, results = looped(ToolProgram(python(echo)), 2)
    assert results == [["add", {"a": 2, "b": "ü"}, "c1"], ["now", {}, "c2"]] * 2
    messages = json.loads(done.text)
    assert [message["role"] for message in messages] == ["user", *["assistant", "tool", "tool"] * 2]
    assert messages[1]["tool_calls"][0]["name"] == "add"
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": results[0]}


def test_what_is_not_json_is_text() -> None:
    assert looped(ToolProgram(["printf", " 21 degrees\n"]))[1] == ["21 degrees"] * 2
    assert looped(ToolProgram(["true"]))[1] == [""] * 2
    for number in ("NaN", '{"a": [-Infinity]}'):  # Python writes them, but they are not JSON
        assert looped(ToolProgram(["printf", number]))[1] == [number] * 2


def test_rounds_are_limited() -> None:
    with pytest.raises(DgemmaError, match="the model still calls tools after 2 rounds"):
        looped(ToolProgram(["true"], rounds=2), 3)
    assert looped(ToolProgram(["true"], rounds=3), 3)[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(3)", "failed with exit code 3"), ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("import time; time.sleep(60)", "took more than 0.5 s"),
        ("print('x' * 300, flush=True)", "more than 200 bytes"),
        ("print('x' * 300, flush=True); input()", "more than 200 bytes"),
    ],
)  # fmt: skip
def test_the_model_and_the_user_are_told_of_a_program_that_fails(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool_run, "MOST_BYTES", 200)
    program = ToolProgram(python(code), seconds=0.5 if "sleep" in code else 60)
    _, results = looped(program)
    assert words in results[0]["error"] and len(results) == 2
    assert f"the tool add {results[0]['error'].removeprefix('the tool ')}" in capsys.readouterr().err


def test_a_program_that_leaves_a_process_behind_is_not_waited_for() -> None:
    assert looped(ToolProgram(["sh", "-c", "sleep 30 & echo done"], seconds=20))[1] == ["done"] * 2


@pytest.mark.parametrize(("command", "words"), [("no-such-program x", "'no-such-program'"), ("'", "No closing"),
                                                ("", "there is no program")])  # fmt: skip
def test_a_program_that_is_none_is_named_at_once(command: str, words: str) -> None:
    with pytest.raises(DgemmaError, match=words) as caught:
        program_of(command)
    assert caught.value.exit_code == 2 and caught.value.hint


def generate(tmp_path: Path, program: str, *options: str) -> subprocess.Popen[str]:
    (tmp_path / "add.json").write_text(json.dumps(ADD))
    return subprocess.Popen(
        [sys.executable, "-m", "dgemma_mlx", "generate", "-m", "demo", "--seed", "1", "-n", "32", "--tool",
         str(tmp_path / "add.json"), "--tool-run", program, "--max-denoising-steps", "4", *options, "Sort 7 3 5"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_generate_runs_the_program_once_for_a_required_call(tmp_path: Path) -> None:
    """The demo, which has learned no tools, then answers as it does."""
    calls = tmp_path / "calls"
    process = generate(tmp_path, shlex.join(["sh", "-c", f"cat >> {calls}; echo 5"]), "--jsonl", "--tool-choice",
                       "required")  # fmt: skip
    out, err = process.communicate(timeout=60)
    call = json.loads(calls.read_text())
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "draft"]
    assert kinds.count("done") == 2 and kinds.count("tool_result") == 1, err
    first, result = (next(event for event in events if event["event"] == kind) for kind in ("done", "tool_result"))
    assert first["tool_calls"] == [call] and call["name"] == "add"
    assert result == {"event": "tool_result", "id": call["id"], "name": "add", "content": 5}
    assert events[-1]["statistics"]["cached_tokens"] >= first["statistics"]["prompt_tokens"]


def test_ctrl_c_ends_the_program_as_well(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    process = generate(tmp_path, shlex.join(["sh", "-c", f"echo $$ > {pid}; exec sleep 60"]), "--tool-choice", "add")
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_options_that_need_others(tmp_path: Path) -> None:
    for options, words in ((["--tool-rounds", "3"], "need --tool-run"), (["--tool-run", "cat"], "needs --tool")):
        done = subprocess.run(
            [sys.executable, "-m", "dgemma_mlx", "generate", *options, "x"], capture_output=True, text=True,
            timeout=60, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("printed", ["NaN", "[1, -Infinity]", '{"a": 1e999}'])
def test_numbers_that_json_does_not_have_are_text(printed: str) -> None:
    _, results = looped(ToolProgram(python(f"print({printed!r})")))
    assert results == [printed, printed]


def test_the_hint_for_results_that_are_too_long_names_the_program() -> None:
    def answer(messages: list[dict[str, Any]]) -> Done:
        if len(messages) > 1:
            raise PromptTooLongError(300, 256, 512)
        return Done("", "", CALLS, (), "tool_calls", 1, STATISTICS)

    with pytest.raises(PromptTooLongError) as caught:
        answer_with_tools(answer, [{"role": "user", "content": "Go"}], ToolProgram(python("")), lambda *_: None)
    assert "--tool-run" in caught.value.hint
