"""The score card of the demo model: the share of held-out prompts of each task that it answers correctly.

Answers are generated with the reference speed mode and judged by the checker of their task.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

from dgemma_mlx.generation.api import generate
from dgemma_mlx.generation.model import Model
from dgemma_mlx.sizes import rate
from dgemma_mlx.train.tasks import TASKS
from dgemma_mlx.train.tasks.look import GRIDS, TOPICS, Pixels, look


@dataclass(frozen=True)
class Score:
    """The line of one task in the score card.

    Attributes:
        task: Name of the task.
        prompts: Number of held-out prompts.
        correct: Share of answers that the checker of the task accepts.
        steps_per_canvas: Mean number of denoising steps of a canvas.
        tokens_per_forward: Number of tokens in all answers, divided by the number of denoising steps.
    """

    task: str
    prompts: int
    correct: float
    steps_per_canvas: float
    tokens_per_forward: float


def score_task(model: Model, task: str, prompts: int, seed: int = 0) -> Score:
    """Answer ``prompts`` held-out prompts of a task and count the correct answers. ``seed`` chooses the prompts."""
    rng = random.Random(f"score/{task}/{seed}")
    correct = tokens = steps = canvases = 0
    for number in range(prompts):
        example = TASKS[task].sample(rng, "heldout")
        done = generate(model, list(example.messages), max_tokens=128, seed=number, speed="reference")
        correct += TASKS[task].check(example, done.text)
        tokens += done.statistics.generated_tokens
        steps += done.statistics.denoising_steps
        canvases += done.statistics.canvases
    return Score(task, prompts, correct / prompts, round(rate(steps, canvases), 2), round(rate(tokens, steps), 2))


def score_pictures(model: Model, topic: str, pictures: int, seed: int = 0) -> Score:
    """Ask about one topic of ``pictures`` held-out pictures, and count the correct answers.

    Each picture is written as a PNG file and read again, as a user's is, which needs Pillow. ``seed`` chooses them.
    """
    rng = random.Random(f"score/look/{topic}/{seed}")
    correct = tokens = steps = canvases = 0
    for number in range(pictures):
        example = look(rng, "heldout", topic, rng.choice(GRIDS))
        done = generate(
            model, example.question, images=[png(example.pixels)], max_tokens=32, seed=number, speed="reference"
        )
        correct += done.text.strip() == example.answer
        tokens += done.statistics.generated_tokens
        steps += done.statistics.denoising_steps
        canvases += done.statistics.canvases
    means = round(rate(steps, canvases), 2), round(rate(tokens, steps), 2)
    return Score(f"picture: {topic}", pictures, correct / pictures, *means)


def picture_card(model: Model, pictures: int) -> list[Score]:
    """Return the scores of all topics of pictures, with ``pictures`` pictures for each."""
    return [score_pictures(model, topic, pictures) for topic in TOPICS]


def png(pixels: Pixels) -> bytes:
    """Return pixels (height, width, 3) uint8 as the bytes of a PNG file. Needs Pillow."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def score_card(model: Model, prompts: int, tasks: Iterable[str] = tuple(TASKS)) -> list[Score]:
    """Return the scores of tasks, in the given order, with ``prompts`` prompts for each."""
    return [score_task(model, task, prompts) for task in tasks]


def as_markdown(scores: Iterable[Score]) -> str:
    """Return a score card as a Markdown table, as docs/demo-model.md shows it."""
    lines = ["| task | correct | steps per canvas | tokens per forward |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {s.task} | {100 * s.correct:.1f} % | {s.steps_per_canvas:.2f} | {s.tokens_per_forward:.2f} |"
        for s in scores
    ]
    return "\n".join(lines)
