"""Print events as text or JSON, for pipes and for terminals without drawing."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

from dgemma_mlx.cli.render.visible import json_line, visible
from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event


class _Writer:
    """A stream that text is written to immediately: unchanged to a pipe, made safe on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._safe: Callable[[str], str] = visible if stream.isatty() else str
        self._in_line = False

    def write(self, text: str) -> None:
        """Write a text and flush the stream."""
        if text:
            self._stream.write(self._safe(text))
            self._stream.flush()
            self._in_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Write a line feed unless the last text ended with one."""
        if self._in_line:
            self.write("\n")


def print_text(events: Iterable[Event], quiet: bool) -> Done:
    """Print each canvas to stdout as soon as it is final, and thinking to stderr. Return the last event.

    With ``quiet``, thinking is not printed.
    """
    answer, thinking = _Writer(sys.stdout), _Writer(sys.stderr)
    length = 0
    try:
        for event in events:
            if isinstance(event, Committed):
                if not quiet:
                    thinking.write(event.thinking)
                if event.text:
                    thinking.end_line()
                answer.write(event.text)
                length += len(event.text)
            elif isinstance(event, Done):
                thinking.end_line()
                answer.write(event.text[length:])  # of a tool call that was cancelled
                answer.end_line()
                return event
    finally:
        thinking.end_line()
        answer.end_line()
    raise AssertionError("stream() ends with Done")


def reading(part: Encoded) -> str:
    """Return how much of a prompt is encoded, as a terminal shows it meanwhile."""
    return f"reading the prompt: {part.tokens / part.total:.0%} of {part.total:,} tokens"


def print_note(text: str) -> None:
    """Print a line to stderr. On a terminal it breaks between words."""
    if sys.stderr.isatty():
        text = textwrap.fill(text, shutil.get_terminal_size().columns - 1, break_long_words=False)
    print(text, file=sys.stderr)


def print_tool_calls(answer: Done) -> None:
    """Print the tool calls of an answer to stderr, one per line."""
    for call in answer.tool_calls:
        print(f"tool call: {visible(call.name)} {json_line(call.arguments)}", file=sys.stderr)


def print_warnings(answer: Done) -> None:
    """Warn on stderr about an answer that is cut off, is uncertain, or has tokens that the encoder doubts."""
    if answer.finish_reason == "length" and not answer.is_blank:
        count = answer.statistics.generated_tokens
        print(f"dgemma-mlx: the answer was cut off after {count} tokens, by -n, by the model's limit or by padding",
              file=sys.stderr)  # fmt: skip
    uncertain, doubted = answer.statistics.low_confidence, answer.statistics.doubted_tokens
    if uncertain:
        canvases = "a canvas was" if uncertain == 1 else f"{uncertain} canvases were"
        print(f"dgemma-mlx: {canvases} still uncertain after all steps: low confidence", file=sys.stderr)
    if doubted:
        tokens = "a token" if doubted == 1 else f"{doubted} tokens"
        print(f"dgemma-mlx: the encoder doubts {tokens} of the answer", file=sys.stderr)


def print_json(events: Iterable[Event], model: str, *, with_calls: bool = True) -> Done:
    """Print the whole answer as one JSON object and return the last event.

    Unless ``with_calls``, an answer with tool calls is not printed, because another one follows.
    """
    done = next(event for event in events if isinstance(event, Done))
    if with_calls or not done.tool_calls:
        print(json_line({"model": model, **asdict(done)}))
    return done


def print_lines(events: Iterable[Event], model: str) -> Done:
    """Print every event as a line of JSON and return the last one."""
    for event in events:
        print(json_line(record(event, model)), flush=True)
        if isinstance(event, Done):
            return event
    raise AssertionError("stream() ends with Done")


def record(event: Event, model: str) -> dict[str, Any]:
    """Return an event as plain data. Its ``event`` is draft, committed or done."""
    fields: dict[str, Any] = {"event": type(event).__name__.lower()}
    if isinstance(event, Done):
        fields["model"] = model
    fields |= asdict(event)
    if isinstance(event, Committed):
        doubted = fields.pop("doubted")  # low_confidence is a property, which asdict leaves out
        fields |= {"low_confidence": event.low_confidence, "doubted": doubted}
    return fields


def traced(events: Iterable[Event], file: TextIO, model: str) -> Iterator[Event]:
    """Yield the events and write each of them to the file as a line of JSON."""
    for event in events:
        file.write(json_line(record(event, model)) + "\n")
        yield event


def with_snapshots(
    events: Iterable[Event], count: int, decode: Callable[[Iterable[int]], str]
) -> Iterator[Event]:
    """Yield the events. Before each committed canvas, print ``count`` of its steps to stderr."""
    drafts: list[Draft] = []
    for event in events:
        if isinstance(event, Draft):
            drafts.append(event)
        elif isinstance(event, Committed):
            for draft in _spread(drafts, count):
                print(f"--- canvas {draft.canvas + 1}, step {draft.step} of {len(drafts)}, "
                      f"mean entropy {draft.mean_entropy:.3f}", file=sys.stderr)  # fmt: skip
                print(visible(decode(draft.tokens)), file=sys.stderr)
            drafts = []
        yield event


def _spread(drafts: list[Draft], count: int) -> list[Draft]:
    """Return at most ``count`` drafts, evenly spaced: always the last one, and the first one if there are two."""
    if count >= len(drafts):
        return drafts
    if count == 1:
        return drafts[-1:]
    return [drafts[round(i * (len(drafts) - 1) / (count - 1))] for i in range(count)]
