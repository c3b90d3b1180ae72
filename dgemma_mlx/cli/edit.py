"""``dgemma-mlx edit``: an instruction and a text in, the changes out."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from dgemma_mlx.cli.fill import File, System
from dgemma_mlx.cli.generate import (
    Adapter,
    Dequantize,
    MemoryLimit,
    ModelName,
    NoKernels,
    Quiet,
    Seed,
    SpeedMode,
    Steps,
    Temp,
)
from dgemma_mlx.cli.infill import (
    AsDiff,
    AsJson,
    Candidates,
    ShowAll,
    Write,
    check_output,
    prepared,
    print_filled,
    report,
)
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.texts import is_stdin, read_text, save_text
from dgemma_mlx.errors import DgemmaError

Instruction = Annotated[str, typer.Argument(help="What is to change.")]
Strength = Annotated[
    float | None,
    typer.Option(help="Share of the text that begins as noise, to 1; 0.6, or 1 with --lines or --match."),
]
Lines = Annotated[str | None, typer.Option(metavar="A-B", help="Change these lines only, from 1.")]
Match = Annotated[str | None, typer.Option(metavar="REGEX", help="Change only what this matches (in --lines).")]


def edit(
    instruction: Instruction,
    file: File = None,
    lines: Lines = None,
    match: Match = None,
    strength: Strength = None,
    candidates: Candidates = None,
    show_all: ShowAll = False,
    diff: AsDiff = False,
    as_json: AsJson = False,
    write: Write = False,
    model: ModelName = None,
    adapter: Adapter = None,
    seed: Seed = None,
    system: System = None,
    speed: SpeedMode = None,
    temp: Temp = None,
    max_denoising_steps: Steps = None,
    memory_limit: MemoryLimit = None,
    cpu_dequantize: Dequantize = None,
    no_kernels: NoKernels = False,
    quiet: Quiet = False,
) -> None:
    """Change a text as an instruction says, starting from the text itself.

    Of a FILE the changes are shown as a diff, and written with --write; a text from stdin goes to stdout, changed.
    All of it may change, or only --lines or what --match finds; then the rest stays as it is, byte for byte.
    """
    check_output(diff, as_json, write, not is_stdin(file))
    span = None if lines is None else _span(lines)
    before = read_text(file)
    with quiet_when_closed():
        with prepared(
            model=model, adapter=adapter, seed=seed, system=system, raw=False, speed=speed, temp=temp,
            memory_limit=memory_limit, max_denoising_steps=max_denoising_steps, cpu_dequantize=cpu_dequantize,
            no_kernels=no_kernels, quiet=quiet,
        ) as (loaded, options):  # fmt: skip
            from dgemma_mlx.infill.edit import DEFAULT_CANDIDATES
            from dgemma_mlx.infill.edit import edit as edit_text

            edited = edit_text(
                loaded, instruction, before, lines=span, match=match, strength=strength,
                candidates=candidates or DEFAULT_CANDIDATES, **options,
            )
        report(edited, loaded, show_all, quiet)
        if edited.text == before and not quiet:
            print("dgemma-mlx: nothing has changed", file=sys.stderr)
        if write and file is not None:
            save_text(file, edited.text, before)
        shown = "text" if is_stdin(file) and not diff else "diff"
        print_filled(edited, loaded, before, file, "json" if as_json else shown)


def _span(lines: str) -> tuple[int, int]:
    """``A-B`` or ``A``."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", lines)
    if found is None:
        raise DgemmaError(f"--lines must be A-B, not {lines!r}", "They count from 1, as in --lines 3-5.", exit_code=2)
    return int(found[1]), int(found[2] or found[1])
