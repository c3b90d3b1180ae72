"""The synthetic tasks of the demo model. Each task draws examples of a split and checks answers.

The wordings and answers are the data on which the shipped demo model was trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from dgemma_mlx.train.tasks.base import Example, Split, Task
from dgemma_mlx.train.tasks.facts import Question
from dgemma_mlx.train.tasks.numbers import Add, Count, Reverse, Sort
from dgemma_mlx.train.tasks.recall import Recall
from dgemma_mlx.train.tasks.record import Record
from dgemma_mlx.train.tasks.sentence import Sentence
from dgemma_mlx.train.tasks.sudoku import Sudoku
from dgemma_mlx.train.tasks.unknown import Unknown

__all__ = ["LAST_MIX", "MIX", "TASKS", "Example", "Split", "Task", "training_example"]

UNKNOWN = Unknown()


def _build() -> dict[str, Task]:
    """Create all tasks, by name."""
    sort, reverse, add, question = Sort(), Reverse(), Add(), Question()
    recall = Recall(others=(sort, reverse, add, question, UNKNOWN))
    tasks: tuple[Task, ...] = (
        Sudoku(), sort, reverse, add, Record(), Count(), Sentence(), question, recall, UNKNOWN,
    )  # fmt: skip
    return {task.name: task for task in tasks}


TASKS = _build()
# The share of each task in training.
MIX = {
    "sudoku": 0.12,
    "sort": 0.34,
    "reverse": 0.13,
    "add": 0.05,
    "json": 0.07,
    "count": 0.05,
    "sentence": 0.09,
    "question": 0.04,
    "recall": 0.07,
    "unknown": 0.04,
}
# After the first fall of the learning rate there are more additions, the last thing that the model learns.
LAST_MIX = {**MIX, "add": 0.25, "sort": 0.14}

# The share of drawn lists to sort that are kept for training, by length: long lists are harder to learn.
_KEPT_LISTS = {7: 0.5, 8: 1.0}
_KEPT_SHORT_LISTS = 0.25

_FOREIGN_SHARE = 0.3  # of "unknown" in training: prompts in other scripts


def training_example(rng: random.Random, mix: Mapping[str, float] = MIX) -> Example:
    """Draw a training example of a task, which is chosen with the probabilities of ``mix``."""
    task = rng.choices(list(mix), list(mix.values()))[0]
    if task == "unknown" and rng.random() < _FOREIGN_SHARE:
        return UNKNOWN.foreign(rng, "train")
    while True:
        example = TASKS[task].sample(rng, "train")
        length = len(example.answer.split())
        if task != "sort" or rng.random() < _KEPT_LISTS.get(length, _KEPT_SHORT_LISTS):
            return example
