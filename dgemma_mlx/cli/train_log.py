"""The log of ``dgemma-mlx train``: lines on stderr, a plot of the loss, and an optional dashboard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import whole_file
from dgemma_mlx.sizes import duration, size

Record = Mapping[str, Any]
PLOT = "loss.png"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@contextmanager
def open_log(output: Path, steps: int, report_to: str | None, quiet: bool) -> Iterator[Callable[[Record], None]]:
    """Yield a function that takes the records of a run. When the block ends, draw the plot of the loss.

    Raises `DgemmaError` (exit code 2) when ``report_to`` is unknown or its package is not installed.
    """
    report, close = _dashboard(report_to, output)

    def log(record: Record) -> None:
        report(record)
        if not quiet:
            print(line(record, steps), file=sys.stderr, flush=True)

    try:
        yield log
    finally:
        close()
        plot(output)


def line(record: Record, steps: int) -> str:
    """Return one record as a line of text."""
    start = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if "valid_loss" in record:
        match = f"  exact match {record['exact_match']:.0%}" if "exact_match" in record else ""
        return f"{start}  validation: denoising loss {record['valid_loss']:.4f}{match}"
    return (
        f"{start}  loss {record['loss']:.4f}  {record['tokens_per_second']:,} tokens/s (prompts and canvases)  "
        f"{duration(record['seconds_left'])} left  peak {size(record['peak_memory'])}"
    )


def plot(output: Path) -> None:
    """Draw training and validation loss by step from ``loss.jsonl`` to ``loss.png``, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    from dgemma_mlx.train.finetune import LOG, read_log

    records = read_log(output / LOG)
    if not records:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("diffusion", "training"), ("valid_loss", "validation")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="denoising loss (nats per token)", yscale="log")
    axes.legend()
    with whole_file(output / PLOT) as file:
        figure.savefig(file, format="png", dpi=120)


def _dashboard(name: str | None, output: Path) -> tuple[Callable[[Record], None], Callable[[], Any]]:
    """Return the function that reports a record to the dashboard, and the function that closes the dashboard."""
    if name is None:
        return lambda record: None, lambda: None
    if name not in _PACKAGES:
        message = f"--report-to must be {' or '.join(_PACKAGES)}, not {shown(name)}"
        raise DgemmaError(message, "Leave it out for loss.jsonl alone.", exit_code=2)
    package = _PACKAGES[name]
    if find_spec(package) is None:
        raise DgemmaError(f"--report-to {name} needs {package}", f"Run pip install {package} first.", exit_code=2)
    if name == "wandb":
        import wandb

        run = wandb.init(project="dgemma-mlx", name=output.name)
        return lambda record: run.log(dict(record), step=record["step"]), run.finish
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(output / "tensorboard"))

    def report(record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                writer.add_scalar(key, value, record["step"])

    return report, writer.close
