"""Writes train.jsonl and valid.jsonl of Sudoku puzzles with one solution: ``python make_data.py FOLDER``.

No validation puzzle has a solution that is, up to the names of its digits, that of a training puzzle; neither have
those of ``dgemma-mlx eval --task sudoku``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from dgemma_mlx.cli.evaluate import parse_clues
from dgemma_mlx.files import write_whole
from dgemma_mlx.train.dataset import TRAIN, VALID, as_jsonl
from dgemma_mlx.train.evaluate import check_sudoku
from dgemma_mlx.train.sudoku import BOXES, Split, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=6, choices=sorted(BOXES))
    parser.add_argument("--clues", type=parse_clues, help="how many cells are given, as 14-22")
    parser.add_argument("--train", type=int, default=48_000, help="puzzles to train on")
    parser.add_argument("--valid", type=int, default=100, help="puzzles to validate with")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_sudoku(arguments.size, arguments.clues)
    splits: list[tuple[str, Split, int]] = [
        (TRAIN, "train", arguments.train), (VALID, "heldout", arguments.valid),
    ]  # fmt: skip
    for name, split, count in splits:
        rng = random.Random(f"{name}/{arguments.size}/{arguments.seed}")
        puzzles = (draw(rng, arguments.size, split, arguments.clues) for _ in range(count))
        write_whole(arguments.folder / name, as_jsonl((puzzle.prompt, puzzle.answer) for puzzle in puzzles))


if __name__ == "__main__":
    main()
