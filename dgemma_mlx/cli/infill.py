"""What fill, edit and choose have in common on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.generate import chosen, draws, in_bytes, load_as_told
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.render.visible import json_line
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.texts import print_diff, print_exact
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.infill.fill import Filled

Candidates = Annotated[
    int | None,
    typer.Option(min=1, help="Write it so many times at once, at several lengths where those are not given."),
]
ShowAll = Annotated[bool, typer.Option("--show-all", help="List all candidates on stderr, with their scores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object with all candidates.")]
AsDiff = Annotated[bool, typer.Option("--diff", help="Print a unified diff.")]
Write = Annotated[bool, typer.Option("--write", "-w", help="Write the result into FILE.")]


def check_output(diff: bool, as_json: bool, write: bool, has_file: bool) -> None:
    """``DgemmaError`` where the forms of output exclude each other, or there is no file to write."""
    if diff and as_json:
        raise DgemmaError("--diff and --json exclude each other", "The JSON object has the whole text.", exit_code=2)
    if write and not has_file:
        raise DgemmaError("--write needs a FILE", "Without it the text goes to stdout.", exit_code=2)


@contextmanager
def prepared(
    *, model: str | None, adapter: Path | None, seed: int | None, system: str | None, raw: bool, speed: str | None,
    temp: float | None, max_denoising_steps: int | None, memory_limit: str | None, cpu_dequantize: str | None,
    no_kernels: bool, quiet: bool,
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """The model, and what the Python functions take beside their own arguments; Ctrl-C stops between two steps."""
    settings = Settings()
    loaded = load_as_told(settings, model, cpu_dequantize, no_kernels, quiet, adapter)
    steps = settings.pick("max_denoising_steps", max_denoising_steps)
    options: dict[str, Any] = {
        "seed": settings.pick("seed", seed), "system": system if raw else settings.pick("system", system),
        "speed": chosen(settings, "speed", speed), "temp": settings.pick("temp", temp),
        "memory_limit": in_bytes(settings.pick("memory_limit", memory_limit)),
        "generation": loaded.generation.override(max_denoising_steps=steps),
    }  # fmt: skip
    with interruptible() as cancelled, _status(quiet) as progress:
        yield loaded, {**options, "cancelled": cancelled, "progress": progress}


@contextmanager
def _status(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Says on a terminal, while something is written, how many canvases and steps there have been."""
    if quiet or not draws():
        yield lambda canvases, steps: None
        return
    from dgemma_mlx.cli.render.region import Region

    region = Region(sys.stderr)
    try:
        yield lambda canvases, steps: region.draw([[(f"{canvases} canvases, step {steps}", "2")]])
    finally:
        region.close()


def report(filled: Filled, model: Model, show_all: bool, quiet: bool) -> None:
    """What belongs on stderr."""
    best, s = filled.candidates[0], filled.statistics
    if show_all:
        for candidate in filled.candidates:
            texts = "  ".join(json_line(text) for text in candidate.texts)
            doubt = "  (uncertain)" if candidate.low_confidence else ""
            print(f"{candidate.score:8.3f}  {'+'.join(map(str, candidate.lengths))} tokens{doubt}  {texts}",
                  file=sys.stderr)  # fmt: skip
    if not quiet:
        canvases = "1 canvas" if s.canvases == 1 else f"{s.canvases} canvases"
        print(f"{canvases}, {s.denoising_steps} steps, {s.seconds:.2f} s, peak {s.peak_memory / 2**20:,.0f} MB, "
              f"seed {filled.seed}", file=sys.stderr)  # fmt: skip
    if best.low_confidence:
        print("dgemma-mlx: the best candidate was still uncertain: low confidence", file=sys.stderr)


def print_filled(filled: Filled, model: Model, before: str, path: Path | None, form: str) -> None:
    """The result on stdout: ``text``, ``diff`` or ``json``."""
    if form == "json":
        print(json_line({"model": model.name, **asdict(filled)}))
    elif form == "diff":
        print_diff(before, filled.text, path.name if path else "text", draws())
    else:
        print_exact(filled.text)
