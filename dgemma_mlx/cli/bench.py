"""``dgemma-mlx bench``: measure the speed and the memory of a model on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.doctor import examine
from dgemma_mlx.cli.loading import load_model
from dgemma_mlx.cli.machines import TeamOptions, team_of
from dgemma_mlx.cli.parameters import AsJson, CpuDequantize, Dtype, ModelName, ModelOptions, NoKernels, section
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import rate

if TYPE_CHECKING:
    from dgemma_mlx.distributed.channel import Channel
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.text import Tokenizer

_LENGTHS = (512, 4096)  # default prompt lengths, as far as the model holds them
_MAX_TOKENS = 512  # longest timed answer
_DEMO_PROMPT = "Count from 13 to 40."
_PROMPT = "Explain in about 300 words why the sky is blue."
_MACHINE = ("chip", "machine", "memory", "os", "metal", "gpu_memory")
_VERSIONS = ("dgemma_mlx", "mlx", "python")

measure_option = section("Measurements")

PromptTokens = Annotated[
    str | None,
    measure_option("--prompt-tokens", metavar="N,N", show_default="512,4096", help="Lengths of the prompts in tokens."),
]
Steps = Annotated[int, measure_option("--steps", min=1, help="Denoising steps timed after each prompt.")]
Runs = Annotated[int, measure_option("--runs", min=1, help="Number of times everything is measured.")]
Prompt = Annotated[
    str | None, measure_option("--prompt", show_default="a built-in one", help="The prompt of the timed answer.")
]

Progress = Callable[[str], None]


def bench(
    prompt_tokens: PromptTokens = None,
    steps: Steps = 8,
    runs: Runs = 3,
    prompt: Prompt = None,
    model: ModelName = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    cpu_dequantize: CpuDequantize = None,
    no_kernels: NoKernels = False,
    *,
    machines: TeamOptions,
) -> None:
    """Measure the speed and the peak memory of a model.

    The command times the encoding of prompts of several lengths, the denoising steps after them, and a whole answer. It
    prints medians and the smallest and largest values of `--runs` runs. docs/benchmarks.md explains how to compare with
    other programs. Several machines measure at the same time, each with the whole model; `--json` then prints a list.

    Examples:
        dgemma-mlx bench -m demo
        dgemma-mlx bench -m demo --prompt-tokens 64,512 --runs 5 --json
    """
    whole = machines.check_team(is_spread=True)
    from dgemma_mlx.distributed.tasks import Work

    asked = None if prompt_tokens is None else _parse_lengths(prompt_tokens)
    options = ModelOptions(model, None, dtype, cpu_dequantize, no_kernels)
    loaded = load_model(Settings(), options, quiet=as_json, checked=True, machines=machines, whole=whole)
    lengths = _fitting(asked, loaded)
    question = prompt or (_DEMO_PROMPT if loaded.name == "demo" else _PROMPT)
    with _progress(runs * (len(lengths) + 1) + 1) as progress:
        task = {"kind": "bench", "lengths": lengths, "steps": steps, "runs": runs, "question": question}
        work = Work(
            lambda task: _measured(loaded, task, progress), lambda task: task, lambda task, answer: answer["facts"]
        )
        pool = team_of(machines, loaded, whole, says_lost=False).pool
        found = pool.on_each(task, work)
    with quiet_when_closed():
        if len(found) == 1:
            print(json.dumps(found[0]) if as_json else _as_text(found[0]))
            return
        named = [{"host": name, **facts} for name, facts in zip(pool.names, found, strict=True)]
        print(json.dumps(named) if as_json else of_all(named))


def measure_task(model: Model, task: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Measure on another machine."""
    return {"facts": _measured(model, task, lambda what: None)}


