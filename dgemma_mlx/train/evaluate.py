"""How well a model answers: exact match, and what it took."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.api import generate_batch
from dgemma_mlx.generation.model import Message, Model
from dgemma_mlx.train import sudoku
from dgemma_mlx.train.dataset import Example


@dataclass(frozen=True)
class Problem:
    """A question, a right answer, and what tells whether a text is one."""

    messages: Sequence[Message]
    answer: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Result:
    """Of a set of problems."""

    problems: int
    right: int
    exact_match: float
    """right / problems"""
    denoising_steps: float
    """of an answer, all its canvases together, on average"""
    steps_per_canvas: float
    tokens_per_forward: float
    """tokens of answers / denoising steps"""
    seconds: float
    """of all together"""


def sudoku_problems(size: int, count: int, clues: tuple[int, int] | None = None, seed: int = 0) -> list[Problem]:
    """Held-out puzzles; any grid that keeps the clues and obeys the rules is right, and there is only one."""
    check_sudoku(size, clues)
    rng = random.Random(f"eval/{size}/{seed}")
    puzzles = [sudoku.draw(rng, size, "heldout", clues) for _ in range(count)]
    return [Problem([{"role": "user", "content": p.prompt}], p.answer, p.solved_by) for p in puzzles]


def check_sudoku(size: int, clues: tuple[int, int] | None) -> None:
    """``DgemmaError`` (exit code 2) for a size or numbers of clues that no puzzle has."""
    if size not in sudoku.BOXES:
        raise DgemmaError(f"there is no Sudoku of {size}x{size} here", "Sizes are 4, 6 and 9.", exit_code=2)
    fewest, most = clues or sudoku.CLUES[size]
    if not sudoku.FEWEST[size] <= fewest <= most < size**2:
        raise DgemmaError(f"a {size}x{size} Sudoku cannot have {fewest} to {most} clues",
                          f"At least {sudoku.FEWEST[size]}, fewer than {size**2}.", exit_code=2)  # fmt: skip


def problems_of(examples: Sequence[Example]) -> list[Problem]:
    """Those of a file; right is the same text, but for white space around it. ``DgemmaError`` for plain texts."""
    if any(not example.messages for example in examples):
        raise DgemmaError("a text without a question cannot be evaluated", "Give prompts and completions.", exit_code=2)
    return [Problem(e.messages, e.answer, partial(_same, e.answer)) for e in examples]


def _same(answer: str, text: str) -> bool:
    return text.strip() == answer.strip()


def evaluate(
    model: Model, problems: Sequence[Problem], *, batch_size: int = 1, seed: int = 0, speed: str = "reference",
    progress: Callable[[Mapping[str, Any]], None] = lambda record: None, **options: Any,
) -> Result:
    """Answers every problem once, in as many canvases as its right answer has, with seed ``seed`` + its number.

    ``progress`` gets a record for each answer. ``options`` are those of ``generate_batch``.
    """
    if not problems:
        raise DgemmaError("there is nothing to evaluate", exit_code=2)
    began = time.perf_counter()
    right = steps = canvases = tokens = number = 0
    for group in _groups(problems, batch_size):
        answers = generate_batch(
            model, [problem.messages for problem in group], max_tokens=[_room(model, problem) for problem in group],
            seeds=list(range(seed + number, seed + number + len(group))), speed=speed, **options,
        )
        for problem, done in zip(group, answers, strict=True):
            is_right = problem.is_right(done.text)
            right += is_right
            steps += done.statistics.denoising_steps
            canvases += done.statistics.canvases
            tokens += done.statistics.generated_tokens
            progress({"index": number, "right": is_right, "text": done.text, "answer": problem.answer,
                      "denoising_steps": done.statistics.denoising_steps})  # fmt: skip
            number += 1
    return Result(
        len(problems), right, right / len(problems), round(steps / len(problems), 2), round(steps / canvases, 2),
        round(tokens / steps, 2), round(time.perf_counter() - began, 2),
    )


def _groups(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _room(model: Model, problem: Problem) -> int:
    length = len(model.tokenizer.encode(problem.answer)) + 1  # and the end
    canvas = model.config.canvas_length
    return -(-length // canvas) * canvas
