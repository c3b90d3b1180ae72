"""Editing a text: the canvas starts as the text, partly noised, and what must not change is pinned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import check_count, check_text, is_whole, shown
from dgemma_mlx.diffusion.edits import Edits
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import PromptIds
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.infill.fill import Filled, Prepared, doubt_about, end_id, lay_out, noised_start, write_gaps
from dgemma_mlx.infill.layout import bias_against, characters, not_text
from dgemma_mlx.infill.match import matches
from dgemma_mlx.infill.search import Candidate, around
from dgemma_mlx.infill.template import Gap, Part, lines_of
from dgemma_mlx.infill.writer import Progress, Writer
from dgemma_mlx.kernels import LogitBias
from dgemma_mlx.sizes import counted
from dgemma_mlx.text.exact import encode_exactly
from dgemma_mlx.text.images import Image

DEFAULT_STRENGTH = 0.6
DEFAULT_CANDIDATES = 5
Lines = tuple[int, int]  # first and last line, from 1


def edit(
    model: Model, instruction: str, text: str, *, lines: Lines | None = None, match: str | None = None,
    strength: float | None = None, candidates: int = DEFAULT_CANDIDATES, system: str | None = None,
    seed: int | None = None, speed: str = DEFAULT_SPEED, temp: float | None = None,
    generation: GenerationConfig | None = None, prefill_step_size: int | None = None,
    memory_limit: int | None = None, cancelled: Callable[[], bool] | None = None, progress: Progress | None = None,
    images: Sequence[Image] | None = None,
) -> Filled:
    """Change a text as the instruction says: all of it, or a part.

    The canvas starts as the text with a share of random tokens, and takes the same share of the denoising steps. What
    is outside the part to change is pinned, byte for byte. For each part, several lengths near its own are tried. The
    arguments that are not listed are those of ``fill``.

    Args:
        model: What ``load`` returned.
        instruction: What to change.
        text: The text.
        lines: First and last line of the part to change, from 1.
        match: A regular expression for the parts to change, within ``lines`` where both are given.
        strength: Share of the text that starts as noise, above 0 and at most 1. None is 0.6 for the whole text, and 1
            for a part.
        candidates: Number of lengths to try for each part. It has no effect on a whole text.

    Raises:
        DgemmaError: When there is nothing to change, one canvas does not hold it, the model's tokenizer cannot keep
            the text, or an image cannot be read.
        KeyboardInterrupt: After ``cancelled`` has returned True.
    """
    prepared = prepare_edit(
        model, instruction, text, lines=lines, match=match, strength=strength, candidates=candidates, system=system,
        images=images,
    )  # fmt: skip
    options = GenerationOptions(
        speed=speed, temp=temp, generation=generation, prefill_step_size=prefill_step_size, memory_limit=memory_limit,
        cancelled=cancelled,
    )
    return write_edit(model, prepared, seed, options, progress)


class PreparedText(NamedTuple):
    """A whole text to edit, checked and encoded.

    Attributes:
        ids: Ids (P) of the prompt.
        text: The text.
        canvas: Ids of the text and the end-of-text id.
        strength: Share of the text that starts as noise.
    """

    ids: PromptIds
    text: str
    canvas: list[int]
    strength: float


def prepare_edit(
    model: ModelText, instruction: str, text: str, *, lines: Lines | None = None, match: str | None = None,
    strength: float | None = None, candidates: int = DEFAULT_CANDIDATES, system: str | None = None,
    images: Sequence[Image] | None = None,
) -> Prepared | PreparedText:
    """Check and encode a text and an instruction. The arguments are those of ``edit``, whose errors are raised here."""
    check_text("the instruction", instruction)
    check_text("the text", text)
    if not text.strip():
        raise DgemmaError("the text is empty", "There is nothing to edit.", exit_code=2)
    if not instruction.strip():
        raise DgemmaError("the instruction is empty", "Say what to change.", exit_code=2)
    if strength is not None and not (isinstance(strength, (int, float)) and 0 < strength <= 1):
        message = f"strength must be a number above 0 and at most 1, not {shown(strength)}"
        raise DgemmaError(message, "Below 1, the result stays closer to the text.", exit_code=2)
    check_count("candidates", candidates)
    opening = model.encode_prompt(f"{instruction.strip()}\n\n{text}", system=system, images=images)
    if lines is None and match is None:
        canvas = _canvas_ids(model, text)
        model.check_prompt(opening)
        return PreparedText(opening, text, canvas, strength or DEFAULT_STRENGTH)
    layout = lay_out(model, selected(text, lines, match))
    ladders = [around(len(slot.original), layout.room, candidates) for slot in layout.slots]
    ids = opening.followed_by(layout.prefix)
    model.check_prompt(ids)
    return Prepared(ids, layout, ladders, candidates, strength or 1.0)


def write_edit(
    model: Model, prepared: Prepared | PreparedText, seed: int | None, options: GenerationOptions,
    progress: Progress | None = None,
) -> Filled:
    """Write what ``prepare_edit`` has prepared."""
    if isinstance(prepared, Prepared):
        return write_gaps(model, prepared, seed, options, progress)
    return _edit_all(model, prepared, seed, options, progress)


def selected(text: str, lines: Lines | None, match: str | None) -> list[Part]:
    """Return the text's parts, in which the parts to change are gaps with their ``original`` text.

    Raises ``DgemmaError`` (exit code 2) when nothing is selected.
    """
    begin, end = (0, len(text)) if lines is None else _line_span(text, lines)
    spans = [(begin, end)] if match is None else matches(match, text, begin, end)
    parts: list[Part] = []
    done = 0
    for start, stop in spans:
        parts += [text[done:start], Gap(original=text[start:stop])]
        done = stop
    if not any(isinstance(part, Gap) and part.original for part in parts):
        what = "the lines are empty" if match is None else f"nothing matches {shown(match)}"
        raise DgemmaError(f"there is nothing to change: {what}", "Choose other lines or another --match.", exit_code=2)
    return [*parts, text[done:]]


def _line_span(text: str, lines: Lines) -> tuple[int, int]:
    """Return where the lines begin and end, in characters, without the last line's line break."""
    if not (isinstance(lines, Sequence) and len(lines) == 2 and all(map(is_whole, lines))):
        raise DgemmaError(f"lines must be two line numbers, not {shown(lines)}", "They are the first and the last.", 2)
    rows = lines_of(text)
    first, last = lines
    if not 1 <= first <= last <= len(rows):
        message = f"there are no lines {shown(first)} to {shown(last)}: the text has {counted(len(rows), 'line')}"
        raise DgemmaError(message, "Lines count from 1.", exit_code=2)
    begin = sum(map(len, rows[: first - 1]))
    return begin, begin + len("".join(rows[first - 1 : last]).rstrip("\r\n"))


