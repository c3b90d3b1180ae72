"""Drafts as JSON: what a stream says in its field ``dgemma`` when a client asks for drafts."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import repeat
from typing import Any, NamedTuple

from dgemma_mlx.events import Draft
from dgemma_mlx.generation.model import ModelText
from dgemma_mlx.server.question import Ended, Written

TEXT, THINKING, CONTROL, AFTER_END, PINNED = "thcep"


class Cell(NamedTuple):
    """One position of a canvas, as it is sent.

    Attributes:
        token: The text of the token; empty for a control token, and for all but the last byte of a character.
        entropy: Its entropy in nats, rounded, so that what has hardly changed is not sent.
        accepted: Whether the step has accepted it.
        kind: ``TEXT``, ``THINKING``, ``CONTROL``, ``AFTER_END`` for what is dropped with the end of the text, or
            ``PINNED`` for a given text.
    """

    token: str
    entropy: float
    accepted: bool
    kind: str


class Drafts:
    """The drafts of one answer, as JSON: the first one of each attempt at a canvas whole, of the others the changes.

    Changes are relative to the draft that was sent before. A draft that is left out for a slow reader is therefore
    never missing, and nothing has to be sent again.
    """

    def __init__(self, text: ModelText) -> None:
        self._tokenizer, self._end_ids = text.tokenizer, frozenset(text.generation.eos_token_ids)
        self._open = self._tokenizer.special_ids.get("<|channel>")
        self._close = self._tokenizer.special_ids.get("<channel|>")
        self._thinks = False  # whether the committed canvases end within thinking
        self._sent: tuple[int, int] | None = None  # canvas and attempt of the draft that was sent last
        self._cells: list[Cell] = []

    def draft(self, draft: Draft, free: Sequence[bool] | None = None) -> dict[str, Any]:
        """Return a draft. Without ``at`` it lists all C positions, otherwise those at the indices ``at``.

        ``free`` says which positions (C) are not pinned; None stands for all.
        """
        cells = list(self._read(draft, free or [True] * len(draft.tokens)))
        place = (draft.canvas, draft.attempt)
        found: dict[str, Any] = {
            "canvas": draft.canvas, "attempt": draft.attempt, "step": draft.step, "max_steps": draft.max_steps,
            "finished": draft.finished, "settled_by": draft.settled_by,
        }  # fmt: skip
        listed = cells
        if place == self._sent:
            found["at"] = [at for at, pair in enumerate(zip(cells, self._cells, strict=True)) if pair[0] != pair[1]]
            listed = [cells[at] for at in found["at"]]
        self._sent, self._cells = place, cells
        return {
            **found,
            "tokens": [cell.token for cell in listed],
            "entropy": [cell.entropy for cell in listed],
            "accepted": [cell.accepted for cell in listed],
            "kinds": "".join(cell.kind for cell in listed),
        }

    def wrote(self, written: Written) -> None:
        """Take note of a committed canvas, so that the next one is known to begin within thinking or not."""
        self._thinks = bool(written.thinking) and not written.text

    def ended(self, ended: Ended) -> dict[str, Any]:
        """Return what there is to tell at the end of an answer: the seed that repeats it, counts and times."""
        return {"seed": ended.done.seed, "statistics": asdict(ended.done.statistics)}

    def _read(self, draft: Draft, free: Sequence[bool]) -> Iterator[Cell]:
        """Yield the cells of a draft."""
        kinds = [
            kind if is_free or kind == AFTER_END else PINNED
            for kind, is_free in zip(self._kinds(draft.tokens), free, strict=True)
        ]
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        for token, entropy, accepted, kind in zip(
            draft.tokens, draft.entropy, draft.accepted_mask, kinds, strict=True
        ):
            yield Cell(decode(self._tokenizer.token_bytes(token)), round(entropy, 2), accepted, kind)

    def _kinds(self, tokens: Sequence[int]) -> Iterator[str]:
        """Yield the kind of each token."""
        kind = THINKING if self._thinks else TEXT
        for at, token in enumerate(tokens):
            if token in self._end_ids:
                yield CONTROL
                yield from repeat(AFTER_END, len(tokens) - at - 1)
                return
            if token == self._open:
                kind = THINKING
            elif token == self._close:
                kind = TEXT
            yield CONTROL if self._tokenizer.is_control(token) else kind
