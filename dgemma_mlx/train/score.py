"""The demo model's score card: held-out prompts, the reference sampler, each task's own checker."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dgemma_mlx.generation.api import generate
from dgemma_mlx.generation.model import Model
from dgemma_mlx.train.tasks import TASKS


@dataclass(frozen=True)
class Score:
    """One task's line of the card."""

    task: str
    prompts: int
    correct: float
    """share of answers that the task's checker accepts"""
    steps_per_canvas: float
    tokens_per_forward: float


def score_task(model: Model, task: str, prompts: int, seed: int = 0, **options: Any) -> Score:
    """Generates answers to ``prompts`` held-out prompts of a task and counts the right ones.

    The reference's loop, where ``options`` (those of ``generate``) say nothing else.
    """
    rng = random.Random(f"score/{task}/{seed}")
    correct = tokens = steps = canvases = 0
    for number in range(prompts):
        example = TASKS[task].sample(rng, "heldout")
        done = generate(model, list(example.messages), max_tokens=128, seed=number, **{"speed": "reference", **options})
        correct += TASKS[task].check(example, done.text)
        tokens += done.statistics.generated_tokens
        steps += done.statistics.denoising_steps
        canvases += done.statistics.canvases
    return Score(task, prompts, correct / prompts, round(steps / canvases, 2), round(tokens / steps, 2))


def score_card(model: Model, prompts: int, tasks: Iterable[str] = tuple(TASKS)) -> list[Score]:
    """The scores of the tasks, in the order given."""
    return [score_task(model, task, prompts) for task in tasks]


def as_markdown(scores: Iterable[Score]) -> str:
    """The card as a table, as the README has it."""
    lines = ["| task | correct | steps a canvas | tokens per forward |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {s.task} | {100 * s.correct:.1f} % | {s.steps_per_canvas:.2f} | {s.tokens_per_forward:.2f} |"
        for s in scores
    ]
    return "\n".join(lines)
