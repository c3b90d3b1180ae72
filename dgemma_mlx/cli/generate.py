"""``dgemma-mlx generate``: one prompt, one answer; the answer on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.checks import LARGEST_SEED
from dgemma_mlx.cli.batch import answer_batch, read_batch
from dgemma_mlx.cli.constraint import Choice, Grammar, JsonSchema, Regex, constraint_of
from dgemma_mlx.cli.interrupt import interruptible, unless_cancelled
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt import read_prompt
from dgemma_mlx.cli.prompt_cache import PromptCacheFile, kept_prompt_cache
from dgemma_mlx.cli.settings import Settings, checked
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import parse_size

if TYPE_CHECKING:
    from typing import TextIO

    from dgemma_mlx.events import Done, Event
    from dgemma_mlx.generation.model import Model

Prompt = Annotated[str | None, typer.Argument(help="The prompt; '-' or none reads it from stdin.", show_default=False)]
ModelName = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A folder, a Hub id owner/name[@revision], or 'demo'. Else $DGEMMA_MODEL."),
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="A folder that dgemma-mlx train has written.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens; 1024 if not set.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SEED, help="One seed, one text (on one machine). Random by default.")
]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as plain text, without chat template.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="Let the model think first (shown on stderr).")
]
Dequantize = Annotated[
    str | None,
    typer.Option("--cpu-dequantize", help="auto, on or off: unpack 4- and 8-bit weights where there is no Metal."),
]
NoKernels = Annotated[bool, typer.Option("--no-kernels", help="Only plain MLX operations, none of our Metal kernels.")]
NoLive = Annotated[bool, typer.Option("--no-live", help="On a terminal, print canvases only when they are final.")]
ShowSteps = Annotated[
    int | None, typer.Option("--show-steps", min=1, help="Print so many steps of each canvas on stderr.")
]
Trace = Annotated[Path | None, typer.Option(help="Write each step to this file, as lines of JSON.")]
AsJsonLines = Annotated[bool, typer.Option("--jsonl", help="Print every event as a line of JSON.")]
Batch = Annotated[
    Path | None, typer.Option(help="Answer the prompts of a JSONL file, one JSON object a line out.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Of the prompts of --batch, answer so many at once; 1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
Temp = Annotated[
    float | None, typer.Option(min=0.0, help="A constant temperature; 0 takes the most probable tokens.")
]
Steps = Annotated[int | None, typer.Option("--max-denoising-steps", help="Steps a canvas may take at most.")]
EntropyBound = Annotated[float | None, typer.Option(help="Higher accepts more tokens a step.")]
TMin = Annotated[float | None, typer.Option("--t-min", help="Temperature towards the last step.")]
TMax = Annotated[float | None, typer.Option("--t-max", help="Temperature of the first step.")]
Confidence = Annotated[
    float | None, typer.Option("--confidence-threshold", help="Stop when the mean entropy is below.")
]
Stability = Annotated[
    int | None, typer.Option("--stability-threshold", help="Stop when unchanged for so many steps.")
]
SpeedMode = Annotated[
    str | None,
    typer.Option("--speed", help="reference, balanced or fast: what it takes to commit a canvas. Else balanced."),
]
VerifyMode = Annotated[
    str | None,
    typer.Option("--verify", help="off, flag or repair: have the encoder check each canvas. For answers that follow "
                 "from the prompt; of no use for open prose."),
]
TrimCanvas = Annotated[
    bool, typer.Option("--trim-canvas", help="Make the last canvas no longer than --max-tokens needs: less work.")
]
PrefillStep = Annotated[
    int | None, typer.Option(min=1, help="Prompt tokens encoded at once; affects memory only. 512, or what fits.")
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Work in smaller steps to stay within, as 20GB. By default what the device has.")
]


def generate(
    prompt: Prompt = None,
    model: ModelName = None,
    adapter: Adapter = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    thinking: Thinking = None,
    no_live: NoLive = False,
    show_steps: ShowSteps = None,
    trace: Trace = None,
    batch: Batch = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
    as_json_lines: AsJsonLines = False,
    quiet: Quiet = False,
    temp: Temp = None,
    max_denoising_steps: Steps = None,
    entropy_bound: EntropyBound = None,
    t_min: TMin = None,
    t_max: TMax = None,
    confidence_threshold: Confidence = None,
    stability_threshold: Stability = None,
    speed: SpeedMode = None,
    verify: VerifyMode = None,
    trim_canvas: TrimCanvas = False,
    prefill_step_size: PrefillStep = None,
    memory_limit: MemoryLimit = None,
    prompt_cache: PromptCacheFile = None,
    regex: Regex = None,
    choice: Choice = None,
    json_schema: JsonSchema = None,
    grammar: Grammar = None,
    cpu_dequantize: Dequantize = None,
    no_kernels: NoKernels = False,
) -> None:
    """Answer one prompt. Text on stdin is added after the prompt.

    What is not given comes from the settings (dgemma-mlx config), then from the checkpoint. The built-in demo knows
    its few tasks only; see dgemma-mlx --help.
    """
    if as_json and as_json_lines:
        raise DgemmaError("--json and --jsonl exclude each other", "--json prints the answer, --jsonl all events.", 2)
    _check_batch(batch, batch_size or 1, prompt, as_json_lines or trace is not None or show_steps is not None,
                 prompt_cache, trim_canvas)  # fmt: skip
    constraint = constraint_of(regex, choice, json_schema, grammar)
    text = read_prompt(prompt) if batch is None else ""
    requests = [] if batch is None else read_batch(batch)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    settings = Settings()
    loop = {
        "max_denoising_steps": max_denoising_steps, "entropy_bound": entropy_bound, "t_min": t_min, "t_max": t_max,
        "confidence_threshold": confidence_threshold, "stability_threshold": stability_threshold,
    }  # fmt: skip
    options: dict[str, Any] = {
        "max_tokens": settings.pick("max_tokens", max_tokens), "seed": settings.pick("seed", seed),
        "temp": settings.pick("temp", temp), "thinking": settings.pick("thinking", thinking), "raw": raw,
        # a system prompt from the settings is not meant for raw prompts
        "system": system if raw else settings.pick("system", system), "prefill_step_size": prefill_step_size,
        "speed": chosen(settings, "speed", speed), "verify": chosen(settings, "verify", verify),
        "trim_canvas": trim_canvas, "memory_limit": in_bytes(settings.pick("memory_limit", memory_limit)),
        "constraint": constraint,
    }  # fmt: skip
    live = settings.pick("live", False if no_live or quiet or show_steps else None) and draws()
    form = "json" if as_json else "jsonl" if as_json_lines else "live" if live else "text"
    with quiet_when_closed(), _open(trace) as file:
        loaded = load_as_told(settings, model, cpu_dequantize, no_kernels, quiet, adapter)
        options["generation"] = loaded.generation.override(**{n: settings.pick(n, flag) for n, flag in loop.items()})
        if batch is not None:
            answer_batch(loaded, requests, options, batch_size or 1)
        else:
            with kept_prompt_cache(prompt_cache, loaded) as options["prompt_cache"]:
                _answer(loaded, text, options, file, show_steps, form, quiet)


def chosen(settings: Settings, name: str, flag: Any) -> Any:
    """The flag, checked as the setting of its name is, or else that setting."""
    return settings.pick(name, None if flag is None else checked(name, flag, f"--{name}"))


def load_as_told(
    settings: Settings, model: str | None, cpu_dequantize: str | None, no_kernels: bool, quiet: bool = False,
    adapter: Path | None = None,
) -> Model:
    """The model of the flag or the settings, its weights and kernels as they say."""
    from dgemma_mlx.generation.api import load
    from dgemma_mlx.kernels.dispatch import set_mode

    set_mode(settings.pick("kernels", "off" if no_kernels else None))
    name = settings.pick("model", model)
    loaded = load(name, cpu_dequantize=settings.pick("cpu_dequantize", cpu_dequantize), adapter=adapter)
    if not quiet:
        announce_demo(name)
    return loaded


def _answer(
    model: Model, prompt: str, options: dict[str, Any], trace: TextIO | None, show_steps: int | None, form: str,
    quiet: bool,
) -> None:
    """Generates one answer and prints it."""
    from dgemma_mlx.cli.render.plain import traced, with_snapshots
    from dgemma_mlx.generation.api import stream

    with interruptible() as cancelled:
        events: Iterable[Event] = unless_cancelled(stream(model, prompt, **options, cancelled=cancelled))
        if trace is not None:
            events = traced(events, trace, model.name)
        if show_steps is not None:
            events = with_snapshots(events, show_steps, model.tokenizer.decode)
        done = _print(events, model, form, quiet)
    if not quiet:
        print(_summary(done), file=sys.stderr)
    warn_of_doubts(done)


def warn_of_doubts(done: Done) -> None:
    """What the user has to know of an answer that may be wrong, also when ``--quiet``."""
    uncertain, doubted = done.statistics.low_confidence, done.statistics.doubted_tokens
    if uncertain:
        canvases = "a canvas was" if uncertain == 1 else f"{uncertain} canvases were"
        print(f"dgemma-mlx: {canvases} still uncertain after all steps: low confidence", file=sys.stderr)
    if doubted:
        tokens = "a token" if doubted == 1 else f"{doubted} tokens"
        print(f"dgemma-mlx: the encoder doubts {tokens} of the answer", file=sys.stderr)


def _print(events: Iterable[Event], model: Model, form: str, quiet: bool) -> Done:
    from dgemma_mlx.cli.render.plain import print_json, print_lines, print_text

    if form == "json":
        return print_json(events, model.name)
    if form == "jsonl":
        return print_lines(events, model.name)
    if form != "live":
        return print_text(events, quiet)
    from dgemma_mlx.cli.render.live import draw

    return draw(events, model.tokenizer, model.generation.eos_token_ids)


def _check_batch(
    batch: Path | None, size: int, prompt: str | None, steps: bool, prompt_cache: Path | None, trim_canvas: bool
) -> None:
    """``DgemmaError`` where options are named that do not go with --batch, or not without."""
    if batch is None:
        if size > 1:
            raise DgemmaError("--batch-size goes with --batch", "It names the file of the prompts.", exit_code=2)
        return
    for named, options, hint in (
        (prompt is not None, "a prompt", "Put the prompt into the file."),
        (steps, "--jsonl, --trace and --show-steps", "It prints the answers."),
        (prompt_cache is not None, "--prompt-cache", "The file holds one prompt."),
        (trim_canvas and size > 1, "--trim-canvas where --batch-size is above 1", "The texts would be others."),
    ):
        if named:
            raise DgemmaError(f"--batch goes without {options}", hint, exit_code=2)


def in_bytes(size: str | None) -> int | None:
    """``20GB`` as a number; ``DgemmaError`` (exit code 2) for what is no size."""
    return None if size is None else parse_size(size)


def draws() -> bool:
    """Whether stdout and stderr are a terminal that can be drawn on."""
    able = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return able and sys.stdout.isatty() and sys.stderr.isatty()


@contextmanager
def _open(path: Path | None) -> Iterator[TextIO | None]:
    """The file of --trace, opened before any work."""
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}") from None
    with file:
        yield file


def announce_demo(model: str | None) -> None:
    """One line when no model was chosen, by option, environment or settings."""
    if model is None:
        print(
            "dgemma-mlx: no model chosen, so the built-in demo answers; for the real one: "
            "-m mlx-community/diffusiongemma-26B-A4B-it-4bit",
            file=sys.stderr,
        )


def _summary(done: Done) -> str:
    s = done.statistics

    def count(n: int, noun: str, nouns: str) -> str:
        return f"{n} {noun if n == 1 else nouns}"

    return (
        f"{count(s.generated_tokens, 'token', 'tokens')} in {count(s.canvases, 'canvas', 'canvases')}, "
        f"{count(s.denoising_steps, 'step', 'steps')} ({s.tokens_per_forward:.1f} tokens a step), "
        f"{s.seconds:.2f} s, {s.tokens_per_second:.0f} tokens/s, peak {s.peak_memory / 2**20:,.0f} MB, "
        f"seed {done.seed}"
    )
