"""Editing a text: the canvas begins as the text, partly noised, and what is not to change is pinned."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx

from dgemma_mlx.diffusion.denoiser import Barred
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.infill.fill import Filled, check_candidates, end_id, lay_out, noised, write_gaps
from dgemma_mlx.infill.layout import barring, not_text
from dgemma_mlx.infill.search import Candidate, around
from dgemma_mlx.infill.template import Gap, Part, lines_of
from dgemma_mlx.infill.writer import Writer

DEFAULT_STRENGTH = 0.6
DEFAULT_CANDIDATES = 5
Lines = tuple[int, int]
"""First and last line, from 1."""


def edit(
    model: Model,
    instruction: str,
    text: str,
    *,
    lines: Lines | None = None,
    match: str | None = None,
    strength: float | None = None,
    candidates: int = DEFAULT_CANDIDATES,
    system: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> Filled:
    """Changes a text as the instruction says: all of it, or only some ``lines``, or what the regex ``match`` finds.

    The canvas begins as the text with a share of random tokens, ``strength`` (above 0, to 1), and takes as large a
    share of the denoising steps; by default 0.6, or 1 of the part that is to change. The rest is pinned, byte for byte.
    Of a part that is to change, ``candidates`` lengths near its own are tried. Takes what ``fill`` takes, too.

    ``DgemmaError`` where there is nothing to change, or a canvas does not hold it.
    """
    if not text.strip():
        raise DgemmaError("the text is empty", "There is nothing to edit.", exit_code=2)
    if not instruction.strip():
        raise DgemmaError("the instruction is empty", "Say what is to change.", exit_code=2)
    if strength is not None and not 0 < strength <= 1:
        raise DgemmaError(f"strength must be above 0 and at most 1, not {strength}", exit_code=2)
    check_candidates(candidates)
    asked = f"{instruction.strip()}\n\n{text}"
    if lines is None and match is None:
        return _edit_all(model, text, asked, system, seed, strength or DEFAULT_STRENGTH, options)
    parts = selected(text, lines, match)
    layout = lay_out(model, parts)
    ladders = [around(len(slot.original), layout.room, candidates) for slot in layout.slots]
    opening = model.encode_prompt(asked, system=system)
    writer = Writer(model, [*opening, *layout.prefix], candidates, seed, options)
    return write_gaps(writer, layout, ladders, candidates, strength or 1.0)


def selected(text: str, lines: Lines | None, match: str | None) -> list[Part]:
    """The parts of the text: those to change as gaps with their ``original``. ``match`` looks within the ``lines``."""
    begin, end = (0, len(text)) if lines is None else _line_span(text, lines)
    if match is None:
        spans = [(begin, end)]
    else:
        try:
            pattern = re.compile(match)
        except re.error as error:
            raise DgemmaError(f"no regular expression: {match!r}: {error}", exit_code=2) from None
        spans = [found.span() for found in pattern.finditer(text, begin, end) if found[0]]
    parts: list[Part] = []
    done = 0
    for start, stop in spans:
        parts += [text[done:start], Gap(original=text[start:stop])]
        done = stop
    if not any(isinstance(part, Gap) and part.original for part in parts):
        raise DgemmaError("there is nothing to change there", "The lines are empty, or nothing matches.", exit_code=2)
    return [*parts, text[done:]]


def _line_span(text: str, lines: Lines) -> Lines:
    """Characters of the lines, without the last one's line break."""
    rows = lines_of(text)
    first, last = lines
    if not 1 <= first <= last <= len(rows):
        raise DgemmaError(f"there are no lines {first} to {last}", f"The text has {len(rows)}.", exit_code=2)
    begin = sum(map(len, rows[: first - 1]))
    return begin, begin + len("".join(rows[first - 1 : last]).rstrip("\r\n"))


def _edit_all(
    model: Model, text: str, asked: str, system: str | None, seed: int | None, strength: float, options: dict[str, Any]
) -> Filled:
    """The text as a whole canvas, in which nothing is pinned: it may become shorter or longer."""
    stem, length, end, pad = text.rstrip(), model.config.canvas_length, end_id(model), model.generation.pad_token_id
    ids = [*model.tokenizer.encode(stem), end]
    if len(ids) > length:
        raise DgemmaError(
            f"the text has {len(ids) - 1:,} tokens, a canvas holds {length - 1}",
            "Edit a part of it: --lines A-B or --match REGEX.", exit_code=2,
        )
    writer = Writer(model, model.encode_prompt(asked, system=system), 1, seed, options)
    kept = {pad, *model.generation.eos_token_ids}
    banned = [id for id in not_text(model.tokenizer, writer.vocab_size) if id not in kept]
    barred = Barred(barring(banned, writer.vocab_size))
    canvas = mx.array([ids + [pad] * (length - len(ids))], mx.int32)
    [draft] = writer.write(length, 1, None, barred, noised(writer, canvas, strength))
    size = next((place for place, id in enumerate(draft.tokens) if id in kept), length)
    [score] = writer.scores([draft.tokens], [min(size + 1, length)])
    changed = model.tokenizer.decode(draft.tokens[:size])
    candidate = Candidate((size,), (changed,), score, draft.settled_by is None or size == length, draft.tokens)
    whole = changed.rstrip() + text[len(stem) :]
    return Filled(whole, (candidate,), (whole,), writer.seed, writer.statistics())
