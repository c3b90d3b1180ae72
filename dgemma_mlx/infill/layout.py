"""Layout of a text with gaps: a prefix, and a canvas with pinned text, free gaps and barred ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from dgemma_mlx.diffusion.edits import Pins
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import block_length
from dgemma_mlx.infill.template import Gap, Part
from dgemma_mlx.kernels import LogitBias
from dgemma_mlx.text.exact import encode_exactly
from dgemma_mlx.text.tokenizer import Tokenizer

Lengths = tuple[int, ...]  # number of tokens of each gap


@dataclass(frozen=True)
class Slot:
    """A gap in tokens.

    Attributes:
        gap: The gap as it is written in the text.
        spaced: Whether the text before the gap ends with a single space. The gap's first token then carries that
            space, as the tokens of words do.
        original: Ids of the text that the gap replaces, with that space; empty where there is none.
    """

    gap: Gap
    spaced: bool
    original: tuple[int, ...]


class Layout:
    """Where the parts of a text go: those before the first gap into the prefix, the others into the canvas.

    Text after the last gap is cut where the canvas ends. Text that is not cut is followed by an end-of-text id.

    Attributes:
        prefix: Ids (P) of the text before the first gap.
        slots: The gaps, in order.
        room: Number of tokens that all gaps together may have.
    """

    def __init__(
        self, tokenizer: Tokenizer, parts: Sequence[Part], canvas_length: int, end_id: int, pad_id: int
    ) -> None:
        """``parts`` are those of ``parse_gaps``: text, gap, text, ..., text.

        Raises ``DgemmaError`` (exit code 2) when the gaps and the text between them do not fit into a canvas, and for
        text that the tokenizer cannot keep byte for byte.
        """
        self._tokenizer, self._parts, self._canvas_length, self._pad = tokenizer, parts, canvas_length, pad_id
        texts = [part for part in parts if isinstance(part, str)]
        gaps = [part for part in parts if isinstance(part, Gap)]
        spaced = [before.endswith(" ") and not before.endswith("  ") for before in texts[:-1]]
        bare = [text[:-1] if space else text for text, space in zip(texts, spaced, strict=False)]
        pinned = [encode_exactly(tokenizer, text) for text in bare]
        self.prefix = pinned[0]
        self.slots = [
            Slot(gap, space, tuple(encode_exactly(tokenizer, " " * space + gap.original)) if gap.original else ())
            for gap, space in zip(gaps, spaced, strict=True)
        ]
        self._between = pinned[1:]
        self._last = [*encode_exactly(tokenizer, texts[-1].rstrip()), end_id]
        self._fixed = sum(map(len, self._between))
        self.room = canvas_length - self._fixed
        least = sum(slot.gap.size or len(slot.original) or 1 for slot in self.slots)
        if least > self.room:
            raise DgemmaError(
                f"the gaps and the text between them take {self._fixed + least:,} tokens, "
                f"but a canvas holds only {canvas_length}",
                f"Fill fewer gaps at a time: from the first gap to the last, {canvas_length} tokens fit.", exit_code=2,
            )

    def length(self, candidates: Sequence[Lengths]) -> int:
        """Return the length of a canvas that holds the gaps at any of these lengths."""
        needed = self._fixed + max(map(sum, candidates)) + len(self._last)
        return block_length(needed, self._canvas_length)

    def used(self, lengths: Lengths, length: int) -> int:
        """Return how many positions of a canvas of this length come before the padding."""
        return min(self._fixed + sum(lengths) + len(self._last), length)

    def rows(self, candidates: Sequence[Lengths], length: int) -> list[tuple[list[int], list[bool]]]:
        """Return, for each candidate, the ids (length) of its canvas and which of its positions are free.

        A gap holds as much of its original text as fits, then padding.
        """
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
        """Return the pins of a batch of canvases (B, length), one for each candidate."""
        ids, free = zip(*self.rows(candidates, length), strict=True)
        return Pins(mx.array(ids, mx.int32), mx.array(free))

    def barred(self, candidates: Sequence[Lengths], length: int, vocab_size: int) -> LogitBias:
        """Return the bias on the logits of a batch of canvases (B, length) that bars ids from the gaps.

        Ids that no text encodes to (``not_text``) are barred everywhere. At the start of a gap that must carry a space,
        all tokens that do not begin with a space are barred as well.
        """
        barred = not_text(self._tokenizer, vocab_size)
        unspaced = [id for id in self._unspaced if id < vocab_size]
        rows = np.zeros((len(candidates), length), np.int32)
        for row, lengths in zip(rows, candidates, strict=True):
            for slot, (start, _) in zip(self.slots, self.spans(lengths), strict=True):
                row[start] |= slot.spaced
        return LogitBias(bias_against([barred, [*barred, *unspaced]], vocab_size), mx.array(rows))

    @cached_property
    def _unspaced(self) -> list[int]:
        """Ids of the tokens that do not begin with a space."""
        token_bytes = self._tokenizer.token_bytes
        return [id for id in range(self._tokenizer.vocab_size) if token_bytes(id)[:1] != b" "]

    def spans(self, lengths: Lengths) -> list[tuple[int, int]]:
        """Return where each gap begins and ends in the canvas."""
        spans = []
        start = 0
        for size, text in zip(lengths, [*self._between, []], strict=True):
            spans.append((start, start + size))
            start += size + len(text)
        return spans

    def texts(self, tokens: Sequence[int], lengths: Lengths) -> tuple[tuple[str, ...], bool]:
        """Return what a canvas holds in the gaps, and whether bytes were left out as by ``characters``.

        The texts lack the spaces that belong to the text before them.
        """
        written = [
            characters(self._tokenizer, tokens[start:end], slot.gap.original or "")
            for slot, (start, end) in zip(self.slots, self.spans(lengths), strict=True)
        ]
        texts = tuple(text[slot.spaced :] for slot, (text, _) in zip(self.slots, written, strict=True))
        return texts, any(is_cut for _, is_cut in written)

    def whole(self, texts: Sequence[str]) -> str:
        """Return the whole text with these texts in its gaps."""
        gaps = iter(texts)
        return "".join(part if isinstance(part, str) else next(gaps) for part in self._parts)


def characters(tokenizer: Tokenizer, tokens: Sequence[int], original: str) -> tuple[str, bool]:
    """Return the text of ids without bytes that are no whole character, and whether there were any.

    U+FFFD stands for such bytes. It is left out as well, unless the ``original`` text holds it.
    """
    data = b"".join(map(tokenizer.token_bytes, tokens))
    text = data.decode("utf-8", "ignore")
    if "\ufffd" not in original:
        text = text.replace("\ufffd", "")
    return text, text.encode() != data


def not_text(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the model's ids that no text encodes to, and those that the tokenizer does not have."""
    unwritable = [id for id in tokenizer.unwritable_ids if id < vocab_size]
    return [*unwritable, *range(tokenizer.vocab_size, vocab_size)]


def bias_against(barred: Sequence[Sequence[int]], vocab_size: int) -> mx.array:
    """Return biases on logits, (R, V) float32, for R lists of ids: -inf for each id of the list, 0 for the others."""
    values = np.zeros((len(barred), vocab_size), np.float32)
    for row, ids in zip(values, barred, strict=True):
        row[list(ids)] = -np.inf
    return mx.array(values)
