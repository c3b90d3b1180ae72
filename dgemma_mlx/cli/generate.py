"""``dgemma-mlx generate``: one prompt, one answer; the answer on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt import read_prompt

if TYPE_CHECKING:
    from dgemma_mlx.engine import Model
    from dgemma_mlx.events import Done, Event

Prompt = Annotated[str | None, typer.Argument(help="The prompt; '-' or none reads it from stdin.", show_default=False)]
ModelName = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A folder, a Hub id owner/name[@revision], or 'demo'. Else $DGEMMA_MODEL."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="One seed, one text (on one machine). Random by default.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as plain text, without chat template.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let the model think first (shown on stderr).")]
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
PrefillStep = Annotated[int, typer.Option(min=1, help="Prompt tokens encoded at once; affects memory only.")]


def generate(
    prompt: Prompt = None,
    model: ModelName = None,
    max_tokens: MaxTokens = 1024,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    thinking: Thinking = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    temp: Temp = None,
    max_denoising_steps: Steps = None,
    entropy_bound: EntropyBound = None,
    t_min: TMin = None,
    t_max: TMax = None,
    confidence_threshold: Confidence = None,
    stability_threshold: Stability = None,
    prefill_step_size: PrefillStep = 512,
) -> None:
    """Answer one prompt. Text on stdin is added after the prompt.

    Parameters that are not given come from the checkpoint. The built-in demo knows its few tasks only; see
    dgemma-mlx --help.
    """
    text = read_prompt(prompt)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from dgemma_mlx.engine import load, stream

    loaded = load(model)
    if not quiet:
        _announce_demo(model)
    events = stream(
        loaded, text, max_tokens=max_tokens, seed=seed, temp=temp, system=system, raw=raw, thinking=thinking,
        prefill_step_size=prefill_step_size,
        generation=loaded.generation.override(
            max_denoising_steps=max_denoising_steps, entropy_bound=entropy_bound, t_min=t_min, t_max=t_max,
            confidence_threshold=confidence_threshold, stability_threshold=stability_threshold,
        ),
    )
    with quiet_when_closed():
        done = _print_json(events, loaded) if as_json else _print_text(events, quiet)
        if not quiet:
            print(_summary(done), file=sys.stderr)


def _announce_demo(model: str | None) -> None:
    """One line when no model was chosen, by option or environment."""
    from dgemma_mlx.hub import MODEL_VARIABLE

    if model is None and not os.environ.get(MODEL_VARIABLE):
        print(
            "dgemma-mlx: no model chosen, so the built-in demo answers; for the real one: "
            "-m mlx-community/diffusiongemma-26B-A4B-it-4bit",
            file=sys.stderr,
        )


def _print_text(events: Iterable[Event], quiet: bool) -> Done:
    """Writes each committed canvas when it is final."""
    from dgemma_mlx.events import Committed, Done

    last = "\n"
    for event in events:
        if isinstance(event, Committed):
            if event.text:
                sys.stdout.write(event.text)
                sys.stdout.flush()
                last = event.text[-1]
            if event.thinking and not quiet:
                print(event.thinking, end="", file=sys.stderr, flush=True)
            for call in event.tool_calls:
                print(f"tool call: {call.name} {json.dumps(call.arguments, ensure_ascii=False)}", file=sys.stderr)
        elif isinstance(event, Done):
            if last != "\n":
                print(flush=True)
            return event
    raise AssertionError("stream() ends with Done")


def _print_json(events: Iterable[Event], model: Model) -> Done:
    from dgemma_mlx.events import Done

    done = next(event for event in events if isinstance(event, Done))
    record: dict[str, Any] = {"model": model.name, **asdict(done)}
    print(json.dumps(record, ensure_ascii=False))
    return done


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
