"""``generate`` on real pseudo-terminals and pipes: what is written where, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.cli.render.plain import print_text, print_tool_calls, record
from dgemma_mlx.events import Committed, Done, Event
from dgemma_mlx.text import Tokenizer
from tests.cli.synthetic import answer
from tests.cli.terminal import Terminal

PROGRAM = (sys.executable, "-m", "dgemma_mlx")
GENERATE = ["generate", "-m", "demo", "--seed", "1"]
COUNT = "Count from 13 to 40."  # one line, two canvases
SUDOKU = "Solve this Sudoku:\n1 . 3 .\n3 4 . 2\n. 1 4 .\n4 . . 1"  # four lines
ESCAPE = b"\x1b"


def slowly(steps: int) -> list[str]:
    """Return options with which every canvas takes this many steps."""
    return ["--speed", "reference", "--max-denoising-steps", str(steps), "--stability-threshold", str(steps)]


def events(trace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]


def is_at_step(terminal: Terminal, step: int) -> bool:
    shown = re.search(r"step\s+(\d+)/", terminal.text)
    return shown is not None and int(shown[1]) >= step


def _parted(screen: str) -> tuple[str, str]:
    """Return what stands above the summary on stderr, and the summary, which may take several rows."""
    found = re.search(r"\n(\d+ tokens? in [^\0]*)\Z", screen)
    assert found is not None
    return screen[: found.start()], found[1].replace("\n", " ")


def assert_shows(terminal: Terminal, text: str) -> None:
    """Check that the terminal shows the answer and, after it, the summary on stderr."""
    screen = re.sub(r"\ndgemma-mlx: the answer was cut off after \d+ tokens, [a-z' ,\n-]+$", "", terminal.text)
    shown, summary = _parted(screen)
    assert shown == text.rstrip("\n")
    assert re.fullmatch(r"\d+ tokens in .* seed 1", summary)
    assert terminal.screen.is_sane


@pytest.mark.parametrize("size", [(80, 24), (40, 10)])
@pytest.mark.parametrize("prompt", [COUNT, SUDOKU])
def test_a_terminal_shows_the_answer(prompt: str, size: tuple[int, int], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Terminal([*GENERATE, "--trace", str(trace), prompt], *size) as terminal:
        assert terminal.finish() == 0
    text = events(trace)[-1]["text"]
    assert text.strip()
    assert b"canvas 1" in terminal.output and b"\x1b[?" not in terminal.output
    assert_shows(terminal, text)


def test_a_terminal_that_is_resized_meanwhile_shows_the_answer(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Terminal([*GENERATE, *slowly(60), "-n", "32", "--trace", str(trace), COUNT]) as terminal:
        for number, (columns, lines) in enumerate([(40, 24), (40, 10), (100, 10), (60, 30), (50, 20)]):
            terminal.wait_for(partial(is_at_step, terminal, 5 * (number + 1)))
            terminal.resize(columns, lines)
        assert terminal.finish() == 0
    assert_shows(terminal, events(trace)[-1]["text"])


@pytest.mark.parametrize(
    ("options", "variables"),
    [([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"}), (["--no-live"], {}), (["--show-steps", "2"], {})],
)
def test_no_escape_codes_where_none_are_wanted(options: list[str], variables: dict[str, str]) -> None:
    with Terminal([*GENERATE, "--speed", "reference", *options, "Sort 7 3 5"], env=variables) as terminal:
        assert terminal.finish() == 0
    assert ESCAPE not in terminal.output
    shown, _ = _parted(terminal.text)
    *steps, text = shown.split("\n")
    assert text == "3 5 7"
    assert len([line for line in steps if line.startswith("--- canvas 1, step ")]) == (2 if options[1:] else 0)


@pytest.mark.parametrize("rest", ["| cat", "> {file}", "| head -1", "2> {file}"])
def test_no_escape_codes_where_a_stream_is_not_a_terminal(rest: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    line = f"{shlex.join([*PROGRAM, *GENERATE, SUDOKU])} {rest.format(file=shlex.quote(str(file)))}"
    with Terminal([], program=("/bin/sh", "-c", line)) as terminal:
        assert terminal.finish() == 0
    written = terminal.output + (file.read_bytes() if file.exists() else b"")
    assert ESCAPE not in written
    lines = re.findall(rb"[1-4] [1-4] [1-4] [1-4]", written)  # the summary may come before a line feed
    assert len(lines) == (1 if "head" in rest else 4)
    if rest.startswith(">"):
        assert len(file.read_bytes().split()) == 16
    assert b"Error" not in written and b"rror:" not in written


def shell(rest: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program with --quiet in a line of the shell."""
    line = f"{shlex.join([*PROGRAM, *GENERATE, '-q', 'Sort 7 3 5'])} {rest}"
    null = subprocess.DEVNULL
    return subprocess.run(["/bin/sh", "-c", line], stdin=null, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(("closed", "answer"), [("<&-", b"3 5 7\n"), (">&-", b""), ("2>&-", b"3 5 7\n")])
def test_standard_streams_may_be_closed(closed: str, answer: bytes) -> None:
    done = shell(closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("rest", ["> /dev/full", "--trace /dev/full"])
def test_a_full_disk_is_one_line_and_a_hint(rest: str) -> None:
    done = shell(rest)
    assert done.returncode == 1 and done.stdout == b""
    first, hint = done.stderr.decode().splitlines()
    assert "No space left" in first and hint.startswith("hint: ")


def test_stdin_of_a_terminal_is_read_where_it_is_asked_for() -> None:
    with Terminal([*GENERATE, "-q", "-"]) as terminal:
        terminal.type("Sort 7 3 5\r\x04")
        assert terminal.finish() == 0
    assert terminal.text == "Sort 7 3 5\n3 5 7"


def interrupt(terminal: Terminal) -> None:
    """Press Ctrl-C and check that the program ends with 130 and a sane terminal."""
    terminal.type("\x03")
    assert terminal.finish() == 130
    assert terminal.screen.is_sane
    assert "Traceback" not in terminal.text and "canvas" not in terminal.text


def test_ctrl_c_while_it_loads(tmp_path: Path) -> None:
    for file in DEMO_FOLDER.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    os.mkfifo(tmp_path / "generation_config.json")
    with Terminal(["generate", "-m", str(tmp_path), "Sort 7 3 5"]) as terminal:
        writer = None
        while writer is None:  # until the program reads
            try:
                writer = os.open(tmp_path / "generation_config.json", os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                assert error.errno == errno.ENXIO
                time.sleep(0.01)
        # The program is about to read. Python checks for signals before and after a read, so a signal in between is
        # noticed only when there is something to read.
        time.sleep(1)
        interrupt(terminal)
        os.close(writer)
    assert terminal.text == "^Cinterrupted"


def test_ctrl_c_while_it_reads_the_prompt() -> None:
    with Terminal([*GENERATE, "--prefill-step-size", "1", "add 1 and 2 " * 250]) as terminal:
        terminal.wait_for_text("reading the prompt")
        interrupt(terminal)
    assert terminal.text == "interrupted"


def test_ctrl_c_in_the_first_canvas() -> None:
    with Terminal([*GENERATE, *slowly(10_000), COUNT]) as terminal:
        terminal.wait_for(partial(is_at_step, terminal, 3))
        interrupt(terminal)
    assert terminal.text == "interrupted"


def test_ctrl_c_in_a_later_canvas_keeps_what_is_committed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Terminal([*GENERATE, *slowly(150), "--trace", str(trace), COUNT]) as terminal:
        terminal.wait_for_text("canvas 2")
        interrupt(terminal)
    (committed,) = (event["text"] for event in events(trace) if event["event"] == "committed")
    assert committed.startswith("13 14")
    assert terminal.text == committed.rstrip() + "\ninterrupted"


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, timeout=60, env=environment, check=False
    )


def test_jsonl_and_the_trace_tell_every_event(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    done = run(*GENERATE, "-q", "--jsonl", "--trace", str(trace), COUNT)
    assert done.stdout.decode() == trace.read_text(encoding="utf-8")
    told = events(trace)
    drafts = [event for event in told if event["event"] == "draft"]
    committed = [event for event in told if event["event"] == "committed"]
    last = told[-1]
    assert last["event"] == "done" and last["model"] == "demo" and last["seed"] == 1
    assert len(drafts) + len(committed) + 1 == len(told)
    assert len(drafts) == last["statistics"]["denoising_steps"]
    assert [event["canvas"] for event in committed] == [0, 1]
    assert "".join(event["text"] for event in committed) == last["text"]
    for draft in drafts:
        assert len(draft["tokens"]) == len(draft["accepted_mask"]) == len(draft["entropy"]) == 32


def test_the_keys_of_a_committed_event() -> None:
    event = Committed(0, (5, 1), "text", "", (), steps=3, settled_by=None, doubted=(0,))
    keys = ["event", "canvas", "tokens", "text", "thinking", "tool_calls", "steps", "settled_by", "is_last",
            "low_confidence", "doubted"]  # fmt: skip
    assert list(record(event, "demo")) == keys
    assert record(event, "demo")["low_confidence"] is event.low_confidence


def test_snapshots_are_of_each_canvas_and_on_stderr() -> None:
    plain = run(*GENERATE, COUNT)
    done = run(*GENERATE, "--show-steps", "3", COUNT)
    assert done.stdout == plain.stdout
    steps = re.findall(r"--- canvas (\d), step (\d+) of (\d+), mean entropy [\d.]+\n", done.stderr.decode())
    for canvas in ("1", "2"):
        own = [(int(step), int(count)) for number, step, count in steps if number == canvas]
        count = own[0][1]
        assert [step for step, _ in own] == sorted({step for step, _ in own}) and len(own) == min(3, count)
        assert own[-1][0] == count and (count < 2 or own[0][0] == 1)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--json", "--jsonl", "hi"], 2, "exclude each other"),
        (["--batch-size", "2", "hi"], 2, "--batch-size needs --batch"),
        (["--batch", "x", "--batch-size", "2", "--trim-canvas"], 2, "--batch cannot be combined with --trim-canvas"),
        (["--trace", "/nowhere/file", "hi"], 1, "/nowhere/file"),
        (["--show-steps", "0", "hi"], 2, "--show-steps"),
        (["--seed", str(2**64), "hi"], 2, "--seed"),
        ([os.fsdecode(b"caf\xe9")], 2, "not UTF-8"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(arguments: list[str], exit_code: int, message: str) -> None:
    done = run("generate", "-m", "./nowhere", *arguments)
    assert done.returncode == exit_code
    assert done.stdout == b""
    first, hint = (done.stderr.decode() + "\n").split("\n")[:2]
    assert first.startswith("dgemma-mlx: ") and message in first and (not hint or hint.startswith("hint: "))


class Pipe:
    """A buffered standard output into a pipe, and the text that has arrived at the other end."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self._reader = os.fdopen(reader, "rb", buffering=0)
        os.set_blocking(reader, False)
        self.writer = os.fdopen(writer, "w", encoding="utf-8")
        self.text = ""

    def read(self) -> str:
        self.text += (self._reader.read() or b"").decode()
        return self.text

    def close(self) -> None:
        self.writer.close()
        self._reader.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_each_canvas_arrives_when_it_is_committed_and_as_it_is(
    pipe: Pipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", pipe.writer)
    text = "\x1b[31mraw\x1b[0m \u202e 北京 one two three four five\nsix seven eight"

    def watched() -> Iterator[Event]:
        committed = ""
        for event in answer(tokenizer, tokenizer.encode(text)):
            yield event
            if isinstance(event, Committed):
                committed += event.text
                assert pipe.read() == committed

    done = print_text(watched(), quiet=False)
    assert done.text == text
    assert pipe.read() == text + "\n"


def test_thinking_goes_to_stderr_on_lines_of_its_own(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    special = tokenizer.special_ids
    channel = [special["<|channel>"], *tokenizer.encode("thought\nWell, well."), special["<channel|>"]]
    for quiet in (False, True):
        print_text(answer(tokenizer, channel + tokenizer.encode("Yes.")), quiet)
        written = capsys.readouterr()
        assert written.out == "Yes.\n"
        assert written.err == ("" if quiet else "Well, well.\n")


def test_tool_calls_are_printed_safely(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    call = tokenizer.encode_control('<|tool_call>call:add{a:1,b:<|"|>\x1b\x9b<|"|>}<tool_call|>')
    print_tool_calls(print_text(answer(tokenizer, tokenizer.encode("Let me see.") + call), quiet=True))
    written = capsys.readouterr()
    assert written.out == "Let me see.\n"
    assert written.err == 'tool call: add {"a": 1, "b": "\\u001b\\u009b"}\n'


def test_what_only_done_holds_is_printed(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """An answer that is cancelled half-way through a tool call ends with what was written of it."""
    *before, done = answer(tokenizer, tokenizer.encode("Well."))
    assert isinstance(done, Done)
    print_text([*before, replace(done, text="Well.call:f{")], quiet=False)
    assert capsys.readouterr().out == "Well.call:f{\n"


def test_an_interrupted_answer_ends_with_a_line_feed(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[Event]:
        for event in answer(tokenizer, tokenizer.encode("some words " * 30)):
            yield event
            if isinstance(event, Committed):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_text(interrupted(), quiet=False)
    written = capsys.readouterr().out
    assert written.startswith("some words ") and written.endswith("\n")
