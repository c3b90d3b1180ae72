"""The questions of ``answers.py`` and ``sampler_peers.py``: held-out prompts of the demo model's tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from dgemma_mlx.train.evaluate import sudoku_problems
from dgemma_mlx.train.tasks import TASKS

from .records import Question

SUDOKU6 = "sudoku6"  # 6x6 Sudoku, for which the demo model needs the adapter of recipes/sudoku
CLUES = (16, 22)  # of 36 cells, as in that recipe
MAX_TOKENS = 128  # of an answer


def questions(tasks: Sequence[str], count: int, seed: int) -> list[Question]:
    """Draw ``count`` questions of each task. The same arguments give the same questions, on every machine.

    A larger ``count`` only adds questions. ``seed`` chooses the questions, not the seeds of the answers.
    """
    found = []
    for task in tasks:
        if task == SUDOKU6:
            problems = sudoku_problems(6, count, CLUES, seed)
            found += [Question(task, n, list(p.messages), p.is_right) for n, p in enumerate(problems)]
            continue
        rng = random.Random(f"answers/{task}/{seed}")
        for number in range(count):
            example = TASKS[task].sample(rng, "heldout")
            found.append(Question(task, number, list(example.messages), partial(TASKS[task].check, example)))
    return found
