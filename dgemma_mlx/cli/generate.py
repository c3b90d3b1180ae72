"""``dgemma-mlx generate``: one prompt, one answer. The answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.batch import answer_batch, read_batch
from dgemma_mlx.cli.constraint import ConstraintOptions, constraint_of
from dgemma_mlx.cli.generate_options import (
    BatchOptions,
    OutputOptions,
    PrefillStep,
    ScheduleOptions,
    TextOptions,
    TrimCanvas,
)
from dgemma_mlx.cli.image_options import MediaOptions, show_images
from dgemma_mlx.cli.loading import answer_arguments, load_model
from dgemma_mlx.cli.log.asking import asked, begun
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.log.options import ConversationOptions
from dgemma_mlx.cli.machines import TeamOptions, team_of
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
from dgemma_mlx.cli.print_answer import Printed, print_answer, print_with_tools
from dgemma_mlx.cli.prompt_cache import PromptCacheFile, kept_prompt_cache
from dgemma_mlx.cli.render.region import can_draw
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.tools import ToolOptions, check_choice, read_tools
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from typing import TextIO


def generate(
    prompt: Prompt = None,
    *,
    model: ModelOptions,
    machines: TeamOptions,
    answer: AnswerOptions,
    raw: Raw = False,
    thinking: Thinking = None,
    conversation: ConversationOptions,
    text: TextOptions,
    media: MediaOptions,
    tool: ToolOptions,
    batch: BatchOptions,
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
          within five seconds; a line on stderr says when it is waited for. `-f -` waits as long as it takes, and
          `< /dev/null` does not wait. Use that in a loop over a pipe (`... | while read`), whose other lines the
          command would read.
        - The files of `-f` stand before the prompt, each with its name and between fences. Of a folder, hidden files,
          binary files and what Git ignores are left out, which a line on stderr says. Too many or too large files are
          refused.
        - `-x` prints nothing but the first code block. An answer without one goes to stderr, with exit code 1.
        - A template is a file with a prompt that has gaps, and settings; see `dgemma-mlx templates --help`. Options
          override its settings.
        - `--continue` (or `-c`) goes on with the last conversation of `generate` or `chat`, and `--session` with the
          one of that name or id, or begins it. Its messages, system prompt and model are taken, unless options name
          others. `dgemma-mlx sessions` lists and searches all answers; DGEMMA_LOG=off keeps none.
        - On a terminal, the canvas is drawn while it denoises: the less settled a token is, the dimmer it is. What is
          final scrolls up, drawn as Markdown unless it is raw, matches a constraint, or the setting `markdown` is
          false. Without a terminal, or with NO_COLOR or TERM=dumb, no escape codes are written.
        - `--json` prints the text, thinking, tool calls, tokens, finish_reason, seed and statistics. `--jsonl` and
          `--trace` write one object per denoising step and per canvas, and one for the whole answer.
        - `--tool FILE` holds one tool, or a list of them, as OpenAI or Anthropic declare tools. The arguments of every
          call validate against the tool's parameters (docs/tools.md). A call is printed as a line of JSON with `name`,
          `arguments` and `id` after the text of the answer, and `--json` has it in `tool_calls`.
        - `--tool-run PROGRAM` is run for every call, with the call's JSON as its standard input. What it prints, as
          JSON or text, is the result, and the model goes on until it answers without a call. Calls and results then go
          to stderr. The model is told when the program fails or takes too long.
        - `--image` shows the model a picture before the prompt, and `--image -` the one on standard input.
          docs/images.md says what can be read, and how many tokens a picture becomes.
        - A line of a `--batch` file is a JSON string, or an object with `prompt` and optionally `images`, `id`,
          `system`, `seed`, `max_tokens`, `tools` and `tool_choice`. The model is loaded once. Every line is checked
          before the first one is answered. With `--batch-size N`, N prompts are answered at a time, each as it would be
          alone, or fewer when N exceed the memory limit.
        - With several machines, each loads the whole model and answers some of the prompts of a `--batch` file. The
          lines stay in order, and the answers are those of one machine. The work of a machine that is lost is done by
          the others. One prompt has the model cut over the machines, and so has a `--batch` with `--split`, for a model
          that is too large for one (docs/several-macs.md).
        - `--speed reference` follows the reference implementation's loop step by step. `balanced` also commits a canvas
          as soon as every position is nearly certain, or the encoder finds its text plausible; `fast` accepts less
          certainty. On the demo model, `balanced` does 2.0 times less work and answers as many of 1,000 prompts
          correctly (993), but where many answers are right, other seeds give the same one more often
          (docs/speed.md). Except with `reference`, a canvas that is uncertain after all its steps is started again
          once. If it stays uncertain, a line on stderr and `low_confidence` in the events say so.
        - An answer ends at a canvas that holds nothing but padding; except with `reference`, such a canvas is first
          started again once. An answer without any text is reported as "the model gave no answer", with exit code 1.
        - `--verify flag` lets the encoder read each canvas and reports the tokens it would have written differently
          (`doubted` in the events). `--verify repair` denoises the canvas again from there. Both help where the answer
          follows from the prompt, and are of no use for open prose. A repair keeps to a constraint.
        - `--regex`, `--choice`, `--json-schema` and `--grammar` exclude each other. The canvas is projected onto the
          constraint in every step, so the answer always matches (docs/constrained.md). With `--thinking`, a thought may
          stand before it; with `--tool`, calls may stand in its place. A schema or grammar is a file, or the text
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
        dgemma-mlx generate -f main.py -f tests/ "Why does the test fail?"
        dgemma-mlx generate -x "A shell script that renames *.jpeg to *.jpg" > rename.sh
        dgemma-mlx generate --image cat.jpg "What is the cat doing?"
        cat notes.txt | dgemma-mlx generate -m mlx-community/diffusiongemma-26B-A4B-it-4bit "Summarise:"
    """
    whole = machines.check_team(is_spread=batch.batch is not None)
    output.check()
    tool.check()
    _check_batch(batch, prompt, text, tool, output, prompt_cache, trim_canvas)
    machines.check_prompt_cache(prompt_cache)
    conversation.check(raw=raw, batch=batch.batch is not None)
    media.check(prompt_on_stdin=text.takes_stdin(prompt), raw=raw, batch=batch.batch is not None)
    matched = constraint_of(**asdict(constraint))
    tools = read_tools(tool.tool) if tool.tool else None
    program = tool.program()
    if batch.batch is None:
        check_choice(tools, tool.tool_choice)
    requests = [] if batch.batch is None else read_batch(
        batch.batch, tools, tool.tool_choice, media.budget
    )
    written, template = ("", {}) if batch.batch else text.read(prompt, answer.quiet, media.takes_stdin)
    images = media.read()
    if raw and "system" in template:
        raise DgemmaError("--raw excludes a template with a system prompt", "Leave one of them out.", exit_code=2)
    if answer.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    settings = Settings().under(template, f"template {text.template}")
    arguments: dict[str, Any] = {
        **answer_arguments(settings, answer, raw), "raw": raw, "trim_canvas": trim_canvas, "constraint": matched,
        "max_tokens": settings.pick("max_tokens", max_tokens), "temp": settings.pick("temp", denoising.temp),
        "thinking": settings.pick("thinking", thinking), "prefill_step_size": prefill_step_size,
        "speed": settings.pick_checked("speed", denoising.speed), "verify": settings.pick_checked("verify", verify),
        "tools": tools, "tool_choice": tool.tool_choice,
    }  # fmt: skip
    loop = {"max_denoising_steps": denoising.max_denoising_steps, **asdict(schedule)}
    if not (answer.quiet or output.as_json or output.as_json_lines):
        show_images(images, draw=settings["live"].value and not output.no_live)
    form = output.form(live=not answer.quiet and can_draw() and settings["live"].value)
    named = replace(answer, system=template["system"]) if answer.system is None and "system" in template else answer
    session, chosen = begun(conversation, settings, named, model, arguments["system"])
    arguments["system"] = session.system
    with quiet_when_closed(), _open(output.trace) as trace:
        loaded = load_model(settings, chosen, answer.quiet, images=bool(images), machines=machines,
                            whole=whole)  # fmt: skip
        in_force = {name: settings.pick(name, option) for name, option in loop.items()}
        arguments["generation"] = loaded.generation.override(**in_force)
        if batch.batch is not None:
            team = team_of(machines, loaded, whole)
            answer_batch(team, requests, arguments, batch.batch_size or 1, Keeper(settings))
            return
        with (
            kept_prompt_cache(prompt_cache, loaded) as arguments["prompt_cache"],
            Keeper(settings).keeping(session, "raw" if raw else "generate", loaded.name) as watched,
        ):
            drawn = settings["live"].value and not (answer.quiet or output.no_live or output.show_steps)
            markdown = settings["markdown"].value and not raw and matched is None
            printed = Printed(
                form, markdown, answer.quiet, trace, output.show_steps, progress=drawn and form != "live",
                runs_tools=program is not None, session=session, watched=watched,
            )  # fmt: skip
            question = asked(session, written, images)
            if program is None:
                print_answer(loaded, question, arguments, printed)
            else:
                print_with_tools(loaded, question, arguments, printed, program)


def _check_batch(
    many: BatchOptions, prompt: str | None, text: TextOptions, tool: ToolOptions, output: OutputOptions,
    prompt_cache: Path | None, trim_canvas: bool,
) -> None:
    """Raise `DgemmaError` for options that exclude --batch, and for --batch-size without --batch."""
    size = many.batch_size or 1
    if many.batch is None:
        if size > 1:
            raise DgemmaError(
                "--batch-size needs --batch", "`--batch FILE` names the file that holds the prompts.", exit_code=2
            )
        return
    steps = output.as_json_lines or output.trace is not None or output.show_steps is not None
    for given, options, hint in (
        (prompt is not None, "a prompt", "Put the prompt into the file."),
        (text != TextOptions(), "--file, --template or --param", "Put the whole prompts into the file."),
        (tool.tool_run is not None, "--tool-run", "--batch prints the calls of every answer."),
        (steps or output.extract, "--jsonl, --trace, --show-steps or --extract",
         "--batch prints one JSON object per answer."),
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
