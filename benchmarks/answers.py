"""What the speed modes and the encoder's check do to whole answers: right ones and denoising steps, on the demo model.

    python benchmarks/answers.py [--prompts 100] [--ways reference,balanced,fast,reference+flag,...] [--tasks ...]
           [--model FOLDER] [--processes 2] [--output FILE] [--plots FOLDER]

Every way answers the same held-out prompts of every task with the same seeds; a way is a speed mode, with ``+flag``
or ``+repair`` behind it for ``--verify``. Prints a table; ``--output`` gets it as JSON, ``--plots`` draws steps a
canvas and right answers. Work is counted in steps, each a pass of the decoder over a canvas; what ``--verify`` adds is
one pass of the encoder for each canvas and each repair.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx import Model, generate, load
from dgemma_mlx.train.tasks import TASKS

WAYS = "reference,balanced,fast,reference+flag,reference+repair"
COLORS = {"reference": "#7a7a7a", "balanced": "#2a6f97", "fast": "#89c2d9"}


@dataclass
class Row:
    """One task, one way."""

    task: str
    way: str
    prompts: int = 0
    correct: int = 0
    steps: int = 0
    canvases: int = 0
    tokens: int = 0
    seconds: float = 0.0
    low_confidence: int = 0
    """answers with such a canvas"""
    flagged_right: int = 0
    """right answers in which the encoder doubts a token"""
    flagged_wrong: int = 0


def measure(model: Model, task: str, way: str, prompts: int, seed: int) -> Row:
    speed, _, verify = way.partition("+")
    rng, row = random.Random(f"answers/{task}/{seed}"), Row(task, way, prompts)
    for number in range(prompts):
        example = TASKS[task].sample(rng, "heldout")
        done = generate(
            model, list(example.messages), max_tokens=128, seed=number, speed=speed, verify=verify or "off"
        )
        right, statistics = TASKS[task].check(example, done.text), done.statistics
        row.correct += right
        row.steps += statistics.denoising_steps
        row.canvases += statistics.canvases
        row.tokens += statistics.generated_tokens
        row.seconds += statistics.seconds
        row.low_confidence += statistics.low_confidence > 0
        row.flagged_right += right and statistics.doubted_tokens > 0
        row.flagged_wrong += not right and statistics.doubted_tokens > 0
    return row


def total(rows: list[Row], way: str) -> Row:
    """All tasks of a way together."""
    own = [row for row in rows if row.way == way]
    sums = {name: sum(asdict(row)[name] for row in own) for name in asdict(own[0]) if name not in ("task", "way")}
    return Row("all", way, **sums)


def table(rows: list[Row]) -> str:
    columns = "task", "way", "right", "steps a canvas", "tokens a step", "low confidence", "doubted: right", "wrong"
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [
        f"| {row.task} | {row.way} | {row.correct / row.prompts:.1%} | {row.steps / row.canvases:.2f} "
        f"| {row.tokens / row.steps:.2f} | {row.low_confidence} | {row.flagged_right} of {row.correct} "
        f"| {row.flagged_wrong} of {row.prompts - row.correct} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], folder: Path) -> Path:
    """Writes ``benchmark-speed.svg``: bars for each task, one for each speed mode."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dgemma-mlx", "font.size": 9, "axes.spines.right": False})
    matplotlib.rcParams["axes.spines.top"] = False
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
    for place, (speed, color) in enumerate(COLORS.items()):
        own = {row.task: row for row in rows if row.way == speed}
        across = [x + 0.27 * (place - 1) for x in range(len(tasks))]
        panels[0].bar(across, [own[t].steps / own[t].canvases for t in tasks], 0.25, label=speed, color=color)
        panels[1].bar(across, [100 * own[t].correct / own[t].prompts for t in tasks], 0.25, color=color)
    panels[0].set_ylabel("steps a canvas")
    panels[0].legend(frameon=False, ncols=3)
    panels[1].set_ylabel("right answers, %")
    panels[1].set_xticks(range(len(tasks)), tasks, fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark-speed.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def in_processes(arguments: argparse.Namespace) -> list[Row]:
    """The tasks dealt out to processes like this one."""
    hands = [arguments.tasks[i :: arguments.processes] for i in range(arguments.processes)]
    command = [sys.executable, __file__, "--prompts", str(arguments.prompts), "--ways", ",".join(arguments.ways),
               "--seed", str(arguments.seed), "--model", arguments.model, "--rows"]  # fmt: skip
    started = [
        subprocess.Popen([*command, "--tasks", ",".join(hand)], stdout=subprocess.PIPE, text=True)
        for hand in hands if hand
    ]  # fmt: skip
    found: list[dict[str, Any]] = [row for process in started for row in json.loads(process.communicate()[0])]
    order = {task: place for place, task in enumerate(arguments.tasks)}
    return sorted((Row(**row) for row in found), key=lambda row: order[row.task])


def main() -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="of each task")
    parser.add_argument("--ways", type=names, default=names(WAYS))
    parser.add_argument("--tasks", type=names, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", action="store_true", help="print the rows as JSON, without totals")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    if arguments.processes > 1:
        rows = in_processes(arguments)
    else:
        model = load(arguments.model)
        rows = [
            measure(model, task, way, arguments.prompts, arguments.seed)
            for task in arguments.tasks for way in arguments.ways
        ]  # fmt: skip
    if arguments.rows:
        print(json.dumps([asdict(row) for row in rows]))
        return
    totals = [total(rows, way) for way in arguments.ways]
    print(table(rows + totals))
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": [asdict(row) for row in rows + totals]}, indent=2) + "\n")
    if arguments.plots:
        print(draw(rows, arguments.plots), file=sys.stderr)


if __name__ == "__main__":
    main()
