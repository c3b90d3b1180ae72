"""Measure correct answers and denoising steps of each speed mode and of --verify, on the demo model.

    python benchmarks/answers.py [--prompts 100] [--ways reference,balanced,fast,reference+flag,...] [--tasks ...]
           [--model FOLDER] [--processes 2] [--output FILE] [--plots FOLDER]

A way is a speed mode, optionally followed by ``+flag`` or ``+repair`` for ``--verify``. Every way answers the same
held-out prompts of every task with the same seeds. The script prints a table. ``--output`` writes the table as JSON,
and ``--plots`` draws steps per canvas and correct answers. Work is counted in denoising steps. A step is one pass of
the decoder over a canvas; ``--verify`` adds one pass of the encoder per canvas and per repair, which is not counted.
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

import candidates  # noqa: F401, by which ``--ways`` may name the samplers that were tried

from dgemma_mlx import Model, generate, load
from dgemma_mlx.train.tasks import TASKS

WAYS = "reference,balanced,fast,reference+flag,reference+repair"
COLORS = {"reference": "#7a7a7a", "balanced": "#2a6f97", "fast": "#89c2d9"}


@dataclass
class Row:
    """Counts of one way on one task.

    Attributes:
        task: Name of the task, or "all".
        way: The speed mode and the ``--verify`` mode.
        prompts: Number of prompts.
        correct: Number of correct answers.
        steps: Denoising steps of all answers.
        canvases: Canvases of all answers.
        tokens: Tokens of all answers.
        seconds: Total time.
        low_confidence: Number of answers with at least one low-confidence canvas.
        flagged_right: Number of correct answers in which the encoder doubts a token.
        flagged_wrong: Number of wrong answers in which the encoder doubts a token.
    """

    task: str
    way: str
    prompts: int = 0
    correct: int = 0
    steps: int = 0
    canvases: int = 0
    tokens: int = 0
    seconds: float = 0.0
    low_confidence: int = 0
    flagged_right: int = 0
    flagged_wrong: int = 0


def measure(model: Model, task: str, way: str, prompts: int, seed: int) -> Row:
    """Answer held-out prompts of one task in one way and check the answers."""
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
    """Return the sums of one way over all tasks."""
    own = [row for row in rows if row.way == way]
    sums = {name: sum(asdict(row)[name] for row in own) for name in asdict(own[0]) if name not in ("task", "way")}
    return Row("all", way, **sums)


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    columns = (
        "task", "way", "correct", "steps per canvas", "tokens per step", "low confidence", "doubted: correct", "wrong"
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [
        f"| {row.task} | {row.way} | {row.correct / row.prompts:.1%} | {row.steps / row.canvases:.2f} "
        f"| {row.tokens / row.steps:.2f} | {row.low_confidence} | {row.flagged_right} of {row.correct} "
        f"| {row.flagged_wrong} of {row.prompts - row.correct} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], folder: Path) -> Path:
    """Draw ``benchmark-speed.svg``: for each task one bar per speed mode."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dgemma-mlx", "font.size": 9, "axes.spines.right": False})
    matplotlib.rcParams["axes.spines.top"] = False
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True)
    for index, (speed, color) in enumerate(COLORS.items()):
        own = {row.task: row for row in rows if row.way == speed}
        positions = [x + 0.27 * (index - 1) for x in range(len(tasks))]
        panels[0].bar(positions, [own[t].steps / own[t].canvases for t in tasks], 0.25, label=speed, color=color)
        panels[1].bar(positions, [100 * own[t].correct / own[t].prompts for t in tasks], 0.25, color=color)
    panels[0].set_ylabel("steps per canvas")
    panels[0].legend(frameon=False, ncols=3)
    panels[1].set_ylabel("correct answers, %")
    panels[1].set_xticks(range(len(tasks)), tasks, fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark-speed.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def in_processes(arguments: argparse.Namespace) -> list[Row]:
    """Divide the tasks among several processes of this script and return their rows."""
    shares = [arguments.tasks[i :: arguments.processes] for i in range(arguments.processes)]
    command = [sys.executable, __file__, "--prompts", str(arguments.prompts), "--ways", ",".join(arguments.ways),
               "--seed", str(arguments.seed), "--model", arguments.model, "--rows"]  # fmt: skip
    started = [
        subprocess.Popen([*command, "--tasks", ",".join(share)], stdout=subprocess.PIPE, text=True)
        for share in shares if share
    ]  # fmt: skip
    found: list[dict[str, Any]] = [row for process in started for row in json.loads(process.communicate()[0])]
    order = {task: index for index, task in enumerate(arguments.tasks)}
    return sorted((Row(**row) for row in found), key=lambda row: order[row.task])


def main() -> None:
    """Parse the command line, measure and print the table."""

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="prompts per task")
    parser.add_argument("--ways", type=names, default=names(WAYS), help="speed modes, optionally with +flag or +repair")
    parser.add_argument("--tasks", type=names, default=list(TASKS), help="tasks of the demo model (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of prompts")
    parser.add_argument("--model", default="demo", help="model or checkpoint folder")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the tasks")
    parser.add_argument("--rows", action="store_true", help="print the rows as JSON, without totals")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
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
