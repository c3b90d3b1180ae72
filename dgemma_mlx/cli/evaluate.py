"""``dgemma-mlx eval``: how many problems a model answers correctly, and how much work the answers take."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from dgemma_mlx.checks import LARGEST_SEED, shown
from dgemma_mlx.cli import complete
from dgemma_mlx.cli.loading import load_model
from dgemma_mlx.cli.machines import TeamOptions, team_of
from dgemma_mlx.cli.parameters import AsJson, ModelOptions, Quiet, decoding_option, output_option, section
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import duration

problem_option = section("Problems")

TASKS = "`sudoku`, or a JSONL file whose lines have `messages`, or `prompt` and `completion`."
Task = Annotated[
    str, problem_option("--task", metavar="TASK", help=TASKS, autocompletion=complete.one_of("sudoku"))
]
Size = Annotated[
    int | None,
    problem_option(
        "--size", show_default="6", help="Number of rows of a Sudoku: 4, 6 or 9.",
        autocompletion=complete.one_of("4", "6", "9"),
    ),
]  # fmt: skip
Clues = Annotated[
    str | None, problem_option("--clues", metavar="A-B", help="Number of given cells in a Sudoku, such as 18 or 14-22.")
]
Count = Annotated[
    int | None, problem_option("--count", min=1, show_default="100, or all of a file", help="Number of problems.")
]
Seed = Annotated[
    int, decoding_option("--seed", min=0, max=LARGEST_SEED // 2, help="Seed of the puzzles and of the answers.")
]
BatchSize = Annotated[int, decoding_option("--batch-size", min=1, help="Number of problems answered at a time.")]
SpeedMode = Annotated[
    str,
    decoding_option(
        "--speed", metavar="MODE", autocompletion=complete.values_of("speed"),
        help="When a canvas is final: reference, balanced or fast.",
    ),
]  # fmt: skip
Answers = Annotated[
    Path | None, output_option("--answers", metavar="FILE", help="Write every answer to this file as a line of JSON.")
]


def evaluate(
    task: Task,
    size: Size = None,
    clues: Clues = None,
    count: Count = None,
    *,
    model: ModelOptions,
    machines: TeamOptions,
    answers: Answers = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
    speed: SpeedMode = "reference",
) -> None:
    """Count how many problems a model answers correctly.

    The result also has the denoising steps per answer and per canvas, the tokens per step and the seconds. An answer
    from a file must match exactly. A Sudoku is correct when it keeps the clues and obeys the rules; the puzzles
    differ from those that recipes/sudoku trains on. With several machines, each loads the whole model and answers some
    of the problems, unless `--split` cuts the model over them (docs/several-macs.md).

    Examples:
        dgemma-mlx eval -m demo --task sudoku --size 4 --count 20
        dgemma-mlx eval -m MODEL --adapter FOLDER --task valid.jsonl --answers answers.jsonl
    """
    from dgemma_mlx.train.dataset import read_examples
    from dgemma_mlx.train.evaluate import evaluate, problems_of, sudoku_problems

    whole = machines.check_team(is_spread=True)
    examples = None
    if task == "sudoku":
        problems = sudoku_problems(size or 6, count or 100, parse_clues(clues), seed)
    else:
        if not os.path.exists(task):
            raise DgemmaError(f"{shown(task)} is neither a task nor a file", f"--task is {TASKS}", exit_code=2)
        for name, value in (("--size", size), ("--clues", clues)):
            if value is not None:
                raise DgemmaError(f"{name} is for --task sudoku, not for a file", "Leave it out.", exit_code=2)
        examples = read_examples(Path(task))[:count]
    loaded = load_model(Settings(), model, quiet, checked=True, machines=machines, whole=whole)
    if examples is not None:
        problems = problems_of(loaded, examples)
    records: list[Mapping[str, Any]] = []
    with _progress(len(problems), quiet) as progress:

        def answered(record: Mapping[str, Any]) -> None:
            records.append(record)
            progress(len(records), sum(record["right"] for record in records))

        team = team_of(machines, loaded, whole)
        result = evaluate(team, problems, batch_size=batch_size, seed=seed, speed=speed, progress=answered)
    if answers is not None:
        _write(answers, "".join(json.dumps(record) + "\n" for record in records))
    if as_json:
        adapter = None if model.adapter is None else str(model.adapter)
        facts = {"model": loaded.name, "adapter": adapter, "task": task, "speed": speed, **asdict(result)}
        print(json.dumps(facts))
        return
    print(
        f"{result.right} of {result.problems} right ({result.exact_match:.1%}), "
        f"{result.denoising_steps:.2f} denoising steps per answer ({result.steps_per_canvas:.2f} per canvas), "
        f"{result.tokens_per_forward:.2f} tokens per step, {result.seconds:.1f} s"
    )


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows on a terminal's stderr how far the evaluation is, and shows nothing elsewhere.

    Its arguments are the numbers of all and of the correct answers until now. The line is erased when the block ends.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, right: None
        return
    began = time.perf_counter()

    def show(done: int, right: int) -> None:
        left = duration((time.perf_counter() - began) / done * (total - done))
        print(f"\r{f'{done} of {total} answered, {right} right, about {left} left':60}", end="", file=sys.stderr,
              flush=True)  # fmt: skip

    try:
        yield show
    finally:
        print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)


def parse_clues(text: str | None) -> tuple[int, int] | None:
    """Return the two numbers of ``14-22`` or ``18``. Raises `DgemmaError` (exit code 2) for any other text."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", text.strip())
    if found is None:
        raise DgemmaError(f"{shown(text)} is not a number of clues", "Write it like 18 or 14-22.", exit_code=2)
    return int(found[1]), int(found[2] or found[1])


def _write(path: Path, text: str) -> None:
    """Write the file completely or not at all. Raises `DgemmaError` when it cannot be written."""
    from dgemma_mlx.files import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise DgemmaError(f"cannot write {path}: {error.strerror}", "Name another file.") from None
