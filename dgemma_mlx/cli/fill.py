"""``dgemma-mlx fill``: a text with gaps in, the whole text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

if TYPE_CHECKING:
    from dgemma_mlx.infill.template import Part

File = Annotated[Path | None, typer.Argument(help="The text; '-' or none reads it from stdin.", show_default=False)]
Mark = Annotated[str, typer.Option("--hole", help="What marks a gap; MARK:20MARK is one of 20 tokens.")]
Prompt = Annotated[
    str | None, typer.Option(help="Ask the model this, instead of showing it the text with its gaps.")
]
At = Annotated[str | None, typer.Option(metavar="LINE:COL", help="The gap is here in FILE, from 1; no marks are read.")]
Size = Annotated[int | None, typer.Option(min=1, help="Tokens of the gap of --at or --prefix-file.")]
Hint = Annotated[str, typer.Option(help="For the model: what belongs into that gap.")]
PrefixFile = Annotated[Path | None, typer.Option(help="Instead of FILE: what is before the gap.")]
SuffixFile = Annotated[Path | None, typer.Option(help="Instead of FILE: what is behind the gap.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="No prompt: the model sees what is before and behind, nothing else.")]


def fill(
    file: File = None,
    hole: Mark = "___",
    prompt: Prompt = None,
    at: At = None,
    size: Size = None,
    hint: Hint = "",
    prefix_file: PrefixFile = None,
    suffix_file: SuffixFile = None,
    candidates: Candidates = None,
    show_all: ShowAll = False,
    diff: AsDiff = False,
    as_json: AsJson = False,
    write: Write = False,
    model: ModelName = None,
    adapter: Adapter = None,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    speed: SpeedMode = None,
    temp: Temp = None,
    max_denoising_steps: Steps = None,
    memory_limit: MemoryLimit = None,
    cpu_dequantize: Dequantize = None,
    no_kernels: NoKernels = False,
    quiet: Quiet = False,
) -> None:
    """Fill the gaps of a text; what stands around them stays as it is, byte for byte.

    A gap is written ___, or ___:20___ where it has 20 tokens, or {{fill: what belongs there}}. How long a gap is is
    searched, where that is not said. All gaps and what is between them must fit into one canvas.
    """
    split = prefix_file is not None or suffix_file is not None
    _check(file, at, size, hint, split)
    check_output(diff, as_json, write, not (is_stdin(file) or split))
    before, parts = _parts(file, hole, at, size, hint, prefix_file, suffix_file)
    with quiet_when_closed():
        with prepared(
            model=model, adapter=adapter, seed=seed, system=system, raw=raw, speed=speed, temp=temp,
            memory_limit=memory_limit, max_denoising_steps=max_denoising_steps, cpu_dequantize=cpu_dequantize,
            no_kernels=no_kernels, quiet=quiet,
        ) as (loaded, options):  # fmt: skip
            from dgemma_mlx.infill.fill import DEFAULT_CANDIDATES
            from dgemma_mlx.infill.fill import fill as fill_text

            filled = fill_text(
                loaded, parts, prompt=prompt, raw=raw, candidates=candidates or DEFAULT_CANDIDATES, **options
            )
        report(filled, loaded, show_all, quiet)
        if write and file is not None:
            save_text(file, filled.text, before)
        form = "json" if as_json else "diff" if diff else "text"
        if not write or form != "text":
            print_filled(filled, loaded, before, file, form)


def _parts(
    file: Path | None, mark: str, at: str | None, size: int | None, hint: str, prefix_file: Path | None,
    suffix_file: Path | None,
) -> tuple[str, Sequence[Part]]:
    """The text before, and its parts."""
    from dgemma_mlx.infill.template import Gap, parse_gaps

    if prefix_file is not None or suffix_file is not None:
        prefix, suffix = ("" if path is None else read_text(path) for path in (prefix_file, suffix_file))
        return prefix + suffix, [prefix, Gap(size, hint), suffix]
    text = read_text(file)
    if at is None:
        return text, parse_gaps(text, mark)
    place = _place(text, at)
    return text, [text[:place], Gap(size, hint), text[place:]]


def _place(text: str, at: str) -> int:
    """``LINE:COL``, both from 1 -> the character's index."""
    from dgemma_mlx.infill.template import lines_of

    line, _, column = at.partition(":")
    lines = lines_of(text) or [""]
    if lines[-1].endswith("\n"):
        lines.append("")
    if not (line.isdecimal() and column.isdecimal()):
        raise DgemmaError(f"--at must be LINE:COL, not {at!r}", "Both count from 1, as in --at 12:5.", exit_code=2)
    row = int(line)
    if not 1 <= row <= len(lines):
        raise DgemmaError(f"there is no line {row}", f"The text has {len(lines)}.", exit_code=2)
    content = lines[row - 1].rstrip("\r\n")
    if not 1 <= int(column) <= len(content) + 1:
        raise DgemmaError(f"there is no column {column} in line {row}", f"It has {len(content)}.", exit_code=2)
    return sum(map(len, lines[: row - 1])) + int(column) - 1


def _check(file: Path | None, at: str | None, size: int | None, hint: str, split: bool) -> None:
    if split and (file is not None or at is not None):
        raise DgemmaError("--prefix-file and --suffix-file go without FILE and --at", "Name the text once.", 2)
    if (size is not None or hint) and not split and at is None:
        raise DgemmaError("--size and --hint go with --at or --prefix-file", "Write ___:20___ in the text.", 2)
