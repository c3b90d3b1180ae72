"""Sudoku puzzles of 4x4, 6x6 and 9x9 cells with exactly one solution, and the rules of the game.

Puzzles are split into training and held-out ones by their solution, without regard to the names of the digits: if a
grid is a held-out solution, no renaming of its digits is a training solution.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Grid = tuple[int, ...]  # size * size digits, row by row; 0 is an empty cell
Split = Literal["train", "heldout"]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> rows and columns of a box
CLUES = {4: (5, 10), 6: (14, 22), 9: (36, 50)}  # size -> default smallest and largest number of clues of a puzzle
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}  # size -> number of clues below which no puzzle has exactly one solution
_HELDOUT_SHARE = {4: 0.25, 6: 0.1, 9: 0.1}  # only 12 grids of 4x4 differ in more than the names of their digits


@dataclass(frozen=True)
class Puzzle:
    """A Sudoku puzzle with exactly one solution.

    Attributes:
        size: Number of rows and columns.
        cells: The given cells; 0 where a cell is empty.
        solution: The solved grid.
    """

    size: int
    cells: Grid
    solution: Grid

    @property
    def clues(self) -> int:
        """Number of given cells."""
        return sum(map(bool, self.cells))

    @property
    def prompt(self) -> str:
        """The question for a model: a request and the puzzle."""
        return f"Solve this {self.size}x{self.size} Sudoku:\n{grid_text(self.cells)}"

    @property
    def answer(self) -> str:
        """The solved grid as text."""
        return grid_text(self.solution)

    def solved_by(self, text: str) -> bool:
        """Return whether a text is a grid that keeps the clues and obeys the rules."""
        grid = parse_grid(text, self.size)
        return (
            grid is not None
            and all(clue in (0, cell) for clue, cell in zip(self.cells, grid, strict=True))
            and obeys_rules(grid, self.size)
        )


def grid_text(cells: Sequence[int]) -> str:
    """Return a grid as text: one line for each row, digits separated by spaces, dots for empty cells."""
    size = round(len(cells) ** 0.5)
    digits = [str(cell) if cell else "." for cell in cells]
    return "\n".join(" ".join(digits[row : row + size]) for row in range(0, size * size, size))


def parse_grid(text: str, size: int) -> Grid | None:
    """Return the cells of a grid that ``grid_text`` could have written, or None for any other text."""
    rows = [line.split() for line in text.strip().splitlines()]
    cells = [cell for row in rows for cell in row]
    digits = {str(digit): digit for digit in range(1, size + 1)} | {".": 0}
    if [len(row) for row in rows] != [size] * size or not digits.keys() >= set(cells):
        return None
    return tuple(digits[cell] for cell in cells)


def obeys_rules(grid: Grid, size: int) -> bool:
    """Return whether every row, column and box of a grid holds every digit."""
    digits = set(range(1, size + 1))
    return all({grid[cell] for cell in unit} == digits for unit in units(size))


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Return the cell numbers of each unit: the rows, then the columns, then the boxes."""
    height, width = BOXES[size]
    rows = [tuple(range(row * size, row * size + size)) for row in range(size)]
    columns = [tuple(range(column, size * size, size)) for column in range(size)]
    boxes = [
        tuple((top + r) * size + left + c for r in range(height) for c in range(width))
        for top in range(0, size, height) for left in range(0, size, width)
    ]
    return (*rows, *columns, *boxes)


@cache
def _units_of_cells(size: int) -> tuple[tuple[int, int, int], ...]:
    """Return the indices, in ``units(size)``, of the row, the column and the box of each cell."""
    found: list[list[int]] = [[] for _ in range(size * size)]
    for number, unit in enumerate(units(size)):
        for cell in unit:
            found[cell].append(number)
    return tuple((row, column, box) for row, column, box in found)


def solutions(cells: Grid, size: int, rng: random.Random | None = None) -> Iterator[Grid]:
    """Yield all solutions of a puzzle; in random order with ``rng``.

    The search always continues with an empty cell that has the fewest candidates.
    """
    units_of, all_digits = _units_of_cells(size), (1 << size) - 1
    used = [0] * (3 * size)  # the digits that each unit holds, one bit for each digit
    for cell, digit in enumerate(cells):
        for unit in units_of[cell] if digit else ():
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
            a, b, c = units_of[cell]
            candidates = all_digits & ~(used[a] | used[b] | used[c])
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
            for unit in units_of[cell]:
                used[unit] ^= 1 << digit
            grid[cell] = digit + 1
            yield from search()
            for unit in units_of[cell]:
                used[unit] ^= 1 << digit
        grid[cell] = 0
        empty.insert(best, cell)

    yield from search()


def split_of(solution: Grid, size: int) -> Split:
    """Return the split of a solution. All grids that differ only in the names of their digits are in the same split."""
    names = {digit: number for number, digit in enumerate(solution[:size], 1)}
    canonical = grid_text([names[digit] for digit in solution])
    place = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") / 2**64
    return "heldout" if place < _HELDOUT_SHARE[size] else "train"


def draw(rng: random.Random, size: int, split: Split, clues: tuple[int, int] | None = None) -> Puzzle:
    """Draw a puzzle.

    The cells of a random solution are emptied in random order, except where this would allow a second solution, until
    the drawn number of clues is left. If that is impossible, another solution is tried.

    Args:
        rng: Source of randomness.
        size: Number of rows and columns: 4, 6 or 9.
        split: The split of the solution.
        clues: Smallest and largest number of clues, both included. None takes ``CLUES``.
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
            if _has_solution_without(cells, size, cell, digit):
                cells[cell] = digit
            else:
                left -= 1
        if left == wanted:
            return Puzzle(size, tuple(cells), solution)


def _has_solution_without(cells: Sequence[int], size: int, cell: int, digit: int) -> bool:
    """Return whether a puzzle has a solution with a digit other than ``digit`` in an empty cell."""
    for other in range(1, size + 1):
        if other != digit:
            tried = (*cells[:cell], other, *cells[cell + 1 :])
            if next(solutions(tried, size), None) is not None:
                return True
    return False
