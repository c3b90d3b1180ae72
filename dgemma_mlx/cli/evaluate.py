"""``dgemma-mlx eval``: how many answers of a model are right, and what they took."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dgemma_mlx.checks import LARGEST_SEED
from dgemma_mlx.cli.generate import Adapter, Dequantize, ModelName, NoKernels, Quiet, load_as_told
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError

Task = Annotated[str, typer.Option("--task", help="sudoku, or a JSONL file of messages or prompt and completion.")]
Size = Annotated[int, typer.Option("--size", help="Of a Sudoku: 4, 6 or 9 rows.")]
Clues = Annotated[str | None, typer.Option("--clues", help="Of a Sudoku: how many cells are given, as 14-22.")]
Count = Annotated[int | None, typer.Option("--count", min=1, help="How many problems; 100, or all of a file.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED // 2, help="Of puzzles and answers.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Answer so many at once.")]
SpeedMode = Annotated[str, typer.Option("--speed", help="reference, balanced or fast.")]
Answers = Annotated[Path | None, typer.Option("--answers", help="Write every answer to this file, as lines of JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def evaluate(
    task: Task,
    model: ModelName = None,
    adapter: Adapter = None,
    size: Size = 6,
    clues: Clues = None,
    count: Count = None,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    speed: SpeedMode = "reference",
    answers: Answers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    cpu_dequantize: Dequantize = None,
    no_kernels: NoKernels = False,
) -> None:
    """Count right answers: exact match, denoising steps, tokens a forward pass, seconds.

    A Sudoku is right when it keeps the clues and obeys the rules; the puzzles are none of those that
    recipes/sudoku trains on.
    """
    from dgemma_mlx.train.dataset import read_examples
    from dgemma_mlx.train.evaluate import evaluate, problems_of, sudoku_problems

    if task == "sudoku":
        problems = sudoku_problems(size, count or 100, parse_clues(clues), seed)
    else:
        problems = problems_of(read_examples(Path(task)))[:count]
    loaded = load_as_told(Settings(), model, cpu_dequantize, no_kernels, quiet, adapter)
    records: list[Mapping[str, Any]] = []

    def progress(record: Mapping[str, Any]) -> None:
        records.append(record)
        if not quiet and sys.stderr.isatty():
            right = sum(record["right"] for record in records)
            print(f"\r{right} right of {len(records)}", end="", file=sys.stderr, flush=True)

    result = evaluate(loaded, problems, batch_size=batch_size, seed=seed, speed=speed, progress=progress)
    if not quiet and sys.stderr.isatty():
        print(file=sys.stderr)
    if answers is not None:
        _write(answers, "".join(json.dumps(record) + "\n" for record in records))
    if as_json:
        print(json.dumps({"model": loaded.name, "adapter": None if adapter is None else str(adapter), "task": task,
                          "speed": speed, **asdict(result)}))  # fmt: skip
        return
    print(
        f"{result.right} of {result.problems} right ({result.exact_match:.1%}), "
        f"{result.denoising_steps:.2f} denoising steps an answer ({result.steps_per_canvas:.2f} a canvas), "
        f"{result.tokens_per_forward:.2f} tokens a step, {result.seconds:.1f} s"
    )


def parse_clues(text: str | None) -> tuple[int, int] | None:
    """``14-22`` or ``18`` -> two numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", text.strip())
    if found is None:
        raise DgemmaError(f"{text!r} is no number of clues", "Say it as 18, or 14-22.", exit_code=2)
    return int(found[1]), int(found[2] or found[1])


def _write(path: Path, text: str) -> None:
    from dgemma_mlx.files import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}") from None
