"""``generate --tool-run``: a program answers the model's calls, until the model answers without one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError, PromptTooLongError
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.sizes import counted, size

if TYPE_CHECKING:
    from dgemma_mlx.events import Done
    from dgemma_mlx.text.parts import ToolCall

MOST_BYTES = 4 * 10**6  # of a result
_PAUSE = 0.05  # seconds between two looks at a program that runs


def program_of(command: str) -> list[str]:
    """Return the program and its arguments, split as a shell does, without running a shell.

    Raises `DgemmaError` (exit code 2) when there is no such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DgemmaError(f"--tool-run cannot be {shown(command)}: {reason(error)}", "Close the quotes.", 2) from None
    if not words or shutil.which(words[0]) is None:
        hint = "--tool-run names a program that can be run, with its arguments, such as \"python3 tools.py\"."
        raise DgemmaError(f"there is no program {shown(words[0] if words else command)}", hint, exit_code=2)
    return words


@dataclass(frozen=True)
class ToolProgram:
    """The program that answers calls.

    Attributes:
        command: The program and its arguments.
        rounds: Largest number of answers whose calls it answers.
        seconds: Time after which it is ended, and the call has failed.
    """

    command: Sequence[str]
    rounds: int = 10
    seconds: float = 60


def answer_with_tools(
    answer: Callable[[list[dict[str, Any]]], Done], messages: list[dict[str, Any]], program: ToolProgram,
    report: Callable[[ToolCall, Any], None],
) -> Done:
    """Let the model call tools and answer, and return the answer without a call.

    ``answer`` answers a conversation, which begins with ``messages``; calls and results are added to that list.
    ``report`` is called with each call and its result.
    Raises `DgemmaError` when the model goes on calling, or when the program cannot be started.
    """
    for _ in range(program.rounds):
        done = _answer(answer, messages)
        if not done.tool_calls:
            return done
        messages.append(done.message())
        for call in done.tool_calls:
            result = _run(program, call)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            report(call, result)
    done = _answer(answer, messages)
    if done.tool_calls:
        message = f"the model still calls tools after {counted(program.rounds, 'round')}"
        raise DgemmaError(message, "--tool-rounds allows more.")
    return done


def _answer(answer: Callable[[list[dict[str, Any]]], Done], messages: list[dict[str, Any]]) -> Done:
    """Return the answer to a conversation. A hint names the tools when their results are in one that is too long."""
    try:
        return answer(messages)
    except PromptTooLongError as error:
        if messages[-1]["role"] == "tool":
            error.hint = "It holds the results of the tools. Let the program of --tool-run print less."
        raise


def _run(program: ToolProgram, call: ToolCall) -> Any:
    """Return the result of a call: what the program prints, as JSON or else as text.

    The program reads the call from its standard input: JSON with ``name``, ``arguments`` and ``id``. When it fails,
    takes too long or prints too much, the result is an object with ``error``, which the model sees, and a line on
    stderr says so. The program stays in this one's process group, so that it may ask on the terminal.
    """
    with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as result:  # files, because a pipe can block
        sent.write(json.dumps(asdict(call)).encode())
        sent.seek(0)
        try:
            process = subprocess.Popen(program.command, stdin=sent, stdout=result)
        except OSError as error:
            message = f"cannot run {shown(program.command[0])}: {reason(error)}"
            raise DgemmaError(message, "--tool-run names the program.") from None
        problem = _wait(process, result.fileno(), program.seconds)
        result.seek(0)
        data = result.read(MOST_BYTES)
    if problem:
        print(f"dgemma-mlx: the tool {visible(call.name)} {problem}", file=sys.stderr)
        return {"error": f"the tool {problem}"}
    try:
        value = parse_json(data)
        json.dumps(value, allow_nan=False)  # NaN and 1e999 are no JSON, although Python reads them
        return value
    except ValueError:
        return data.decode(errors="replace").strip()


def _wait(process: subprocess.Popen[bytes], result: int, seconds: float) -> str:
    """Wait for the program, and return what is wrong with its end, or "". ``result`` is the file that it prints to."""
    deadline = time.monotonic() + seconds
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PAUSE)
            if os.fstat(result).st_size > MOST_BYTES:
                return f"printed more than {size(MOST_BYTES)}"
            if code := process.returncode:
                return f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            if code == 0:
                return ""
            if time.monotonic() > deadline:
                return f"took more than {seconds:g} s"
    finally:  # also after Ctrl-C
        if process.returncode is None:
            process.kill()
            process.wait()
