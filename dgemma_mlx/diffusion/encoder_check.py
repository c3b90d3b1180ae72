"""The encoder's check of an open canvas: what the causal encoder finds plausible is settled, the rest is denoised on.

The network's encoder is causal. One pass over a canvas says, at each position, which token it would have written after
everything before that position. A canvas whose whole text is plausible to it is settled. Otherwise the plausible
prefix, with the encoder's own token after it, is pinned, and the decoder goes on with the rest: the same weights draft
in parallel and verify from left to right (S2D2, arXiv 2603.25702). The first token of a canvas is the decoder's alone:
what the encoder would have written there was computed before the canvas, and is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.diffusion.edits import Pins
from dgemma_mlx.diffusion.speed import CheckRule
from dgemma_mlx.diffusion.stopping import text_ids
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma

# Entropy, in nats, above which a position counts as uncertain.
_UNCERTAIN = 0.2

# Share of a row's tokens that the encoder must have expected itself, or its judgement is not used: a network whose
# encoder was not trained to write expects none, and may find everything plausible.
_AGREEMENT = 0.2

# A check reads whole quarters of a canvas: of the published model's 256 positions, 64, below which MLX leaves its fast
# kernel for experts.
_PARTS = 4


class Verdict(NamedTuple):
    """What a check says of the rows of a step.

    Attributes:
        settled: The rows that the check has settled, (B,) bool.
        pins: The positions that are fixed from now on.
    """

    settled: mx.array
    pins: Pins


@dataclass
class _Row:
    """What is known of one row.

    Attributes:
        agreed: The pinned prefix of the canvas.
        checked: The text of the last check.
        judged: Number of tokens that the encoder has judged, over all checks.
        expected: Number of those that it expected.
        passes: Numbers of positions of the encoder passes that the row has asked for, as if it were alone.
        is_kept: Whether the last of them would have been kept in the cache, if the row were alone.
    """

    agreed: Sequence[int] = ()
    checked: Sequence[int] | None = None
    judged: int = 0
    expected: int = 0
    passes: list[int] = field(default_factory=list)
    is_kept: bool = False

    def is_worth_it(self, text: Sequence[int], entropy: Sequence[float], max_uncertain: int) -> bool:
        """Return whether a check of this text, with its entropies, can be expected to save steps."""
        few = sum(value > _UNCERTAIN for value in entropy[len(self.agreed) : len(text)]) <= max_uncertain
        has_begun = bool(self.agreed) or entropy[0] <= _UNCERTAIN
        is_believed = self.expected >= _AGREEMENT * self.judged
        has_more = len(text) > max(1, len(self.agreed))  # than the encoder has no say on
        return few and has_begun and is_believed and has_more and text != self.checked

    def judge(self, text: Sequence[int], expected: Sequence[int], plausible: Sequence[bool]) -> bool:
        """Take in the encoder's judgement of the text after its first token, and return whether it is settled."""
        self.checked = text
        free = range(max(1, len(self.agreed)), len(text))
        self.judged += len(free)
        self.expected += sum(text[place] == expected[place - 1] for place in free)
        if self.expected < _AGREEMENT * self.judged:
            return False
        place = next((place for place in free if not plausible[place - 1]), None)
        if place is not None:
            self.agreed = [*text[:place], expected[place - 1]]
        return place is None


