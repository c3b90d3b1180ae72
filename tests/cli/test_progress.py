"""The line on a terminal that says how much of a long prompt is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from dgemma_mlx.cli.progress import Progress
from dgemma_mlx.events import Encoded, Event
from dgemma_mlx.text import Tokenizer
from tests.cli.synthetic import answer
from tests.cli.terminal import ScreenStream, Terminal

LONG = "Sort 7 3 5. " * 40


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScreenStream]:
    stream = ScreenStream(40, 5)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield stream
    stream.close()


def test_the_line_is_erased_before_the_first_event_that_is_printed(
    stderr: ScreenStream, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stderr)
    for form, printed in (("jsonl", "Draft"), ("text", "Committed"), ("json", "Done")):
        events: list[Event] = list(answer(tokenizer, tokenizer.encode("Yes.")))
        with Progress(shown=True) as progress:
            progress.encoded(Encoded(512, 2048))
            assert stderr.screen.rows == ["reading the prompt: 25% of 2,048 tokens"]
            for event in progress.until_printed(iter(events), form):
                if type(event).__name__ == printed:
                    break
                assert stderr.screen.rows[0].startswith("canvas 1, step ")
            assert stderr.screen.rows == []
    assert stderr.screen.is_sane


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_nothing_is_drawn_where_that_is_not_wanted(
    stderr: ScreenStream, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stderr)
    with Progress(shown=False) as progress:
        progress.encoded(Encoded(1, 2))
    monkeypatch.setenv(variable, "dumb")
    with Progress(shown=True) as progress:
        progress.encoded(Encoded(1, 2))
    assert stderr.output == ""


def test_json_on_a_terminal_shows_the_progress_of_the_prompt() -> None:
    arguments = ["generate", "-m", "demo", "--seed", "1", "--json", "-n", "32", "--prefill-step-size", "64", LONG]
    with Terminal(arguments) as terminal:
        terminal.finish()
    assert terminal.output.count(b"reading the prompt: ") > 2 and b"reading the prompt: 100%" in terminal.output
    assert "reading" not in terminal.text and terminal.text.startswith("{")
