"""Filling the gaps of a text: all that stands around them is pinned, and the model writes between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from dgemma_mlx.diffusion.denoiser import Start
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.infill.layout import Layout, Lengths
from dgemma_mlx.infill.search import Candidate, ladder, search
from dgemma_mlx.infill.template import MARK, Gap, Part, parse_gaps, shown
from dgemma_mlx.infill.writer import InfillStatistics, Writer

DEFAULT_CANDIDATES = 8
_PROMPT = (
    f"Fill in the gaps of the following text, each written {MARK}; in brackets behind some stands what belongs there. "
    "Answer with the whole text and nothing else.\n\n"
)


@dataclass(frozen=True)
class Filled:
    """A text whose gaps were filled. Made by ``fill`` and ``edit``."""

    text: str
    """all of it, with the best candidate's texts; what was around the gaps is as it was, byte for byte"""
    candidates: tuple[Candidate, ...]
    """all that were tried, the best first"""
    texts: tuple[str, ...]
    """the whole text with each candidate"""
    seed: int
    statistics: InfillStatistics


def fill(
    model: Model,
    text: str | Sequence[Part],
    *,
    mark: str = MARK,
    prompt: str | None = None,
    system: str | None = None,
    raw: bool = False,
    candidates: int = DEFAULT_CANDIDATES,
    seed: int | None = None,
    **options: Any,
) -> Filled:
    """Fills the gaps of a text: ``mark``, ``mark:20mark`` for 20 tokens, or ``{{fill: a hint for the model}}``.

    ``text`` may also be parts, ``Gap`` between strings. What is before the first gap is encoded as the beginning of
    the model's turn, what is between and behind them is pinned in one canvas. Where a gap's length is not given,
    ``candidates`` lengths are denoised at a time; the most probable text wins, of equal ones the shorter.
    ``prompt`` is what the model is asked instead of being shown the text with its gaps; ``raw`` asks nothing: the
    model sees only what is before and after. Takes the ``Options`` of ``generate`` but ``verify`` and ``trim_canvas``,
    and ``progress``, which hears after each step how many canvases and steps there have been.

    ``DgemmaError`` where there is no gap, or the canvas does not hold all of them; ``KeyboardInterrupt`` where
    ``cancelled`` says so.
    """
    parts = alternating(parse_gaps(text, mark) if isinstance(text, str) else text)
    if raw and (prompt is not None or system is not None):
        raise DgemmaError("raw text goes without a prompt and a system prompt", exit_code=2)
    check_candidates(candidates)
    layout = lay_out(model, parts)
    ladders = [
        [slot.gap.size] if slot.gap.size else ladder(layout.room - len(layout.slots) + 1, candidates)
        for slot in layout.slots
    ]
    asked = "" if raw else _PROMPT + shown(parts) if prompt is None else prompt
    opening = model.encode_prompt(asked, system=system, raw=raw)
    writer = Writer(model, [*opening, *layout.prefix], candidates, seed, options)
    return write_gaps(writer, layout, ladders, candidates)


def check_candidates(count: int) -> None:
    if count < 1:
        raise DgemmaError(f"candidates must be at least 1, not {count}", exit_code=2)


def alternating(parts: Sequence[Part]) -> list[Part]:
    """The same parts as text, gap, text, ..., text; ``DgemmaError`` where there is no gap."""
    result: list[Part] = [""]
    for part in parts:
        if isinstance(part, Gap):
            result += [part, ""]
        else:
            result[-1] = f"{result[-1]}{part}"
    if len(result) == 1:
        raise DgemmaError("there is no gap in the text", exit_code=2)
    return result


def lay_out(model: Model, parts: Sequence[Part]) -> Layout:
    end, pad = end_id(model), model.generation.pad_token_id
    return Layout(model.tokenizer, parts, model.config.canvas_length, end, pad)


def end_id(model: Model) -> int:
    """The id that ends an answer: of a turn, where the checkpoint has it, else of the text."""
    ends = model.generation.eos_token_ids
    turn = model.tokenizer.special_ids.get("<turn|>")
    return turn if turn is not None and turn in ends else ends[0]


def write_gaps(
    writer: Writer, layout: Layout, ladders: Sequence[Sequence[int]], count: int, strength: float | None = None
) -> Filled:
    """Writes the gaps at the lengths of the ladders and some more, ``count`` at a time. With a ``strength``, canvases
    begin as what stands in the gaps now, that share of it noise."""
    found = search(ladders, layout.room, count, partial(_evaluate, writer, layout, strength))
    texts = tuple(layout.whole(candidate.texts) for candidate in found)
    return Filled(texts[0], tuple(found), texts, writer.seed, writer.statistics())


def _evaluate(writer: Writer, layout: Layout, strength: float | None, wanted: list[Lengths]) -> list[Candidate]:
    """Denoises a canvas for each of the combinations of lengths, and scores what came of it."""
    length = layout.length(wanted)
    pins, barred = layout.pins(wanted, length), layout.barred(wanted, length, writer.vocab_size)
    start = None if strength is None else noised(writer, pins.ids, strength)
    drafts = writer.write(length, len(wanted), pins, barred, start)
    scores = writer.scores([draft.tokens for draft in drafts], [layout.used(lengths, length) for lengths in wanted])
    return [
        Candidate(lengths, layout.texts(draft.tokens, lengths), score, draft.settled_by is None, draft.tokens)
        for lengths, draft, score in zip(wanted, drafts, scores, strict=True)
    ]


def noised(writer: Writer, ids: mx.array, strength: float) -> Start:
    """The canvases (B, C) with a share of random ids, to be denoised by as large a share of the steps."""
    noise = writer.noise(ids.shape[0]).fork()
    replaced = noise.uniform(ids.shape[1]) < strength
    canvas = mx.where(replaced, noise.canvas(ids.shape[1], writer.vocab_size), ids)
    return Start(canvas, 1 + min(int((1 - strength) * writer.steps), writer.steps - 1))
