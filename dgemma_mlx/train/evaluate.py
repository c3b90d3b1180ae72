"""Evaluation of a model: the share of correct answers, and the denoising steps and time that they took."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.team import Team
from dgemma_mlx.sizes import rate
from dgemma_mlx.text.messages import Message
from dgemma_mlx.train import sudoku
from dgemma_mlx.train.dataset import Example, visible_answer


@dataclass(frozen=True)
class Problem:
    """A conversation to answer, and how to judge the answer.

    Attributes:
        messages: The conversation, which ends with the question.
        answer: A correct answer. Its length decides how many canvases the model may write.
        is_right: Return whether a text is a correct answer.
    """

    messages: Sequence[Message]
    answer: str
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Result:
    """The outcome of an evaluation over all of its problems.

    Attributes:
        problems: Number of problems.
        right: Number of problems that were answered correctly.
        exact_match: Share of correct answers, ``right / problems``.
        denoising_steps: Mean number of denoising steps of an answer, over all of its canvases.
        steps_per_canvas: Mean number of denoising steps of a canvas.
        tokens_per_forward: Number of tokens in all answers, divided by the number of denoising steps.
        seconds: Wall-clock time of the whole evaluation.
    """

    problems: int
    right: int
    exact_match: float
    denoising_steps: float
    steps_per_canvas: float
    tokens_per_forward: float
    seconds: float


def sudoku_problems(size: int, count: int, clues: tuple[int, int] | None = None, seed: int = 0) -> list[Problem]:
    """Draw Sudoku puzzles from the held-out split.

    An answer is correct if it keeps the clues and obeys the rules; each puzzle has exactly one such answer.

    Args:
        size: Number of rows and columns: 4, 6 or 9.
        count: Number of puzzles.
        clues: Smallest and largest number of given cells. None takes ``sudoku.CLUES``.
        seed: Seed of the puzzles.

    Raises:
        DgemmaError: If no puzzle has this size or these numbers of clues (exit code 2).
    """
    check_sudoku(size, clues)
    rng = random.Random(f"eval/{size}/{seed}")
    puzzles = [sudoku.draw(rng, size, "heldout", clues) for _ in range(count)]
    return [Problem([{"role": "user", "content": p.prompt}], p.answer, p.solved_by) for p in puzzles]


def check_sudoku(size: int, clues: tuple[int, int] | None) -> None:
    """Raise ``DgemmaError`` (exit code 2) if no puzzle has this size or these numbers of clues."""
    if size not in sudoku.BOXES:
        raise DgemmaError(f"Sudoku of {size}x{size} cells is not supported", "The sizes are 4, 6 and 9.", exit_code=2)
    fewest, most = clues or sudoku.CLUES[size]
    if not sudoku.FEWEST_CLUES[size] <= fewest <= most < size**2:
        raise DgemmaError(
            f"a {size}x{size} Sudoku cannot have {fewest} to {most} clues",
            f"Give at least {sudoku.FEWEST_CLUES[size]} and fewer than {size**2} clues, the smaller number first.",
            exit_code=2,
        )


def problems_of(model: Model, examples: Sequence[Example]) -> list[Problem]:
    """Turn examples into problems. An answer is correct if its text equals the example's, apart from outer white space.

    Thinking in the example's answer does not count. Raises ``DgemmaError`` (exit code 2) for an example that cannot be
    asked or judged so: a plain text, a conversation with tools, and an answer without visible text.
    """
    problems = []
    for example in examples:
        answer = visible_answer(model, example)
        for cannot, why in (
            (not example.messages, "a plain text cannot be evaluated, because it asks nothing"),
            (bool(example.tools), "a conversation with tools cannot be evaluated"),
            (not answer.strip(), "an answer without visible text cannot be evaluated"),
        ):
            if cannot:
                raise DgemmaError(
                    f"{example.place}: {why}", "Give messages, or prompts with completions.", exit_code=2
                )
        problems.append(Problem(example.messages, answer, partial(_same, answer)))
    return problems


def _same(answer: str, text: str) -> bool:
    """Return whether two texts are equal, apart from surrounding white space."""
    return text.strip() == answer.strip()


def evaluate(
    team: Team, problems: Sequence[Problem], *, batch_size: int = 1, seed: int = 0, speed: str = "reference",
    progress: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Result:
    """Answer every problem once and count the correct answers.

    The model may write as many canvases as the correct answer needs.

    Args:
        team: The machines with the model to evaluate.
        problems: The problems; at least one.
        batch_size: Number of problems that a machine answers at the same time.
        seed: Problem number n is answered with seed ``seed + n``.
        speed: "reference", "balanced" or "fast"; see ``dgemma_mlx.diffusion.speed``.
        progress: Called after each answer with a record of "index", "right", "text", "answer" and "denoising_steps".

    Raises:
        DgemmaError: If there are no problems, or ``speed`` is unknown (exit code 2).
    """
    if not problems:
        raise DgemmaError("there are no problems to evaluate", "Give at least one problem.", exit_code=2)
    began = time.perf_counter()
    right = steps = canvases = tokens = 0
    requests = [
        {"prompt": problem.messages, "max_tokens": _room(team.model, problem), "seed": seed + place}
        for place, problem in enumerate(problems)
    ]
    groups = [range(start, min(start + batch_size, len(problems))) for start in range(0, len(problems), batch_size)]
    answered = team.answers([[requests[place] for place in group] for group in groups], {"speed": speed})
    for group, answers in zip(groups, answered, strict=True):
        for place, done in zip(group, answers, strict=True):
            if isinstance(done, DgemmaError):
                raise done
            problem = problems[place]
            is_right = problem.is_right(done.text)
            right += is_right
            steps += done.statistics.denoising_steps
            canvases += done.statistics.canvases
            tokens += done.statistics.generated_tokens
            progress({"index": place, "right": is_right, "text": done.text, "answer": problem.answer,
                      "denoising_steps": done.statistics.denoising_steps})  # fmt: skip
    return Result(
        len(problems), right, right / len(problems), round(steps / len(problems), 2), round(rate(steps, canvases), 2),
        round(rate(tokens, steps), 2), round(time.perf_counter() - began, 2),
    )


def _room(model: Model, problem: Problem) -> int:
    """Return the number of tokens in the whole canvases that the correct answer needs."""
    length = len(model.tokenizer.encode(problem.answer)) + 1  # with the id that ends the answer
    canvas = model.config.canvas_length
    return -(-length // canvas) * canvas
