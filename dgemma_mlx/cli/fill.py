"""``dgemma-mlx fill``: a text with gaps in, the whole text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.image_options import ImageOptions, show_images
from dgemma_mlx.cli.infill import File, ResultOptions, keep_filled, prepared, print_filled, report, save
from dgemma_mlx.cli.machines import TeamOptions, team_of
from dgemma_mlx.cli.parameters import AnswerOptions, DenoisingOptions, ModelOptions, prompt_option, section
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.texts import is_stdin, read_text, without_bom
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted

if TYPE_CHECKING:
    from dgemma_mlx.infill.template import Part

gap_option = section("Gaps")

Mark = Annotated[str, gap_option("--hole", metavar="MARK", help="The text that marks a gap.")]
At = Annotated[
    str | None,
    gap_option(
        "--at", metavar="LINE:COL",
        help="Put the gap here in FILE, counted from 1. Gap marks in FILE are kept as plain text.",
    ),
]
Size = Annotated[
    int | None, gap_option("--size", min=1, help="Number of tokens in the gap of --at or --prefix-file.")
]
Hint = Annotated[
    str, gap_option("--hint", help="A hint for the model: what belongs in the gap of --at or --prefix-file.")
]
PrefixFile = Annotated[
    Path | None, gap_option("--prefix-file", metavar="FILE", help="The text before the gap, instead of FILE.")
]
SuffixFile = Annotated[
    Path | None, gap_option("--suffix-file", metavar="FILE", help="The text after the gap, instead of FILE.")
]
Prompt = Annotated[
    str | None, prompt_option("--prompt", help="Ask the model this instead of showing it the text with its gaps.")
]
Raw = Annotated[
    bool, prompt_option("--raw", help="Send no prompt: the model sees only the text before and after the gaps.")
]


def fill(
    file: File = None,
    *,
    hole: Mark = "___",
    at: At = None,
    size: Size = None,
    hint: Hint = "",
    prefix_file: PrefixFile = None,
    suffix_file: SuffixFile = None,
    prompt: Prompt = None,
    raw: Raw = False,
    pictures: ImageOptions,
    answer: AnswerOptions,
    model: ModelOptions,
    machines: TeamOptions,
    result: ResultOptions,
    denoising: DenoisingOptions,
) -> None:
    """Fill the gaps of a text and keep the rest byte for byte.

    A gap is written `___`. `___:20___` is a gap of 20 tokens, and `{{fill: a docstring}}` is a gap with a hint for the
    model. The result goes to stdout.

    Notes:
        - `--at` puts a gap at a cursor, and `--prefix-file` and `--suffix-file` put one between two files.
        - Gaps of unknown length are written at several lengths at a time (`--candidates`). The most probable candidate
          wins, and `--show-all` lists the others.
        - With several machines, each loads the whole model and writes some of the candidates. `--candidates 1` and
          `--split` cut the model over the machines instead (docs/several-macs.md).
        - All gaps and the text between them must fit into one canvas.
        - `--image` shows the model a picture, such as the form that the text describes (docs/images.md).
        - docs/fill.md explains what the model sees and how the candidates are compared.

    Examples:
        echo '{"name": "___", "age": ___, "city": "___"}' |
            dgemma-mlx fill -m demo --prompt "Make a JSON object: Simon is 59 years old and lives in Rome."
        dgemma-mlx fill letter.txt --diff
        dgemma-mlx fill main.py --at 12:5 --hint "a docstring" --write
    """
    whole = machines.check_team(is_spread=result.candidates != 1)
    in_two = prefix_file is not None or suffix_file is not None
    _check(file, at, size, hint, in_two)
    result.check(None if in_two else file)
    texts = [path for path in (prefix_file, suffix_file) if path is not None] if in_two else [file]
    pictures.check(prompt_on_stdin=any(map(is_stdin, texts)), raw=raw)
    images = pictures.read()
    before, parts = _parts(file, hole, at, size, hint, prefix_file, suffix_file)
    with quiet_when_closed():
        with prepared(model, machines, answer, denoising, raw, bool(images), whole) as (loaded, arguments):
            from dgemma_mlx.infill.fill import DEFAULT_CANDIDATES
            from dgemma_mlx.infill.spread import Question, fill_together
            from dgemma_mlx.infill.template import shown as shown_gaps

            if not (answer.quiet or result.as_json):
                show_images(images)
            candidates, system = result.candidates or DEFAULT_CANDIDATES, arguments["system"]
            question = Question(parts, prompt, system, raw, candidates, images)
            team = team_of(machines, loaded, whole)
            options = {name: arguments[name] for name in ("speed", "temp", "generation", "memory_limit")}
            aside = {name: arguments[name] for name in ("seed", "progress", "cancelled")}
            filled = fill_together(team, question, options, **aside)
        report(filled, result, answer.quiet)
        if result.write and file is not None:
            save(filled, file, before)
        form = "json" if result.as_json else "diff" if result.diff else "text"
        if not result.write or form != "text":
            print_filled(filled, loaded, before, file, form)
        asked = shown_gaps(parts)
        keep_filled("fill", f"{prompt}\n\n{asked}" if prompt else asked, filled, loaded, system, images)  # fmt: skip


def _parts(
    file: Path | None, mark: str, at: str | None, size: int | None, hint: str, prefix_file: Path | None,
    suffix_file: Path | None,
) -> tuple[str, Sequence[Part]]:
    """Return the text as it is now, and its parts without a byte order mark: strings and gaps."""
    from dgemma_mlx.infill.template import Gap, parse_gaps

    if prefix_file is not None or suffix_file is not None:
        texts = ("" if path is None else read_text(path) for path in (prefix_file, suffix_file))
        (bom, prefix), (_, suffix) = map(without_bom, texts)
        return bom + prefix + suffix, [prefix, Gap(size, hint), suffix]
    bom, text = without_bom(read_text(file))
    if at is None:
        return bom + text, parse_gaps(text, mark)
    place = _place(text, at, "text" if is_stdin(file) else "file")
    return bom + text, [text[:place], Gap(size, hint), text[place:]]


def _place(text: str, at: str, noun: str) -> int:
    """Return the index of the character at ``LINE:COL``, both counted from 1.

    After a line feed at the end of the text, a gap may stand in a line of its own. Raises `DgemmaError` (exit code 2),
    in which ``noun`` stands for the text, when there is no such place.
    """
    from dgemma_mlx.infill.template import lines_of

    line, _, column = at.partition(":")
    lines = lines_of(text) or [""]
    count = len(lines)
    if lines[-1].endswith("\n"):
        lines.append("")
    if not (line.isdecimal() and column.isdecimal() and max(len(line), len(column)) < 10):
        raise DgemmaError(f"--at must be LINE:COL, not {shown(at)}", "Both count from 1, as in --at 12:5.", exit_code=2)
    row, hint = int(line), "Lines and columns count from 1, as in --at 12:5."
    if not 1 <= row <= len(lines):
        raise DgemmaError(f"there is no line {row}: the {noun} has {counted(count, 'line')}", hint, exit_code=2)
    content = lines[row - 1].rstrip("\r\n")
    if not 1 <= int(column) <= len(content) + 1:
        message = f"there is no column {column}: line {row} has {counted(len(content), 'character')}"
        raise DgemmaError(message, hint, exit_code=2)
    return sum(map(len, lines[: row - 1])) + int(column) - 1


def _check(file: Path | None, at: str | None, size: int | None, hint: str, split: bool) -> None:
    """Raise `DgemmaError` (exit code 2) for options that exclude or need each other."""
    if split and (file is not None or at is not None):
        raise DgemmaError(
            "--prefix-file and --suffix-file cannot be combined with FILE or --at", "Name the text once.", exit_code=2
        )
    if (size is not None or hint) and not split and at is None:
        raise DgemmaError(
            "--size and --hint need --at or --prefix-file",
            "In a text with marks, write ___:20___ or {{fill: a hint}}.", exit_code=2,
        )  # fmt: skip
