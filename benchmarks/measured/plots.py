"""The plots of ``answers.py``: right answers against work, and the speed modes by task. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import ALL, APART, Sums, front

OWN, OTHER = "#2a6f97", "#e07a1f"  # this project's ways, and those of other programs
PEERS = ("mlx-vlm", "diffusers")  # what the names of other programs' ways begin with
SPEED_COLORS = {"reference": "#7a7a7a", "balanced": "#2a6f97", "fast": "#89c2d9"}


def draw(sums: Sequence[Sums], folder: Path) -> list[Path]:
    """Draw the plots that the sums suffice for into a folder, and return their paths.

    The same sums give the same bytes, with one version of matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dgemma-mlx", "font.size": 9, "axes.spines.right": False})
    matplotlib.rcParams["axes.spines.top"] = False
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {one.task for one in sums}
    drawn = [_draw_front([one for one in sums if one.task in (ALL, APART) or len(tasks) == 1], folder)]
    if {one.way for one in sums} >= SPEED_COLORS.keys():
        drawn.append(_draw_speeds([one for one in sums if one.task != APART], folder))
    return drawn


def _draw_front(sums: Sequence[Sums], folder: Path) -> Path:
    """Draw ``benchmark-answers.svg``: for each task a panel with one point per way, and the front.

    Bars are 95 % intervals: of the share of right answers, and of the work relative to the first way's.
    """
    import matplotlib.pyplot as plt

    tasks = sorted({one.task for one in sums})  # "all" first
    numbers = {way: number for number, way in enumerate(dict.fromkeys(one.way for one in sums), 1)}
    height = 3.8 + 0.17 * math.ceil(len(numbers) / 2)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(max(4.6 * len(tasks), 5.6), height), squeeze=False, layout="constrained"
    )
    for task, axes in zip(tasks, panels[0], strict=True):
        shown = [one for one in sums if one.task == task]
        best = front(shown)
        axes.step(
            [1 / one.saving for one in best], [100 * one.share for one in best], where="post", color="#b0b0b0",
            linewidth=1, zorder=0,
        )  # fmt: skip
        for one in shown:
            x, y = 1 / one.saving, 100 * one.share
            low, high = one.saving_interval or (one.saving, one.saving)
            widths = [[max(0.0, x - 1 / high)], [max(0.0, 1 / low - x)]]
            heights = [[y - 100 * one.share_interval[0]], [100 * one.share_interval[1] - y]]
            color = OTHER if one.way.startswith(PEERS) else OWN
            number = numbers[one.way]
            axes.errorbar(
                x, y, heights, widths, fmt="o", markersize=4, color=color, elinewidth=0.5, label=f"{number}  {one.way}"
            )
            axes.annotate(str(number), (x, y), (3, 3), textcoords="offset points", fontsize=8, color=color)
        axes.set_xscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if tick <= 2 * max(1 / one.saving for one in shown)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"work, {shown[0].way} = 1")
        axes.set_title(f"{task}, {len(shown[0].records):,} questions", fontsize=9)
    panels[0][0].set_ylabel("right answers, %")
    named = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return _save(figure, folder / "benchmark-answers.svg")


def _draw_speeds(sums: Sequence[Sums], folder: Path) -> Path:
    """Draw ``benchmark-speed.svg``: for each task one bar per speed mode."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(one.task for one in sums))
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
    for index, (speed, color) in enumerate(SPEED_COLORS.items()):
        own = {one.task: one for one in sums if one.way == speed}
        positions = [x + 0.27 * (index - 1) for x in range(len(tasks))]
        steps = [own[task].decoder_passes / own[task].canvases for task in tasks]
        panels[0].bar(positions, steps, 0.25, label=speed, color=color)
        panels[1].bar(positions, [100 * own[task].share for task in tasks], 0.25, color=color)
    panels[0].set_ylabel("steps per canvas")
    panels[0].legend(frameon=False, ncols=3)
    panels[1].set_ylabel("correct answers, %")
    panels[1].set_xticks(range(len(tasks)), tasks, fontsize=8)
    figure.tight_layout()
    return _save(figure, folder / "benchmark-speed.svg")


def _save(figure: Any, path: Path) -> Path:
    """Write a figure without its date, and return the path."""
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
