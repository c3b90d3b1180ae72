"""Draw the results of one or more runs of ``side_by_side.py --output``, one plot per quantity.

    python benchmarks/measured/draw.py RESULTS.json ... FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLORS = {
    "dgemma-mlx": "#2a6f97", "mlx-vlm": "#e07a1f", "mlx-vlm, unchunked": "#f2b880", "transformers": "#7a7a7a",
}  # fmt: skip
OTHER = "#89c2d9"


@dataclass(frozen=True)
class Plot:
    """A plot, written to one file.

    Attributes:
        name: Part of the file's name: ``benchmark-NAME.svg``.
        title: Label of the y axis, with its unit.
        quantity: Key that a row must have to be drawn.
        number: Function that returns a row's value in the unit of the title.
    """

    name: str
    title: str
    quantity: str
    number: Callable[[Row], float]


PLOTS = (
    Plot("step", "seconds per denoising step", "step_seconds", lambda row: row["step_seconds"]["median"]),
    Plot("prefill", "prefill, tokens per second", "prefill_seconds",
         lambda row: row["prompt_tokens"] / (row["prefill_seconds"]["median"] or math.inf)),
    Plot("memory", "peak resident memory, MB", "resident_peak", lambda row: row["resident_peak"]["median"] / 1e6),
    Plot("start", "seconds from start to first step", "start_seconds", lambda row: row["start_seconds"]["median"]),
)  # fmt: skip


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draw all plots into a folder and return the paths of the files. The same rows give the same files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dgemma-mlx", "font.size": 9, "axes.spines.right": False})
    matplotlib.rcParams["axes.spines.top"] = False
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(plot, rows, folder) for plot in PLOTS]


def _draw(plot: Plot, rows: list[Row], folder: Path) -> Path:
    """Draw one panel per case: lines over the length of the prompt, or bars when there is only one length."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if plot.quantity in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(1, len(cases), figsize=(3.7 * len(cases) + 0.5, 2.8), squeeze=False)
    for case, axes in zip(cases, panels[0], strict=True):
        own = [row for row in rows if row["case"] == case]
        if plot.quantity == "start_seconds":  # the start does not depend on the length of the prompt
            own = [row for row in own if row["prompt_tokens"] == min(row["prompt_tokens"] for row in own)]
        if len({row["prompt_tokens"] for row in own}) > 1:
            _lines(axes, plot, own)
        else:
            _bars(axes, plot, own)
        axes.set_title(case, fontsize=9)
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel(plot.title)
    figure.tight_layout()
    path = folder / f"benchmark-{plot.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _lines(axes: Any, plot: Plot, rows: list[Row]) -> None:
    """Draw one line per program over the length of the prompt."""
    for program in dict.fromkeys(row["program"] for row in rows):
        points = sorted((row["prompt_tokens"], plot.number(row)) for row in rows if row["program"] == program)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=program, color=COLORS.get(program, OTHER))
    axes.set_xscale("log", base=2)
    ticks = sorted({row["prompt_tokens"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("prompt tokens")
    axes.legend(frameon=False, fontsize=7)


def _bars(axes: Any, plot: Plot, rows: list[Row]) -> None:
    """Draw one bar per program."""
    names = [row["program"].replace(", ", ",\n") for row in rows]
    colors = [COLORS.get(row["program"], OTHER) for row in rows]
    bars = axes.bar(names, [plot.number(row) for row in rows], color=colors)
    axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", fontsize=7)
    axes.tick_params(axis="x", labelsize=6)


if __name__ == "__main__":
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        sys.exit()
    *files, folder = map(Path, sys.argv[1:])
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    for path in draw(rows, folder):
        print(path, file=sys.stderr)
