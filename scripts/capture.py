"""Draw an animated SVG of the built-in model denoising a canvas: a terminal, step by step, with default settings."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dgemma_mlx import Draft, Model, load, stream
from dgemma_mlx.cli.render.live import LiveView
from dgemma_mlx.cli.render.region import styled
from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.files import write_whole

COLUMNS = 72
PROMPT = "Solve this Sudoku:\n. . 3 .\n3 . . 2\n. 1 . .\n4 . . ."
STEP_SECONDS, LAST_SECONDS = 0.9, 4.0  # how long a step, and the answer, are shown


def frames(model: Model, prompt: str, seed: int) -> list[Text]:
    """Return what the terminal shows below the command: while the prompt is read, after each step, and at the end.

    The views show no times, so that the result is reproducible.
    """
    view = LiveView(io.StringIO(), model.tokenizer, model.generation.eos_token_ids, clock=lambda: 0.0)
    drawn, answer = [Text("reading the prompt", style="dim")], ""
    for event in stream(model, prompt, seed=seed, speed=SETTINGS["speed"].default):
        if isinstance(event, Draft):
            drawn.append(Text.from_ansi("\n".join(map(styled, view.frame(event, COLUMNS)))))
        else:
            answer = event.text
    return [*drawn, Text(answer + "\n$ ")]


def picture(command: str, shown: Text, rows: int, name: str) -> str:
    """Return the SVG of one frame, with room for ``rows`` rows. ``name`` makes its ids and classes unique."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text(command))
    console.print(shown)
    console.print("\n" * (rows - len(shown.plain.split("\n"))), end="")
    svg = console.export_svg(title="dgemma-mlx", unique_id=name)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # viewers would download these fonts


def animated(pictures: list[str]) -> str:
    """Return one SVG that shows the pictures one after the other, and the last one where motion is not wanted."""
    total = STEP_SECONDS * (len(pictures) - 1) + LAST_SECONDS
    styles, groups = [], []
    for number, svg in enumerate(pictures):
        style = re.search(r"<style>(.*?)</style>", svg, re.DOTALL)
        matrix = re.search(rf'<g class="frame{number}-matrix">.*?</g>', svg, re.DOTALL)
        assert style is not None and matrix is not None
        begin, end = (100 * STEP_SECONDS * n / total for n in (number, number + 1))
        is_last = number == len(pictures) - 1
        after = "" if is_last else f" {end:.2f}% {{ visibility: hidden }}"
        before = "" if number == 0 else "0% { visibility: hidden } "
        styles.append(
            f"{style[1]}.show{number} {{ visibility: {'visible' if is_last else 'hidden'} }}\n"
            f"@keyframes show{number} {{ {before}{begin:.2f}% {{ visibility: visible }}{after} }}\n"
            "@media (prefers-reduced-motion: no-preference) {\n"
            f"  .show{number} {{ animation: show{number} {total:.1f}s step-end infinite }}\n}}\n"
        )
        groups.append(f'<g class="show{number}">{matrix[0]}</g>')
    frame = re.sub(r"<style>.*?</style>", lambda _: f"<style>{''.join(styles)}</style>", pictures[0], flags=re.DOTALL)
    return re.sub(r'<g class="frame0-matrix">.*?</g>', lambda _: "\n".join(groups), frame, flags=re.DOTALL)


def main() -> None:
    """Parse the command line and write the SVG file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="SVG file to write")
    parser.add_argument("--prompt", default=PROMPT, help="prompt of the model")
    parser.add_argument("--seed", type=int, default=3, help="seed of the answer")
    arguments = parser.parse_args()
    shown = frames(load("demo"), arguments.prompt, arguments.seed)
    command = f'$ dgemma-mlx generate -m demo --seed {arguments.seed} "{arguments.prompt}"'
    rows = max(len(text.plain.split("\n")) for text in shown)
    svg = animated([picture(command, text, rows, f"frame{number}") for number, text in enumerate(shown)])
    write_whole(arguments.file, svg)


if __name__ == "__main__":
    main()
