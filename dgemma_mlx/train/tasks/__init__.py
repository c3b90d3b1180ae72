"""The tasks of the demo model: each draws examples for a split and checks answers."""

from __future__ import annotations

import random

from .base import Example, Split, Task
from .facts import Question
from .numbers import Add, Count, Reverse, Sort
from .recall import Recall
from .record import Record
from .sentence import Sentence
from .sudoku import Sudoku
from .unknown import Unknown

__all__ = ["MIX", "TASKS", "Example", "Split", "Task", "training_example"]


def _build() -> dict[str, Task]:
    sort, reverse, add, question, unknown = Sort(), Reverse(), Add(), Question(), Unknown()
    recall = Recall(others=(sort, reverse, add, question, unknown))
    tasks: tuple[Task, ...] = (
        Sudoku(), sort, reverse, add, Record(), Count(), Sentence(), question, recall, unknown,
    )  # fmt: skip
    return {task.name: task for task in tasks}


TASKS = _build()
# the share of each task in training
MIX = {
    "sudoku": 0.12,
    "sort": 0.38,
    "reverse": 0.14,
    "add": 0.06,
    "json": 0.07,
    "count": 0.05,
    "sentence": 0.04,
    "question": 0.04,
    "recall": 0.07,
    "unknown": 0.03,
}

_SORTED_IN_TRAINING = {7: 0.5, 8: 1.0}  # of the lists to sort, by length, those that are taken: long ones are harder
_SORTED_ELSE = 0.25


def training_example(rng: random.Random) -> Example:
    """An example of a task drawn by ``MIX``."""
    task = rng.choices(list(MIX), list(MIX.values()))[0]
    while True:
        example = TASKS[task].sample(rng, "train")
        length = len(example.answer.split())
        if task != "sort" or rng.random() < _SORTED_IN_TRAINING.get(length, _SORTED_ELSE):
            return example
