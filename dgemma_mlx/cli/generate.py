"""``dgemma-mlx generate``: one prompt, one answer. The answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.batch import NO_ANSWER, answer_batch, read_batch
from dgemma_mlx.cli.constraint import ConstraintOptions, constraint_of
from dgemma_mlx.cli.generate_options import (
    Batch,
    BatchSize,
    OutputOptions,
    PrefillStep,
    ScheduleOptions,
    TrimCanvas,
)
from dgemma_mlx.cli.interrupt import interruptible, unless_cancelled
from dgemma_mlx.cli.loading import answer_arguments, load_model
from dgemma_mlx.cli.log.asking import asked, begun
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.options import ConversationOptions
from dgemma_mlx.cli.parameters import (
    AnswerOptions,
    DenoisingOptions,
    MaxTokens,
    ModelOptions,
    Prompt,
    Raw,
    Thinking,
    VerifyMode,
)
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt import read_prompt
from dgemma_mlx.cli.prompt_cache import PromptCacheFile, kept_prompt_cache
from dgemma_mlx.cli.render.region import can_draw
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.summary import summary
from dgemma_mlx.cli.tools import ToolOptions, check_choice, read_tools
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from typing import TextIO

    from dgemma_mlx.cli.render.live import LiveView
    from dgemma_mlx.events import Done, Event
    from dgemma_mlx.generation.model import Model


def generate(
    prompt: Prompt = None,
    *,
    model: ModelOptions,
    answer: AnswerOptions,
    raw: Raw = False,
    thinking: Thinking = None,
    conversation: ConversationOptions,
    tool: ToolOptions,
    batch: Batch = None,
    batch_size: BatchSize = None,
    output: OutputOptions,
    constraint: ConstraintOptions,
    max_tokens: MaxTokens = None,
    denoising: DenoisingOptions,
    verify: VerifyMode = None,
    schedule: ScheduleOptions,
    trim_canvas: TrimCanvas = False,
    prefill_step_size: PrefillStep = None,
    prompt_cache: PromptCacheFile = None,
) -> None:
    """Answer one prompt, or every prompt of a file.

    Text on standard input follows the prompt; with `-` or without a prompt, it is the prompt. The answer goes to
    stdout, each canvas as soon as it is final. Everything else goes to stderr. Options that are not given come from
    the settings (`dgemma-mlx config`), then from the checkpoint's `generation_config.json`.

    Notes:
        - Next to a prompt, standard input is read if it is a file that nobody has begun to read, or a pipe that begins
          within ten seconds; a line on stderr says when it is waited for. In a loop such as `while read`, and where a
          program leaves a pipe open, add `< /dev/null` to the command.
        - `--continue` (or `-c`) goes on with the last conversation of `generate` or `chat`, and `--session` with the
          one of that name or id, or begins it. Its messages, system prompt and model are taken, unless options name
          others. `dgemma-mlx sessions` lists and searches all answers; DGEMMA_LOG=off keeps none.
        - On a terminal, the canvas is drawn while it denoises: the less settled a token is, the dimmer it is. What is
          final scrolls up, drawn as Markdown unless it is raw, matches a constraint, or the setting `markdown` is
          false. Without a terminal, or with NO_COLOR or TERM=dumb, no escape codes are written.
        - `--json` prints the text, thinking, tool calls, tokens, finish_reason, seed and statistics. `--jsonl` and
          `--trace` write one object per denoising step and per canvas, and one for the whole answer.
        - `--tools FILE` holds one tool, or a list of them, as OpenAI or Anthropic declare tools. The arguments of every
          call validate against the tool's parameters (docs/tools.md). A call is printed to stderr as a line
          `tool call: name {arguments}`, and `--json` has it in `tool_calls`.
        - A line of a `--batch` file is a JSON string, or an object with `prompt` and optionally `id`, `system`, `seed`,
          `max_tokens`, `tools` and `tool_choice`. The model is loaded once. Every line is checked before the first one
          is answered. With `--batch-size N`, N prompts are answered at a time, each as it would be alone, or fewer when
          N exceed the memory limit.
        - `--speed reference` follows the reference implementation's loop step by step. `balanced` also commits a canvas
          as soon as every position is nearly certain; `fast` accepts less certainty. On the demo model, `balanced`
          takes 1.4 times fewer steps and answers 939 instead of 942 of 1,000 prompts correctly (docs/speed.md). Except
          with `reference`, a canvas that is uncertain after all its steps is started again once. If it stays
          uncertain, a line on stderr and `low_confidence` in the events say so.
        - An answer ends at a canvas that holds nothing but padding; except with `reference`, such a canvas is first
          started again once. An answer without any text is reported as "the model gave no answer", with exit code 1.
        - `--verify flag` lets the encoder read each canvas and reports the tokens it would have written differently
          (`doubted` in the events). `--verify repair` denoises the canvas again from there. Both help where the answer
          follows from the prompt, and are of no use for open prose. A repair keeps to a constraint.
        - `--regex`, `--choice`, `--json-schema` and `--grammar` exclude each other. The canvas is projected onto the
          constraint in every step, so the answer always matches (docs/constrained.md). With `--thinking`, a thought may
          stand before it; with `--tools`, calls may stand in its place. A schema or grammar is a file, or the text
          itself. Unsupported features are refused before anything is generated.
        - The same seed gives the same text on one machine. `--temp 0` takes the most probable tokens as the denoiser's
          canvas. Any other value replaces the temperature schedule by a constant.
        - `--trim-canvas` makes the last canvas a multiple of 64 tokens long. The text changes because every canvas is
          denoised as a whole.
        - `--prompt-cache FILE` saves the encoded prompt, also after Ctrl-C. The next run that begins with the same text
          encodes only what is new. A file fits one model computed in one way: other weights, another adapter, dtype or
          device, packed instead of unpacked weights, Metal kernels switched on or off, another version of dgemma-mlx
          or MLX, and damage are refused with one line that says so.
        - `--memory-limit 20GB` works in smaller steps when the estimate of `dgemma-mlx info` exceeds the limit, and
          refuses what does not fit even then. The default limit is the GPU's own and only makes the steps smaller.
        - Without Metal, packed weights are unpacked at load when half of the free memory holds them, because MLX
          multiplies by packed weights slowly there. Weights that stay packed are mostly multiplied in unpacked blocks.
          Everything is computed in float32 there, because MLX's CPU back end is slow in bfloat16.
        - Control tokens that are typed into a prompt are plain text. Thinking and tool calls are reported as such,
          never as raw tokens.

    Examples:
        dgemma-mlx generate -m demo "Sort 7 3 5"
        dgemma-mlx generate -m demo --choice yes,no,72 "What is 27 + 45?"
        dgemma-mlx generate -c "Reverse 3 5 7"
        cat notes.txt | dgemma-mlx generate -m mlx-community/diffusiongemma-26B-A4B-it-4bit "Summarise:"
    """
    if output.as_json and output.as_json_lines:
        raise DgemmaError("--json and --jsonl exclude each other", "--json prints the answer, --jsonl all events.", 2)
    _check_batch(batch, batch_size or 1, prompt, output, prompt_cache, trim_canvas)
    conversation.check(raw=raw, batch=batch is not None)
    matched = constraint_of(**asdict(constraint))
    tools = None if tool.tools is None else read_tools(tool.tools)
    if batch is None:
        check_choice(tools, tool.tool_choice)
    text = read_prompt(prompt) if batch is None else ""
    requests = [] if batch is None else read_batch(batch, tools, tool.tool_choice)
    if answer.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    settings = Settings()
    arguments: dict[str, Any] = {
        **answer_arguments(settings, answer, raw), "raw": raw, "trim_canvas": trim_canvas, "constraint": matched,
        "max_tokens": settings.pick("max_tokens", max_tokens), "temp": settings.pick("temp", denoising.temp),
        "thinking": settings.pick("thinking", thinking), "prefill_step_size": prefill_step_size,
        "speed": settings.pick_checked("speed", denoising.speed), "verify": settings.pick_checked("verify", verify),
        "tools": tools, "tool_choice": tool.tool_choice,
    }  # fmt: skip
    loop = {"max_denoising_steps": denoising.max_denoising_steps, **asdict(schedule)}
    form = output.form(live=not answer.quiet and can_draw() and settings["live"].value)
    session, chosen = begun(conversation, settings, answer, model, arguments["system"])
    arguments["system"] = session.system
    with quiet_when_closed(), _open(output.trace) as trace:
        loaded = load_model(settings, chosen, answer.quiet)
        in_force = {name: settings.pick(name, option) for name, option in loop.items()}
        arguments["generation"] = loaded.generation.override(**in_force)
        if batch is not None:
            answer_batch(loaded, requests, arguments, batch_size or 1, Keeper(settings))
        else:
            with (
                kept_prompt_cache(prompt_cache, loaded) as arguments["prompt_cache"],
                Keeper(settings).keeping(session, "raw" if raw else "generate", loaded.name) as watched,
            ):
                markdown = settings["markdown"].value and not raw and matched is None
                _answer(loaded, asked(session, text), arguments, watched, trace, output.show_steps, form, markdown,
                        answer.quiet)  # fmt: skip


def _answer(
    model: Model, prompt: str | list[dict[str, Any]], arguments: dict[str, Any],
    watched: Callable[[Iterable[Event]], Iterator[Event]], trace: TextIO | None, show_steps: int | None, form: str,
    markdown: bool, quiet: bool,
) -> None:
    """Generate one answer and print it. The events pass through ``watched``."""
    from dgemma_mlx.cli.render.live import LiveView
    from dgemma_mlx.cli.render.plain import print_warnings, traced, with_snapshots
    from dgemma_mlx.generation.api import stream

    view = None
    if form == "live":
        view = LiveView(sys.stdout, model.tokenizer, model.generation.eos_token_ids, markdown=markdown)
    encoded = None if view is None else view.encoded
    with (
        interruptible() as cancelled,
        closing(stream(model, prompt, **arguments, cancelled=cancelled, encoded=encoded)) as answering,
    ):
        events: Iterable[Event] = unless_cancelled(watched(answering))
        if trace is not None:
            events = traced(events, trace, model.name)
        if show_steps is not None:
            events = with_snapshots(events, show_steps, model.tokenizer.decode)
        done = _print(events, model, form, view, quiet)
    if not quiet:
        print(summary(done), file=sys.stderr)
    print_warnings(done)
    if done.is_blank and arguments["constraint"] is None:
        raise DgemmaError(NO_ANSWER, "Try another --seed, or word the prompt differently.")


def _print(events: Iterable[Event], model: Model, form: str, view: LiveView | None, quiet: bool) -> Done:
    """Print the events in one of the forms json, jsonl, live (with a view) and text, and return the last one."""
    from dgemma_mlx.cli.render.plain import print_json, print_lines, print_text

    if form == "json":
        return print_json(events, model.name)
    if form == "jsonl":
        return print_lines(events, model.name)
    if view is None:
        return print_text(events, quiet)
    from dgemma_mlx.cli.render.live import draw

    return draw(events, view)


def _check_batch(
    batch: Path | None, size: int, prompt: str | None, output: OutputOptions, prompt_cache: Path | None,
    trim_canvas: bool,
) -> None:
    """Raise `DgemmaError` for options that exclude --batch, and for --batch-size without --batch."""
    if batch is None:
        if size > 1:
            raise DgemmaError(
                "--batch-size needs --batch", "`--batch FILE` names the file that holds the prompts.", exit_code=2
            )
        return
    steps = output.as_json_lines or output.trace is not None or output.show_steps is not None
    for given, options, hint in (
        (prompt is not None, "a prompt", "Put the prompt into the file."),
        (steps, "--jsonl, --trace or --show-steps", "--batch prints one JSON object per answer."),
        (prompt_cache is not None, "--prompt-cache", "A prompt cache holds one prompt."),
        (trim_canvas and size > 1, "--trim-canvas and a --batch-size above 1",
         "Prompts that are answered together would get other texts than alone."),
    ):  # fmt: skip
        if given:
            raise DgemmaError(f"--batch cannot be combined with {options}", hint, exit_code=2)


@contextmanager
def _open(path: Path | None) -> Iterator[TextIO | None]:
    """Open the file of --trace before any work is done; yield None without a path."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}", "Name another file.") from None
    with file:
        yield file