def _canvas_ids(model: ModelText, text: str) -> list[int]:
    """Return the ids of the text and the end-of-text id.

    Raises ``DgemmaError`` when a canvas does not hold them, or the tokenizer cannot keep the text.
    """
    ids = [*encode_exactly(model.tokenizer, text.rstrip()), end_id(model)]
    if len(ids) > model.config.canvas_length:
        raise DgemmaError(
            f"the text has {len(ids) - 1:,} tokens, but a canvas holds only {model.config.canvas_length - 1}",
            "Edit a part of it: --lines A-B or --match REGEX.", exit_code=2,
        )
    return ids


@wired_memory()
def _edit_all(
    model: Model, prepared: PreparedText, seed: int | None, options: GenerationOptions, progress: Progress | None
) -> Filled:
    """Edit the text as one canvas in which nothing is pinned, so that it may become shorter or longer."""
    text, ids = prepared.text, prepared.canvas
    writer = Writer(model, prepared.ids, 1, seed, options, progress)
    length, pad = model.config.canvas_length, model.generation.pad_token_id
    ends = {pad, *model.generation.eos_token_ids}
    barred = [id for id in not_text(model.tokenizer, writer.vocab_size) if id not in ends]
    canvas = mx.array([ids + [pad] * (length - len(ids))], mx.int32)
    bias = LogitBias(bias_against([barred], writer.vocab_size), mx.zeros_like(canvas))
    edits = Edits(barred=bias, start=noised_start(writer, canvas, prepared.strength))
    [draft] = writer.write(length, 1, edits)
    size = next((place for place, id in enumerate(draft.tokens) if id in ends), length)
    [score] = writer.scores([draft.tokens], [min(size + 1, length)])
    changed, cut = characters(model.tokenizer, draft.tokens[:size], text)
    candidate = Candidate((size,), (changed,), score, draft.settled_by is None or size == length, draft.tokens, cut)
    whole = changed.rstrip() + text[len(text.rstrip()) :]
    return Filled(whole, (candidate,), (whole,), writer.seed, writer.statistics(), doubt_about(candidate, [text]))
