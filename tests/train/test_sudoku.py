"""Sudoku puzzles: brute force finds exactly one solution, and the splits share no solution."""

from __future__ import annotations

import random

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.train.evaluate import sudoku_problems
from dgemma_mlx.train.sudoku import BOXES, CLUES, Split, draw, obeys_rules, parse_grid, solutions, split_of
from dgemma_mlx.train.tasks.sudoku import all_grids


def renamed(grid: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    size = round(len(grid) ** 0.5)
    names = rng.sample(range(1, size + 1), size)
    return tuple(names[digit - 1] for digit in grid)


def test_an_empty_4x4_has_all_grids_for_solutions() -> None:
    assert sorted(solutions((0,) * 16, 4)) == all_grids()  # the demo model's task finds them in another way


def test_4x4_puzzles_have_one_solution_among_all_grids() -> None:
    rng, grids = random.Random(0), all_grids()
    for _ in range(60):
        puzzle = draw(rng, 4, "train")
        agreeing = [g for g in grids if all(c in (0, d) for c, d in zip(puzzle.cells, g, strict=True))]
        assert agreeing == [puzzle.solution]


def naive(cells: list[int], size: int) -> list[tuple[int, ...]]:
    """Return up to two solutions by trying every digit in the first empty cell, without ``sudoku.units``."""
    if 0 not in cells:
        return [tuple(cells)]
    height, width = BOXES[size]
    spot = cells.index(0)
    row, column = divmod(spot, size)
    seen = {
        cells[r * size + c] for r in range(size) for c in range(size)
        if r == row or c == column or (r // height, c // width) == (row // height, column // width)
    }
    found: list[tuple[int, ...]] = []
    for digit in range(1, size + 1):
        if digit not in seen:
            found += naive([*cells[:spot], digit, *cells[spot + 1 :]], size)
            if len(found) > 1:
                break
    return found


@pytest.mark.parametrize(("size", "clues", "count"), [(6, (10, 22), 15), (9, (40, 50), 3)])
def test_larger_puzzles_have_one_solution_by_brute_force(size: int, clues: tuple[int, int], count: int) -> None:
    rng = random.Random(1)
    for _ in range(count):
        puzzle = draw(rng, size, "heldout", clues)
        assert clues[0] <= puzzle.clues <= clues[1]
        assert naive(list(puzzle.cells), size) == [puzzle.solution]
        assert puzzle.solved_by(puzzle.answer)


def test_two_solutions_are_both_found() -> None:
    one, two = (1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1), (2, 1, 3, 4, 3, 4, 1, 2, 1, 2, 4, 3, 4, 3, 2, 1)
    shared = tuple(a if a == b else 0 for a, b in zip(one, two, strict=True))
    assert set(solutions(shared, 4)) == {one, two}
    assert not list(solutions((1, 1, *(0,) * 14), 4))


def test_every_number_of_clues_is_drawn() -> None:
    rng = random.Random(2)
    assert {draw(rng, 6, "train").clues for _ in range(150)} == set(range(CLUES[6][0], CLUES[6][1] + 1))


def test_renaming_digits_keeps_the_split() -> None:
    rng = random.Random(3)
    splits: list[Split] = ["train", "heldout"]
    for split in splits:
        for _ in range(20):
            solution = draw(rng, 6, split).solution
            assert {split_of(renamed(solution, rng), 6) for _ in range(5)} == {split}


def test_both_splits_have_grids_of_every_size() -> None:
    held_out = [grid for grid in all_grids() if split_of(grid, 4) == "heldout"]
    assert 24 <= len(held_out) <= 144 and len(held_out) % 24 == 0  # the digits of a grid can be named in 24 ways
    rng = random.Random(7)
    drawn = [split_of(next(solutions((0,) * 36, 6, rng)), 6) for _ in range(300)]
    assert 10 <= drawn.count("heldout") <= 60


def test_only_the_correct_grid_solves_a_puzzle() -> None:
    puzzle = draw(random.Random(4), 6, "heldout")
    assert puzzle.solved_by(puzzle.answer + "\n")
    other = renamed(puzzle.solution, random.Random(5))
    assert obeys_rules(other, 6) and other != puzzle.solution
    lines = puzzle.answer.splitlines()
    swapped = "\n".join([lines[0][::-1], *lines[1:]])
    texts = ["", "1 2", puzzle.prompt, "\n".join(lines[:5]), puzzle.answer.replace("6", "7"), swapped,
             "\n".join(" ".join(map(str, other[row : row + 6])) for row in range(0, 36, 6))]  # fmt: skip
    assert not any(puzzle.solved_by(text) for text in texts)


def test_a_grid_is_read_back_as_it_was_written() -> None:
    puzzle = draw(random.Random(6), 9, "train")
    assert parse_grid(puzzle.prompt.partition("\n")[2], 9) == puzzle.cells
    assert parse_grid(puzzle.answer, 9) == puzzle.solution and parse_grid(puzzle.answer, 6) is None


@pytest.mark.parametrize(("size", "clues"), [(5, None), (6, (3, 9)), (6, (20, 18)), (6, (30, 36)), (9, (16, 20))])
def test_impossible_puzzles_are_refused(size: int, clues: tuple[int, int] | None) -> None:
    with pytest.raises(DgemmaError) as error:
        sudoku_problems(size, 1, clues)
    assert error.value.exit_code == 2
