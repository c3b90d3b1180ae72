"""Sudoku of 4x4, 6x6 and 9x9 cells: puzzles with one solution, and their rules.

Splits are by solution grid up to the names of its digits: no held-out solution is a training solution with digits
renamed, let alone the same grid.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Grid = tuple[int, ...]
"""size * size digits, row by row; 0 is an empty cell"""
Split = Literal["train", "heldout"]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""size -> rows and columns of a box"""
CLUES = {4: (5, 10), 6: (14, 22), 9: (36, 50)}
"""size -> the fewest and the most clues of a puzzle, where nothing else is asked for"""
FEWEST = {4: 4, 6: 8, 9: 17}
"""below these no puzzle has one solution"""
_HELDOUT_SHARE = {4: 0.25, 6: 0.1, 9: 0.1}  # of 4x4 there are but 12 grids that differ in more than names


@dataclass(frozen=True)
class Puzzle:
    """Its cells, 0 where empty, and its only solution."""

    size: int
    cells: Grid
    solution: Grid

    @property
    def clues(self) -> int:
        return sum(map(bool, self.cells))

    @property
    def prompt(self) -> str:
        """What is asked of the model."""
        return f"Solve this {self.size}x{self.size} Sudoku:\n{grid_text(self.cells)}"

    @property
    def answer(self) -> str:
        return grid_text(self.solution)

    def solved_by(self, text: str) -> bool:
        """Whether a text is a grid that keeps the clues and obeys the rules."""
        grid = parse_grid(text, self.size)
        return (
            grid is not None
            and all(clue in (0, cell) for clue, cell in zip(self.cells, grid, strict=True))
            and obeys_rules(grid, self.size)
        )


def grid_text(cells: Sequence[int]) -> str:
    """A line a row, digits with spaces between, dots for empty cells."""
    size = round(len(cells) ** 0.5)
    digits = [str(cell) if cell else "." for cell in cells]
    return "\n".join(" ".join(digits[row : row + size]) for row in range(0, size * size, size))


def parse_grid(text: str, size: int) -> Grid | None:
    """The cells of such a text; None for anything else."""
    rows = [line.split() for line in text.strip().splitlines()]
    cells = [cell for row in rows for cell in row]
    digits = {str(digit): digit for digit in range(1, size + 1)} | {".": 0}
    if [len(row) for row in rows] != [size] * size or not digits.keys() >= set(cells):
        return None
    return tuple(digits[cell] for cell in cells)


def obeys_rules(grid: Grid, size: int) -> bool:
    """Whether every row, column and box holds every digit."""
    digits = set(range(1, size + 1))
    return all({grid[cell] for cell in unit} == digits for unit in units(size))


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """The cells of each row, column and box."""
    height, width = BOXES[size]
    rows = [tuple(range(row * size, row * size + size)) for row in range(size)]
    columns = [tuple(range(column, size * size, size)) for column in range(size)]
    boxes = [
        tuple((top + r) * size + left + c for r in range(height) for c in range(width))
        for top in range(0, size, height) for left in range(0, size, width)
    ]
    return (*rows, *columns, *boxes)


@cache
def _places(size: int) -> tuple[tuple[int, int, int], ...]:
    """The numbers of the three units of each cell: indices of one list of sets of digits."""
    of: list[list[int]] = [[] for _ in range(size * size)]
    for number, unit in enumerate(units(size)):
        for cell in unit:
            of[cell].append(number)
    return tuple((row, column, box) for row, column, box in of)


def solutions(cells: Grid, size: int, rng: random.Random | None = None) -> Iterator[Grid]:
    """The solutions of a puzzle, by search from the cell with fewest candidates; in random order with ``rng``."""
    places, whole = _places(size), (1 << size) - 1
    used = [0] * (3 * size)  # of each unit, a bit a digit
    for cell, digit in enumerate(cells):
        for unit in places[cell] if digit else ():
            if used[unit] >> (digit - 1) & 1:
                return
            used[unit] |= 1 << (digit - 1)
    grid, empty = list(cells), [cell for cell, digit in enumerate(cells) if not digit]

    def search() -> Iterator[Grid]:
        if not empty:
            yield tuple(grid)
            return
        best, fewest, chosen = 0, size + 1, 0
        for number, cell in enumerate(empty):
            a, b, c = places[cell]
            candidates = whole & ~(used[a] | used[b] | used[c])
            count = candidates.bit_count()
            if count < fewest:
                best, fewest, chosen = number, count, candidates
                if count < 2:
                    break
        cell = empty.pop(best)
        digits = [digit for digit in range(size) if chosen >> digit & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            for unit in places[cell]:
                used[unit] ^= 1 << digit
            grid[cell] = digit + 1
            yield from search()
            for unit in places[cell]:
                used[unit] ^= 1 << digit
        grid[cell] = 0
        empty.insert(best, cell)

    yield from search()


def split_of(solution: Grid, size: int) -> Split:
    """The split of a solution: the same for all grids that are it with digits renamed."""
    names = {digit: number for number, digit in enumerate(solution[:size], 1)}
    canonical = grid_text([names[digit] for digit in solution])
    place = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64
    return "heldout" if place < _HELDOUT_SHARE[size] else "train"


def draw(rng: random.Random, size: int, split: Split, clues: tuple[int, int] | None = None) -> Puzzle:
    """A puzzle of the split with as many clues as drawn between the two numbers, both included.

    Cells of a random solution are emptied in random order where the solution stays the only one, until so many are
    left; where that cannot be, with another solution.
    """
    fewest, most = clues or CLUES[size]
    wanted = rng.randint(fewest, most)
    while True:
        solution = next(solutions((0,) * size**2, size, rng))
        if split_of(solution, size) != split:
            continue
        cells, left = list(solution), size**2
        for cell in rng.sample(range(size**2), size**2):
            if left == wanted:
                return Puzzle(size, tuple(cells), solution)
            digit, cells[cell] = cells[cell], 0
            if _another(cells, size, cell, digit):
                cells[cell] = digit
            else:
                left -= 1
        if left == wanted:
            return Puzzle(size, tuple(cells), solution)


def _another(cells: Sequence[int], size: int, cell: int, digit: int) -> bool:
    """Whether there is a solution with another digit in an empty cell."""
    for other in range(1, size + 1):
        if other != digit:
            tried = (*cells[:cell], other, *cells[cell + 1 :])
            if next(solutions(tried, size), None) is not None:
                return True
    return False
