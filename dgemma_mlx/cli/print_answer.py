"""How ``generate`` asks the model and prints one answer: the text to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.batch import NO_ANSWER
from dgemma_mlx.cli.interrupt import interruptible, unless_cancelled
from dgemma_mlx.cli.render.visible import json_line
from dgemma_mlx.cli.summary import summary
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from dgemma_mlx.cli.log.session import Session
    from dgemma_mlx.cli.render.live import LiveView
    from dgemma_mlx.cli.tool_run import ToolProgram
    from dgemma_mlx.events import Done, Event
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.text.messages import Message
    from dgemma_mlx.text.parts import ToolCall


@dataclass(frozen=True)
class Printed:
    """How an answer is printed.

    Attributes:
        form: The form of the output: json, jsonl, code, live or text.
        markdown: Whether a live answer is drawn as Markdown.
        quiet: Whether only errors and warnings go to stderr.
        trace: The file that gets every event, or None.
        show_steps: Number of steps of each canvas that are printed to stderr, or None.
        progress: Whether a terminal shows on stderr how far the answer is until something is printed.
        runs_tools: Whether a program answers the calls of tools, which then are not part of what stdout gets.
        session: The conversation, to which results of tools are added.
        watched: A function that the events of each answer pass through before they are printed, which adds the answer
            to the conversation.
    """

    form: str
    markdown: bool
    quiet: bool
    trace: TextIO | None
    show_steps: int | None
    progress: bool
    runs_tools: bool
    session: Session
    watched: Callable[[Iterable[Event]], Iterator[Event]]


def print_answer(
    model: Model, prompt: str | Sequence[Message], arguments: dict[str, Any], printed: Printed
) -> Done:
    """Generate one answer, print it and return it. Raises `DgemmaError` when there is none of what is asked for."""
    from dgemma_mlx.cli.code_block import check_block
    from dgemma_mlx.cli.progress import Progress
    from dgemma_mlx.cli.render.plain import print_note, print_warnings, traced, with_snapshots
    from dgemma_mlx.generation.api import stream

    view = _view(model, printed.markdown) if printed.form == "live" else None
    with (
        interruptible() as cancelled,
        Progress(shown=printed.progress) as progress,
        closing(
            stream(model, prompt, **arguments, cancelled=cancelled, encoded=(view or progress).encoded)
        ) as answering,
    ):
        events: Iterable[Event] = progress.until_printed(unless_cancelled(printed.watched(answering)), printed.form)
        if printed.trace is not None:
            events = traced(events, printed.trace, model.name)
        if printed.show_steps is not None:
            events = with_snapshots(events, printed.show_steps, model.tokenizer.decode)
        done = _print(events, model, printed, view)
    if not printed.quiet:
        print_note(summary(done))
    print_warnings(done)
    if done.is_blank and arguments["constraint"] is None:
        raise DgemmaError(NO_ANSWER, "Try another --seed, or word the prompt differently.")
    if printed.form == "code" and not done.tool_calls:
        check_block(done)
    return done


def print_with_tools(
    model: Model, prompt: str | list[dict[str, Any]], arguments: dict[str, Any], printed: Printed, program: ToolProgram
) -> Done:
    """Generate answers until one has no call of a tool, let the program answer the calls, and print all of it.

    A call that ``tool_choice`` requires is required of the first answer only. Results of tools go to stderr, or are
    events of ``--jsonl`` and ``--trace``. Raises `DgemmaError` as ``print_answer`` and ``answer_with_tools`` do.
    """
    from dgemma_mlx.cli.tool_run import answer_with_tools
    from dgemma_mlx.generation.prompt_cache import PromptCache

    later = {**arguments, "prompt_cache": arguments["prompt_cache"] or PromptCache()}
    first = dict(later)
    if later["tool_choice"] != "none":
        later["tool_choice"] = "auto"

    begun = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    length = len(begun)

    def answer(messages: list[dict[str, Any]]) -> Done:
        return print_answer(model, messages, first if len(messages) == length else later, printed)

    def report(call: ToolCall, result: Any) -> None:
        printed.session.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        line = json_line({"event": "tool_result", "id": call.id, "name": call.name, "content": result})
        if printed.trace is not None:
            printed.trace.write(line + "\n")
        if printed.form == "jsonl":
            print(line, flush=True)
        elif not printed.quiet:
            print(f"tool result: {json_line(result)}", file=sys.stderr)

    return answer_with_tools(answer, begun, program, report)


def _view(model: Model, markdown: bool) -> LiveView:
    """Return the view that draws a live answer."""
    from dgemma_mlx.cli.render.live import LiveView

    return LiveView(sys.stdout, model.tokenizer, model.generation.eos_token_ids, markdown=markdown)


def _print(events: Iterable[Event], model: Model, printed: Printed, view: LiveView | None) -> Done:
    """Print the events in one of the forms json, jsonl, code, live (with a view) and text, and return the last one."""
    from dgemma_mlx.cli.render.plain import print_json, print_lines, print_text, print_tool_calls

    if printed.form == "json":
        return print_json(events, model.name, with_calls=not printed.runs_tools)
    if printed.form == "jsonl":
        return print_lines(events, model.name)
    if printed.form == "code":
        from dgemma_mlx.cli.code_block import print_block

        done = print_block(events)
    elif view is not None:
        from dgemma_mlx.cli.render.live import draw

        done = draw(events, view)
    else:
        done = print_text(events, printed.quiet)
    if printed.runs_tools:
        print_tool_calls(done)
    else:
        for call in done.tool_calls:
            print(json_line(asdict(call)))
    return done
