"""A text with gaps as a prefix and a canvas: what is pinned, what is free, and what must not be written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from dgemma_mlx.diffusion.denoiser import Barred, Pins
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.infill.template import Gap, Part
from dgemma_mlx.text.tokenizer import Tokenizer

Lengths = tuple[int, ...]
"""Tokens of each gap."""

_BLOCK = 64  # with fewer positions, experts that are chosen by few of them leave MLX's fast path


@dataclass(frozen=True)
class Slot:
    """A gap in tokens."""

    gap: Gap
    spaced: bool
    """the text before it ends with a space, which the gap's first token brings along, as tokens of words do"""
    original: tuple[int, ...]
    """ids of what stands there now, that space included"""


class Layout:
    """Where the parts of a text go: those before the first gap into the prefix, the others into the canvas.

    What is behind the last gap is cut where the canvas ends; where it does not have to be, an end-of-text id follows.
    """

    def __init__(
        self, tokenizer: Tokenizer, parts: Sequence[Part], canvas_length: int, end_id: int, pad_id: int
    ) -> None:
        """``parts`` are those of ``parse_gaps``. ``DgemmaError`` where the gaps and what is between do not fit."""
        self._tokenizer, self._parts, self._canvas_length, self._pad = tokenizer, parts, canvas_length, pad_id
        texts = [part for part in parts if isinstance(part, str)]
        gaps = [part for part in parts if isinstance(part, Gap)]
        spaced = [before.endswith(" ") and not before.endswith("  ") for before in texts[:-1]]
        pinned = [tokenizer.encode(text[:-1] if space else text) for text, space in zip(texts, spaced, strict=False)]
        self.prefix = pinned[0]
        """ids (P) of the text before the first gap"""
        self.slots = [
            Slot(gap, space, tuple(tokenizer.encode(" " * space + (gap.original or ""))) if gap.original else ())
            for gap, space in zip(gaps, spaced, strict=True)
        ]
        self._between = pinned[1:]
        self._last = [*tokenizer.encode(texts[-1].rstrip()), end_id]
        self._fixed = sum(map(len, self._between))
        self.room = canvas_length - self._fixed
        """tokens that all gaps together may have"""
        least = sum(slot.gap.size or len(slot.original) or 1 for slot in self.slots)
        if least > self.room:
            raise DgemmaError(
                f"the gaps and the text between them take {self._fixed + least:,} tokens, "
                f"a canvas holds {canvas_length}",
                f"Fewer gaps at a time: from the first to the last of them, {canvas_length} tokens fit.", exit_code=2,
            )

    def length(self, candidates: Sequence[Lengths]) -> int:
        """Of a canvas that holds the gaps at any of these lengths."""
        needed = self._fixed + max(map(sum, candidates)) + len(self._last)
        return block_length(needed, self._canvas_length)

    def used(self, lengths: Lengths, length: int) -> int:
        """Positions of such a canvas before the padding."""
        return min(self._fixed + sum(lengths) + len(self._last), length)

    def rows(self, candidates: Sequence[Lengths], length: int) -> list[tuple[list[int], list[bool]]]:
        """For each candidate the ids (length) of its canvas, a gap's original in it, and which of them are free."""
        return [self._row(lengths, length) for lengths in candidates]

    def _row(self, lengths: Lengths, length: int) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        free: list[bool] = []
        for slot, size, text in zip(self.slots, lengths, [*self._between, self._last], strict=True):
            original = [*slot.original[:size], *[self._pad] * (size - len(slot.original))]
            ids += original + text
            free += [True] * size + [False] * len(text)
        left = length - len(ids)
        return (ids + [self._pad] * left)[:length], (free + [False] * left)[:length]

    def pins(self, candidates: Sequence[Lengths], length: int) -> Pins:
        """Of a batch of canvases (B, length), one for each candidate."""
        ids, free = zip(*self.rows(candidates, length), strict=True)
        return Pins(mx.array(ids, mx.int32), mx.array(free))

    def barred(self, candidates: Sequence[Lengths], length: int, vocab_size: int) -> Barred:
        """No control tokens in a gap, and at the start of one that has to bring a space only tokens that do."""
        places = [
            row * length + start
            for row, lengths in enumerate(candidates)
            for slot, (start, _) in zip(self.slots, self.spans(lengths), strict=True)
            if slot.spaced
        ]
        everywhere = barring(not_text(self._tokenizer, vocab_size), vocab_size)
        if not places:
            return Barred(everywhere)
        unspaced = [id for id in self._unspaced if id < vocab_size]
        return Barred(everywhere, barring(unspaced, vocab_size), mx.array(places, mx.int32))

    @cached_property
    def _unspaced(self) -> list[int]:
        """The ids of tokens that do not begin with a space."""
        token_bytes = self._tokenizer.token_bytes
        return [id for id in range(self._tokenizer.vocab_size) if token_bytes(id)[:1] != b" "]

    def spans(self, lengths: Lengths) -> list[tuple[int, int]]:
        """Where each gap begins and ends in the canvas."""
        spans = []
        start = 0
        for size, text in zip(lengths, [*self._between, []], strict=True):
            spans.append((start, start + size))
            start += size + len(text)
        return spans

    def texts(self, tokens: Sequence[int], lengths: Lengths) -> tuple[str, ...]:
        """What a canvas has written into the gaps, without the spaces that belong to the text before."""
        written = [self._tokenizer.decode(tokens[start:end]) for start, end in self.spans(lengths)]
        return tuple(text[slot.spaced :] for slot, text in zip(self.slots, written, strict=True))

    def whole(self, texts: Sequence[str]) -> str:
        """The text with its gaps filled."""
        gaps = iter(texts)
        return "".join(part if isinstance(part, str) else next(gaps) for part in self._parts)


def block_length(needed: int, canvas_length: int) -> int:
    """Of a canvas for so many positions: whole blocks of 64, all of ``canvas_length`` at the most."""
    return min(canvas_length, -(-needed // _BLOCK) * _BLOCK)


def not_text(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The model's ids that are no text: control tokens, and those that the tokenizer does not have."""
    control = [id for id in tokenizer.special_ids.values() if id < vocab_size]
    return [*control, *range(tokenizer.vocab_size, vocab_size)]


def barring(ids: Sequence[int], vocab_size: int) -> mx.array:
    """(V,) float32: -inf for each of the ids, else 0."""
    values = np.zeros(vocab_size, np.float32)
    values[list(ids)] = -np.inf
    return mx.array(values)
