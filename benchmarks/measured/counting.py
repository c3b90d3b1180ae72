"""How far the built-in model can count: the share of right answers to "Count from a to b.", by how many numbers.

    python benchmarks/measured/counting.py
"""

from __future__ import annotations

import random

from dgemma_mlx import generate, load

RANGES = 10  # per length, with 2 seeds each
LENGTHS = (5, 10, 15, 20, 25, 28, 29, 30, 31, 32, 33, 34, 35, 40, 50, 60)
HIGHEST = 60  # as in the training


def main() -> None:
    """Print the right answers of each length, and the ranges that went wrong."""
    model, rng = load("demo"), random.Random(0)
    for length in LENGTHS:
        starts = list(range(HIGHEST + 2 - length))
        rng.shuffle(starts)
        asked = [(start, start + length - 1, seed) for start in (starts * RANGES)[:RANGES] for seed in (1, 2)]
        wrong = []
        for first, last, seed in asked:
            done = generate(model, f"Count from {first} to {last}.", seed=seed)
            if done.text.split() != [str(number) for number in range(first, last + 1)]:
                wrong.append((first, last))
        print(f"{length} numbers: {len(asked) - len(wrong)} of {len(asked)} right; wrong: {wrong}", flush=True)


if __name__ == "__main__":
    main()
