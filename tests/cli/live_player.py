"""A program that draws a made-up answer on its terminal: one event for each byte that arrives from a named pipe."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from dgemma_mlx.cli.render.live import LiveView
from dgemma_mlx.text import load_tokenizer
from tests.cli.synthetic import EOS_IDS, answer

CANVAS_LENGTH = 512


def _clock() -> Callable[[], float]:
    """Return a clock that advances a second whenever it is read, so that every step is drawn."""
    seconds = itertools.count()
    return lambda: float(next(seconds))


def main(tokenizer: str, pipe: str, text: str) -> None:
    """Draw the answer and print "the end"."""
    tokens = load_tokenizer(Path(tokenizer))
    with open(pipe, "rb", buffering=0) as ticks, LiveView(sys.stdout, tokens, EOS_IDS, _clock()) as view:
        for event in answer(tokens, tokens.encode(text), canvas_length=CANVAS_LENGTH, steps=10, noise=200):
            ticks.read(1)
            view(event)
    print("the end")


if __name__ == "__main__":
    main(*sys.argv[1:])
