"""Write Sudoku puzzles with a unique solution to train.jsonl and valid.jsonl.

    python make_data.py FOLDER

The solutions of the validation puzzles, and of the puzzles of ``dgemma-mlx eval --task sudoku``, never equal the
solution of a training puzzle, even after renaming the digits.
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
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--size", type=int, default=6, choices=sorted(BOXES), help="cells per row")
    parser.add_argument("--clues", type=parse_clues, help="range of the number of clues, such as 14-22")
    parser.add_argument("--train", type=int, default=48_000, help="number of training puzzles")
    parser.add_argument("--valid", type=int, default=100, help="number of validation puzzles")
    parser.add_argument("--seed", type=int, default=0, help="seed of the puzzles")
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
