"""The task "sudoku": solve a 4x4 Sudoku."""

from __future__ import annotations

import random
from itertools import permutations

from dgemma_mlx.train.tasks.base import ExactTask, Example, Split, reword, split_of

Grid = tuple[int, ...]  # 16 digits from 1 to 4, row by row; 0 is an empty cell

BEFORE = (
    "Solve this Sudoku:",
    "Solve this 4x4 Sudoku:",
    "Solve the Sudoku:",
    "Sudoku:",
    "Solve:",
    "Solve this puzzle:",
    "Complete this Sudoku.",
    "Complete the grid:",
    "Fill in this Sudoku:",
    "Fill in the missing numbers:",
    "Finish this 4x4 Sudoku:",
    "Here is a Sudoku. Solve it.",
)
AFTER = (
    "Solve this Sudoku.",
    "Solve this 4x4 Sudoku.",
    "Solve it.",
    "Please solve this.",
    "Complete this Sudoku.",
    "What is the solution?",
    "Fill in the missing numbers.",
)
UNITS = tuple(
    [tuple(range(4 * i, 4 * i + 4)) for i in range(4)]  # rows
    + [tuple(range(i, 16, 4)) for i in range(4)]  # columns
    + [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]  # boxes
)


def is_solved(grid: Grid) -> bool:
    """Return whether every row, column and box of a grid holds 1, 2, 3 and 4."""
    return all({grid[cell] for cell in unit} == {1, 2, 3, 4} for unit in UNITS)


def all_grids() -> list[Grid]:
    """Return the 288 solved grids in lexical order."""
    rows = list(permutations((1, 2, 3, 4)))
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # two correct boxes
    return [grid for top in halves for low in halves if is_solved(grid := top + low)]


def parse_grid(text: str) -> Grid | None:
    """Return the cells of a grid that is written as four lines of four cells, or None for any other text.

    A cell is a digit from 1 to 4, or "." or "_" for an empty cell.
    """
    rows = [line.split() for line in text.strip().splitlines()]
    cells = [cell for row in rows for cell in row]
    if [len(row) for row in rows] != [4] * 4 or not set(cells) <= {"1", "2", "3", "4", ".", "_"}:
        return None
    return tuple(0 if cell in {".", "_"} else int(cell) for cell in cells)


def format_grid(grid: Grid, empty: str = ".") -> str:
    """Return a grid as four lines of four cells, with ``empty`` for an empty cell."""
    cells = [str(cell) if cell else empty for cell in grid]
    return "\n".join(" ".join(cells[row : row + 4]) for row in range(0, 16, 4))


class Sudoku(ExactTask):
    """Solve a puzzle with 5 to 12 clues and exactly one solution. The split is by the solved grid.

    Attributes:
        grids: The solved grids of each split.
        having: ``having[cell][digit]`` has bit g set if grid number g holds the digit in the cell.
    """

    name = "sudoku"
    heldout_share = 0.2

    def __init__(self) -> None:
        grids = all_grids()
        self.grids: dict[Split, list[Grid]] = {"train": [], "heldout": []}
        for grid in grids:
            self.grids[split_of(f"{self.name}:{format_grid(grid)}", self.heldout_share)].append(grid)
        self.having = [
            [sum(1 << g for g, grid in enumerate(grids) if grid[cell] == digit) for digit in range(5)]
            for cell in range(16)
        ]

    def sample(self, rng: random.Random, split: Split) -> Example:
        """Draw a puzzle whose solution belongs to a split."""
        solution = rng.choice(self.grids[split])
        puzzle = format_grid(self.puzzle(rng, solution), "." if rng.random() < 0.85 else "_")
        if rng.random() < 0.75:
            prompt = reword(rng, rng.choice(BEFORE), imperative=True) + "\n" + puzzle
        else:
            prompt = puzzle + "\n" + reword(rng, rng.choice(AFTER))
        return self.example(prompt, format_grid(solution), format_grid(solution))

    def puzzle(self, rng: random.Random, solution: Grid) -> Grid:
        """Return a puzzle with 5 to 12 random cells of a solution, such that no other grid agrees with these cells."""
        clues = rng.randint(5, 12)
        while True:
            kept = set(rng.sample(range(16), clues))
            agreeing = -1
            for cell in kept:
                agreeing &= self.having[cell][solution[cell]]
            if agreeing & (agreeing - 1) == 0:  # a single bit is set: only the solution agrees
                return tuple(digit if cell in kept else 0 for cell, digit in enumerate(solution))

    def check(self, example: Example, text: str) -> bool:
        """Return whether a text is a grid that keeps the clues and obeys the rules."""
        grid = parse_grid(text)
        prompt = example.messages[-1]["content"]
        lines = [line for line in prompt.splitlines() if parse_grid("\n".join([line] * 4)) is not None]
        givens = parse_grid("\n".join(lines))
        return (
            grid is not None
            and givens is not None
            and is_solved(grid)
            and all(given in (0, cell) for given, cell in zip(givens, grid, strict=True))
        )
