"""``dgemma-mlx edit``: an instruction and a text in, the changes out."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.image_options import ImageOptions, show_images
from dgemma_mlx.cli.infill import File, ResultOptions, keep_filled, prepared, print_filled, report, save
from dgemma_mlx.cli.machines import MachineOptions
from dgemma_mlx.cli.parameters import AnswerOptions, DenoisingOptions, ModelOptions, section
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.texts import is_stdin, read_text, without_bom
from dgemma_mlx.errors import DgemmaError

edit_option = section("Edit")

Instruction = Annotated[str, typer.Argument(help="What to change.")]
Lines = Annotated[str | None, edit_option("--lines", metavar="A-B", help="Change only these lines, counted from 1.")]
Match = Annotated[
    str | None,
    edit_option("--match", metavar="REGEX", help="Change only what this matches, within --lines if they are given."),
]
Strength = Annotated[
    float | None,
    edit_option("--strength", show_default="0.6, or 1 with --lines or --match",
                help="Share of the text that begins as noise, above 0 and at most 1."),
]  # fmt: skip


def edit(
    instruction: Instruction,
    file: File = None,
    *,
    lines: Lines = None,
    match: Match = None,
    strength: Strength = None,
    pictures: ImageOptions,
    answer: AnswerOptions,
    model: ModelOptions,
    machines: MachineOptions,
    result: ResultOptions,
    denoising: DenoisingOptions,
) -> None:
    """Change a text as an instruction says.

    The canvas begins as the text itself, with a share of its tokens replaced by noise. The changes to a FILE are shown
    as a diff and saved with `--write`. A text from standard input goes to stdout with its changes.

    Notes:
        - The whole text may change, or only the part that `--lines` or `--match` selects. Then the rest stays the same,
          byte for byte, and `--candidates` are written with lengths near the one it has.
        - A low `--strength` keeps most of the wording.
        - `--image` shows the model a picture that the instruction is about (docs/images.md).
        - docs/fill.md explains how candidates are written and compared.

    Examples:
        echo '{"name": "Simon", "age": 59, "city": "Oslo"}' | dgemma-mlx edit -m demo --match Oslo \\
            "Make a JSON object: Simon is 59 years old and lives in Athens."
        dgemma-mlx edit "Fix the grammar." mail.txt --lines 3-5 --write
        pbpaste | dgemma-mlx edit "Translate to French." | pbcopy
    """
    result.check(file)
    span = None if lines is None else _span(lines)
    pictures.check(prompt_on_stdin=is_stdin(file))
    images = pictures.read()
    before = read_text(file)
    _, text = without_bom(before)
    with quiet_when_closed():
        with prepared(model, machines, answer, denoising, raw=False, images=bool(images)) as (loaded, arguments):
            from dgemma_mlx.infill.edit import DEFAULT_CANDIDATES
            from dgemma_mlx.infill.edit import edit as edit_text

            if not (answer.quiet or result.as_json):
                show_images(images)
            edited = edit_text(
                loaded, instruction, text, lines=span, match=match, strength=strength,
                candidates=result.candidates or DEFAULT_CANDIDATES, images=images, **arguments,
            )  # fmt: skip
        report(edited, result, answer.quiet)
        if edited.text == text and not answer.quiet:
            print("dgemma-mlx: nothing has changed", file=sys.stderr)
        if result.write and file is not None:
            save(edited, file, before)
        form = "text" if is_stdin(file) and not result.diff else "diff"
        print_filled(edited, loaded, before, file, "json" if result.as_json else form)
        keep_filled("edit", f"{instruction}\n\n{text}", edited, loaded, arguments["system"], images)


def _span(lines: str) -> tuple[int, int]:
    """Return the first and the last line of ``A-B`` or ``A``. Raises `DgemmaError` for any other text."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", lines)
    if found is None:
        raise DgemmaError(f"--lines must be A-B, not {shown(lines)}", "Lines count from 1, as in --lines 3-5.", 2)
    return int(found[1]), int(found[2] or found[1])
