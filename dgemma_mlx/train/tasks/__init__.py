"""The tasks of the demo model: each draws examples for a split and checks answers."""

from __future__ import annotations

from .base import Example, Split, Task
from .facts import Question
from .numbers import Add, Count, Reverse, Sort
from .recall import Recall
from .record import Record
from .sentence import Sentence
from .sudoku import Sudoku
from .unknown import Unknown

__all__ = ["MIX", "TASKS", "Example", "Split", "Task"]


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
    "sudoku": 0.13,
    "sort": 0.32,
    "reverse": 0.16,
    "add": 0.06,
    "json": 0.08,
    "count": 0.05,
    "sentence": 0.05,
    "question": 0.04,
    "recall": 0.08,
    "unknown": 0.03,
}
