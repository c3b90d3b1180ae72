"""Draw an SVG of the built-in model denoising a canvas: terminal views of several steps, next to each other."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgemma_mlx import Draft, Model, load, stream
from dgemma_mlx.cli.render.live import LiveView
from dgemma_mlx.cli.render.region import styled

COLUMNS = 24  # terminal columns per step
PROMPT = "Solve this Sudoku:\n. . 3 .\n3 . . 2\n. 1 . .\n4 . . ."


def frames(model: Model, prompt: str, seed: int, count: int) -> list[Text]:
    """Return views of ``count`` evenly spaced steps of the first canvas, including the last step.

    The views show no times, so that the result is reproducible.
    """
    view = LiveView(io.StringIO(), model.tokenizer, model.generation.eos_token_ids, clock=lambda: 0.0)
    drawn = []
    for event in stream(model, prompt, seed=seed, speed="reference"):
        if not isinstance(event, Draft):
            break
        drawn.append(Text.from_ansi("\n".join(map(styled, view.frame(event, COLUMNS)))))
    steps = {round((i + 1) * len(drawn) / count) - 1 for i in range(count)}
    return [drawn[step] for step in sorted(steps) if step >= 0]


def main() -> None:
    """Parse the command line and write the SVG file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="SVG file to write")
    parser.add_argument("--prompt", default=PROMPT, help="prompt of the model")
    parser.add_argument("--seed", type=int, default=3, help="seed of the answer")
    parser.add_argument("--steps", type=int, default=4, help="number of steps to draw")
    arguments = parser.parse_args()
    steps = Table.grid(*[""] * arguments.steps, padding=(0, 2))
    steps.add_row(*frames(load("demo"), arguments.prompt, arguments.seed, arguments.steps))
    width = (COLUMNS + 2) * arguments.steps
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    command = f'$ dgemma-mlx generate -m demo --seed {arguments.seed} "{arguments.prompt}"'
    console.print(Text(command + "\n"))
    console.print(steps)
    svg = console.export_svg(title="dgemma-mlx", unique_id="canvas")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # viewers would download these fonts
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