class EncoderCheck:
    """The check of one canvas in every row of a batch. Call it after each step that leaves a row open.

    A row is checked when its first token is certain enough, no more than ``CheckRule.max_uncertain`` positions of its
    text are uncertain, and the text is not that of its last check. A token is plausible if its probability is at least
    ``CheckRule.ratio`` times that of the token that the encoder expects. The encoder must earn its say: while it has
    expected less than a fifth of the tokens that it has judged, a row is neither settled nor pinned, and when a check
    ends so, it is the row's last.

    Attributes:
        is_encoded: Whether the cache holds the settled canvases of all rows. Otherwise it is as it was before them.
    """

    def __init__(
        self, network: DiffusionGemma, cache: PrefixCache, rows: int, eos_ids: Sequence[int], rule: CheckRule
    ) -> None:
        """``cache`` holds the prefix of the canvases of so many rows."""
        self._network, self._cache = network, cache
        self._eos_ids, self._rule = eos_ids, rule
        self._rows = [_Row() for _ in range(rows)]
        self.is_encoded = False

    @property
    def passes(self) -> list[list[int]]:
        """The numbers of positions of the encoder passes that each row has asked for."""
        return [row.passes for row in self._rows]

    @property
    def kept(self) -> list[bool]:
        """Whether each row's canvas would be in the cache, if the row were alone."""
        return [row.is_kept for row in self._rows]

    def worth(
        self, argmax: mx.array, entropy: mx.array, finished: Sequence[bool]
    ) -> dict[int, Sequence[int]]:
        """Return the texts that are worth a check, by row.

        ``argmax`` and ``entropy`` (B, C) are those of a step, evaluated. ``finished`` says which rows are settled.
        """
        canvases: Any = argmax.tolist()
        entropies: Any = entropy.tolist()
        texts = [text_ids(canvas, self._eos_ids) for canvas in canvases]
        rows = zip(self._rows, texts, entropies, finished, strict=True)
        return {
            index: text for index, (row, text, uncertainty, is_finished) in enumerate(rows)
            if not is_finished and row.is_worth_it(text, uncertainty, self._rule.max_uncertain)
        }  # fmt: skip

    def __call__(
        self, argmax: mx.array, texts: Mapping[int, Sequence[int]], finished: Sequence[bool]
    ) -> Verdict:
        """Check these texts of the argmax canvases (B, C), by row. ``finished`` says which rows are settled already.

        The encoder reads no further than the longest text, in quarters of the canvas.
        """
        count, whole_length = argmax.shape
        quarter = max(1, whole_length // _PARTS)
        lengths = {index: min(whole_length, -(-len(text) // quarter) * quarter) for index, text in texts.items()}
        length = max(lengths.values())
        snapshot = self._cache.snapshot()
        expected, plausible = self._judgement(argmax[:, :length])
        whole, ended = [False] * count, [False] * count
        for index, text in texts.items():
            row = self._rows[index]
            whole[index] = row.judge(text, expected[index], plausible[index])
            row.passes.append(lengths[index])
            row.is_kept = whole[index] and lengths[index] == whole_length
            ended[index] = bool(row.agreed) and row.agreed[-1] in self._eos_ids
        all_settled = all(done or is_whole for done, is_whole in zip(finished, whole, strict=True))
        self.is_encoded = all_settled and length == whole_length
        if not self.is_encoded:
            self._cache.restore(snapshot)
        settled = [is_whole or is_ended for is_whole, is_ended in zip(whole, ended, strict=True)]
        return Verdict(mx.array(settled), self._pins(whole_length))

    def _judgement(self, ids: mx.array) -> tuple[Any, Any]:
        """Encode ids (B, L) into the cache, and judge all positions but the first.

        Return the tokens that the encoder expects, and which of the ids are plausible to it, as lists (B, L - 1).
        """
        raw = self._network.project(self._network.encode(ids, self._cache)[:, :-1])
        expected = mx.argmax(raw, axis=-1)
        both = mx.take_along_axis(raw, mx.stack([ids[:, 1:], expected.astype(ids.dtype)], axis=-1), axis=-1)
        token, most = mx.split(self._network.capped(both), 2, axis=-1)
        plausible = token >= most + math.log(self._rule.ratio)
        return expected.tolist(), plausible[..., 0].tolist()

    def _pins(self, length: int) -> Pins:
        """Return the agreed prefixes of all rows as pins of canvases of ``length`` positions."""
        ids = [[*row.agreed, *[0] * (length - len(row.agreed))] for row in self._rows]
        free = [[place >= len(row.agreed) for place in range(length)] for row in self._rows]
        return Pins(mx.array(ids, mx.int32), mx.array(free))
