"""What ``fill`` and ``edit`` have in common on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.loading import answer_arguments, load_model
from dgemma_mlx.cli.log.keep import Keeper, about
from dgemma_mlx.cli.machines import MachineOptions
from dgemma_mlx.cli.parameters import (
    AnswerOptions,
    AsJson,
    DenoisingOptions,
    ModelOptions,
    decoding_option,
    output_option,
)
from dgemma_mlx.cli.render.region import Region, can_draw
from dgemma_mlx.cli.render.visible import json_line
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.cli.texts import is_stdin, print_diff, print_exact, save_text, without_bom
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import check_writable
from dgemma_mlx.sizes import counted, size

if TYPE_CHECKING:
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.infill.fill import Filled

File = Annotated[Path | None, typer.Argument(help="The text. With `-` or without a FILE, it is read from stdin.")]
Candidates = Annotated[
    int | None,
    decoding_option(
        "--candidates", min=1, show_default="8 for fill, 5 for edit",
        help="Number of candidates written at a time: of several lengths, or attempts where the length is given. "
             "It has no effect on a whole text in edit.",
    ),
]  # fmt: skip
ShowAll = Annotated[bool, output_option("--show-all", help="List all candidates and their scores on stderr.")]
AsDiff = Annotated[bool, output_option("--diff", help="Print a unified diff.")]
Write = Annotated[
    bool, output_option("--write", "-w", help="Write the result to FILE, unless it is empty or uncertain.")
]


@dataclass(frozen=True)
class ResultOptions:
    """The options of ``fill`` and ``edit`` about candidates and the form of the result."""

    candidates: Candidates = None
    show_all: ShowAll = False
    diff: AsDiff = False
    as_json: AsJson = False
    write: Write = False

    def check(self, file: Path | None) -> None:
        """Raise `DgemmaError` for options that exclude each other, and for --write unless it can replace FILE."""
        if self.diff and self.as_json:
            raise DgemmaError("--diff and --json exclude each other", "The JSON object has the whole text.", 2)
        if self.write and (file is None or is_stdin(file)):
            raise DgemmaError("--write needs a FILE", "Without --write the text goes to stdout.", exit_code=2)
        if self.write and os.path.exists(str(file)):  # a missing FILE is an error of its own
            hint = "Without --write the text goes to stdout."
            if not os.path.isfile(str(file)):
                raise DgemmaError(f"--write cannot replace {file}, which is not a file", hint, exit_code=2)
            try:
                check_writable(Path(str(file)))
            except OSError as error:
                raise DgemmaError(f"--write cannot replace {file}: {reason(error)}", hint, exit_code=2) from None


@contextmanager
def prepared(
    model: ModelOptions, machines: MachineOptions, answer: AnswerOptions, denoising: DenoisingOptions, raw: bool,
    images: bool, whole: bool = False,
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """Yield the model and the keyword arguments that fill and edit share. ``images`` says whether it is shown any.

    ``whole`` is that of `load_model`.

    Within the block, Ctrl-C ends the work after the current denoising step.
    """
    settings = Settings()
    loaded = load_model(settings, model, answer.quiet, images=images, machines=machines, whole=whole)
    steps = settings.pick("max_denoising_steps", denoising.max_denoising_steps)
    arguments = {
        **answer_arguments(settings, answer, raw), "speed": settings.pick_checked("speed", denoising.speed),
        "temp": settings.pick("temp", denoising.temp),
        "generation": loaded.generation.override(max_denoising_steps=steps),
    }  # fmt: skip
    with interruptible() as cancelled, _status(answer.quiet) as progress:
        yield loaded, {**arguments, "cancelled": cancelled, "progress": progress}


@contextmanager
def _status(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that draws the number of canvases and the current step on a terminal, and nothing elsewhere."""
    if quiet or not can_draw():
        yield lambda canvases, steps: None
        return
    region = Region(sys.stderr)
    try:
        yield lambda canvases, steps: region.draw([[(f"{canvases} canvases, step {steps}", "2")]])
    finally:
        region.close()


def report(filled: Filled, result: ResultOptions, quiet: bool) -> None:
    """Print the candidates, the statistics and a warning about an uncertain result to stderr."""
    best, s = filled.candidates[0], filled.statistics
    if result.show_all:
        for candidate in filled.candidates:
            texts = "  ".join(json_line(text) for text in candidate.texts)
            doubt = "  (uncertain)" if candidate.low_confidence else ""
            print(f"{candidate.score:8.3f}  {'+'.join(map(str, candidate.lengths))} tokens{doubt}  {texts}",
                  file=sys.stderr)  # fmt: skip
    if not quiet:
        work = f"{counted(s.canvases, 'canvas', 'canvases')}, {counted(s.denoising_steps, 'step')}"
        print(f"{work}, {s.seconds:.2f} s, peak {size(s.peak_memory)}, seed {filled.seed}", file=sys.stderr)
    if best.low_confidence and not result.write:  # `save` says so
        print("dgemma-mlx: the best candidate was still uncertain: low confidence", file=sys.stderr)


def save(filled: Filled, path: Path, before: str) -> None:
    """Replace the text ``before`` of a file by the result, after the byte order mark that the text may have.

    Raises `DgemmaError`, without a change, if the result is doubtful.
    """
    if filled.doubt is not None:
        raise DgemmaError(
            f"{path} was not changed: {filled.doubt}", f"Without --write, --seed {filled.seed} shows the result."
        )
    save_text(path, without_bom(before)[0] + filled.text, before)


def print_filled(filled: Filled, model: Model, before: str, path: Path | None, form: str) -> None:
    """Print the result to stdout in one of the forms text, diff and json.

    ``before`` is the text of the file. The byte order mark that it may have stays before the result.
    """
    after = without_bom(before)[0] + filled.text
    if form == "json":
        print(json_line({"model": model.name, **asdict(filled)}))
    elif form == "diff":
        print_diff(before, after, path.name if path else "text", can_draw())
    else:
        print_exact(after)


def keep_filled(
    kind: str, asked: str, filled: Filled, model: Model, system: str | None, images: Sequence[Mapping[str, Any]]
) -> None:
    """Keep the result of ``fill`` or ``edit`` in the log.

    ``asked`` is what was asked for, and the text as it was. ``images`` are those that were shown.
    """
    Keeper(Settings()).keep_turn(kind, asked, filled.text, system, about(filled, model.name), images)