def _measured(model: Model, task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return the measurements and what they depend on. ``task`` has the arguments of `measure`."""
    results = measure(model, task["lengths"], task["steps"], task["runs"], task["question"], progress)
    return {**_circumstances(model, task["steps"], task["runs"]), **results}


def measure(
    model: Model, lengths: Sequence[int], steps: int, runs: int, question: str, progress: Progress
) -> dict[str, Any]:
    """Return the measurements: times in seconds, memory in bytes.

    ``progress`` is called before each measurement with a description of it.
    """
    texts = [text_of(model.tokenizer, length) for length in lengths]
    progress("warming up")
    _timed_steps(model, texts[0], steps=1)
    prompts: list[list[dict[str, Any]]] = [[] for _ in lengths]
    answers = []
    for _ in range(runs):
        for length, text, found in zip(lengths, texts, prompts, strict=True):
            progress(f"{length:,} tokens of prompt")
            found.append(_timed_steps(model, text, steps))
        progress("an answer")
        answers.append(_timed_answer(model, question))
    return {"prompts": [_prompt_row(found) for found in prompts], "answer": _answer_row(question, answers)}


def text_of(tokenizer: Tokenizer, count: int, seed: int = 0) -> str:
    """Return a text of random words that has ``count`` tokens with its beginning-of-text id, or one token less."""
    import random
    from bisect import bisect_right

    rng = random.Random(seed)
    words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(count))
    text = " ".join(words)  # every word has at least one token
    room = count - (tokenizer.bos_id is not None)
    longest = bisect_right(range(len(text) + 1), room, key=lambda end: len(tokenizer.encode(text[:end]))) - 1
    return text[:longest]


def _timed_steps(model: Model, text: str, steps: int) -> dict[str, Any]:
    """Encode a prompt, denoise one canvas and return the times.

    The first step is left out because it has no self-conditioning, and the last one because no step overlaps with it.
    """
    from dgemma_mlx.events import Done, Draft
    from dgemma_mlx.generation.api import stream

    never_settled = model.generation.override(max_denoising_steps=steps + 2, confidence_threshold=0.0)
    drafts: list[float] = []
    canvas = model.config.canvas_length
    for event in stream(model, text, raw=True, seed=0, max_tokens=canvas, speed="reference", generation=never_settled):
        if isinstance(event, Draft):
            drafts.append(time.perf_counter())
        elif isinstance(event, Done):
            statistics = event.statistics
    return {
        "prompt_tokens": statistics.prompt_tokens,
        "prefill_seconds": statistics.prefill_seconds,
        "step_seconds": [after - before for before, after in pairwise(drafts[:-1])],
        "peak_memory": statistics.peak_memory,
    }


def _timed_answer(model: Model, question: str) -> dict[str, Any]:
    """Generate an answer with the checkpoint's own parameters and return its statistics."""
    from dataclasses import asdict

    from dgemma_mlx.generation.api import generate

    done = generate(model, question, seed=0, max_tokens=_MAX_TOKENS)
    return {**asdict(done.statistics), "finish_reason": done.finish_reason}


def _prompt_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements of one prompt length over all runs."""
    tokens = runs[0]["prompt_tokens"]
    return {
        "prompt_tokens": tokens,
        "prefill_seconds": _spread([run["prefill_seconds"] for run in runs]),
        "prefill_tokens_per_second": _spread([rate(tokens, run["prefill_seconds"]) for run in runs]),
        "step_seconds": _spread([seconds for run in runs for seconds in run["step_seconds"]]),
        "peak_memory": max(run["peak_memory"] for run in runs),
    }


def _answer_row(question: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements of the answer over all runs. The seed is fixed, so only the times differ."""
    counts = ("prompt_tokens", "generated_tokens", "canvases", "denoising_steps", "tokens_per_forward", "finish_reason")
    return {
        "prompt": question,
        **{name: runs[0][name] for name in counts},
        "tokens_per_second": _spread([run["tokens_per_second"] for run in runs]),
        "seconds": _spread([run["seconds"] for run in runs]),
        "peak_memory": max(run["peak_memory"] for run in runs),
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Return the median, the smallest and the largest value."""
    from statistics import median

    return {"median": median(values), "least": min(values), "most": max(values)}


def _parse_lengths(text: str) -> list[int]:
    """Return the numbers of a text such as ``512,4096``. Raises `DgemmaError` (exit code 2) for any other text."""
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise DgemmaError(
            f"--prompt-tokens must be whole numbers of at least 2, not {shown(text)}",
            "Write the lengths like 512,4096.", exit_code=2,
        )  # fmt: skip
    return lengths


def _fitting(asked: list[int] | None, model: Model) -> list[int]:
    """Return the lengths to measure: those asked for, or the default ones that leave room for a canvas.

    Raises `DgemmaError` (exit code 2) when a length that was asked for leaves no room.
    """
    canvas, positions = model.config.canvas_length, model.config.text.max_position_embeddings
    most = positions - canvas
    if asked is None:
        return [length for length in _LENGTHS if length <= most] or [most]
    if max(asked) > most:
        raise DgemmaError(
            f"a prompt of {max(asked):,} tokens does not fit: with a canvas of {canvas} tokens it exceeds "
            f"the model's {positions:,} positions",
            f"Ask for at most {most:,} tokens.", exit_code=2,
        )
    return asked


def _circumstances(model: Model, steps: int, runs: int) -> dict[str, Any]:
    """Return what the measurements depend on: model, machine, versions, kernels and the numbers of steps and runs."""
    from dgemma_mlx.kernels.dispatch import mode

    facts = examine()
    return {
        "model": model.name,
        "canvas_length": model.config.canvas_length,
        "dtype": str(model.network.dtype).removeprefix("mlx.core."),
        "machine": {name: facts[name] for name in _MACHINE},
        "versions": {name: facts[name] for name in _VERSIONS},
        "kernels": mode(),
        "cut_over": model.network.machines,
        "steps": steps,
        "runs": runs,
    }


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """Yield a function that shows on a terminal's stderr what is measured, and shows nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=total + 1)  # an announced measurement is not yet done
        yield lambda what: bars.update(task, description=what, advance=1)


def _as_text(facts: dict[str, Any]) -> str:
    """Return the measurements as a table."""
    from dgemma_mlx.sizes import size

    machine, versions, answer = facts["machine"], facts["versions"], facts["answer"]
    cut = "" if facts["cut_over"] == 1 else f", cut over {facts['cut_over']} machines"
    metal = "Metal" if machine["metal"] else "no Metal"
    lines = [
        f"{facts['model']}, canvas of {facts['canvas_length']}, {facts['dtype']}, kernels {facts['kernels']}{cut}",
        f"{machine['chip']} ({machine['machine']}), {size(machine['memory'])}, {machine['os']}, {metal}",
        f"dgemma-mlx {versions['dgemma_mlx']}, mlx {versions['mlx']}, Python {versions['python']}",
        "",
        f"medians (smallest - largest) of {facts['runs']} runs, {facts['steps']} steps in each",
        f"{'prompt':>7}  {'prompt tokens/s':>27}  {'seconds per step':>27}  {'peak':>9}",
    ]
    lines += [
        f"{row['prompt_tokens']:>7,}  {_range(row['prefill_tokens_per_second']):>27}  "
        f"{_range(row['step_seconds']):>27}  {size(row['peak_memory']):>9}"
        for row in facts["prompts"]
    ]
    tokens_per_second, tokens_a_step = _range(answer["tokens_per_second"]), f"{answer['tokens_per_forward']:.2f}"
    peak = size(answer["peak_memory"])
    lines += [
        "",
        f"an answer of {answer['generated_tokens']} tokens in {answer['denoising_steps']} steps:",
        f"{tokens_per_second} tokens/s after the prompt, {tokens_a_step} tokens per step, peak {peak}",
    ]
    return "\n".join(lines)


def of_all(named: list[dict[str, Any]]) -> str:
    """Return the measurements of several machines as tables, and the sum of their speeds."""
    speed = sum(facts["answer"]["tokens_per_second"]["median"] for facts in named)
    tables = [f"{facts['host']}: {_as_text(facts)}\n\n" for facts in named]
    return f"{''.join(tables)}{len(named)} machines together: {_short(speed)} tokens/s after the prompts"


def _range(values: dict[str, float]) -> str:
    """Return a spread as ``median (smallest - largest)``."""
    return f"{_short(values['median'])} ({_short(values['least'])} - {_short(values['most'])})"


def _short(value: float) -> str:
    """Return a number with at least three significant digits: ``0.00123``, ``1.23``, ``1,234``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
