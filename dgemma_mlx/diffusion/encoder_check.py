"""The encoder's check of an open canvas: a text that the causal encoder finds plausible is settled.

The network's encoder is causal. One pass over a canvas says, at each position, which token it would have written after
everything before that position. So the same weights draft in parallel and verify from left to right (S2D2, arXiv
2603.25702). What the encoder does not find plausible is left to the decoder, and the encoder is not asked again: where
it is the worse judge, its own tokens would make right texts wrong. The first token of a canvas is the decoder's alone:
what the encoder would have written there was computed before the canvas, and is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from dgemma_mlx.diffusion.speed import CheckRule
from dgemma_mlx.diffusion.stopping import text_ids
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma

# Entropy, in nats, above which a position counts as uncertain.
_UNCERTAIN = 0.2

# Share of a text's tokens that the encoder must have expected itself: a network whose encoder was not trained to write
# expects none, and may find everything plausible.
_AGREEMENT = 0.2

# A check reads whole quarters of a canvas: of the published model's 256 positions, 64, below which MLX leaves its fast
# kernel for experts.
_PARTS = 4


class EncoderCheck:
    """The check of one canvas in every row of a batch. Call it after each step that leaves a row open.

    A row is checked once, when its first token is certain enough and no more than ``CheckRule.max_uncertain`` positions
    of its text are uncertain. A token is plausible if its probability is at least ``CheckRule.ratio`` times that of the
    token that the encoder expects. A text is settled if all its tokens but the first are plausible, and the encoder has
    expected at least a fifth of them.

    Attributes:
        passes: The number of positions of the encoder pass that each row has asked for, as if it were alone, or 0.
        kept: Whether each row's canvas would be in the cache, if the row were alone.
        is_encoded: Whether the cache holds the settled canvases of all rows. Otherwise it is as it was before them.
    """

    def __init__(
        self, network: DiffusionGemma, cache: PrefixCache, rows: int, eos_ids: Sequence[int], rule: CheckRule
    ) -> None:
        """``cache`` holds the prefix of the canvases of so many rows."""
        self._network, self._cache = network, cache
        self._eos_ids, self._rule = eos_ids, rule
        self.passes, self.kept = [0] * rows, [False] * rows
        self.is_encoded = False

    def worth(
        self, argmax: mx.array, entropy: mx.array, finished: Sequence[bool]
    ) -> dict[int, Sequence[int]]:
        """Return the texts that are worth a check, by row.

        ``argmax`` and ``entropy`` (B, C) are those of a step, evaluated. ``finished`` says which rows are settled.
        """
        if all(done or asked for done, asked in zip(finished, self.passes, strict=True)):
            return {}
        canvases: Any = argmax.tolist()
        entropies: Any = entropy.tolist()
        texts = [text_ids(canvas, self._eos_ids) for canvas in canvases]
        rows = zip(texts, entropies, finished, self.passes, strict=True)
        return {
            index: text for index, (text, uncertainty, is_finished, asked) in enumerate(rows)
            if not is_finished and not asked and self._is_nearly_settled(text, uncertainty)
        }  # fmt: skip

    def _is_nearly_settled(self, text: Sequence[int], entropy: Sequence[float]) -> bool:
        """Return whether a check of this text, with its entropies, can be expected to save steps."""
        few = sum(value > _UNCERTAIN for value in entropy[: len(text)]) <= self._rule.max_uncertain
        return few and entropy[0] <= _UNCERTAIN and len(text) > 1

    def __call__(self, argmax: mx.array, texts: Mapping[int, Sequence[int]], finished: Sequence[bool]) -> mx.array:
        """Check these texts of the argmax canvases (B, C), by row, and return the rows that are settled, (B,) bool.

        ``finished`` says which rows are settled already. The encoder reads no further than the longest text, in
        quarters of the canvas.
        """
        count, whole_length = argmax.shape
        quarter = max(1, whole_length // _PARTS)
        for index, text in texts.items():
            self.passes[index] = min(whole_length, -(-len(text) // quarter) * quarter)
        length = max(self.passes[index] for index in texts)
        snapshot = self._cache.snapshot()
        expected, plausible = self._judgement(argmax[:, :length])
        settled = [False] * count
        for index, text in texts.items():
            read = slice(0, len(text) - 1)  # what the encoder says of all tokens but the first
            agreed = sum(a == b for a, b in zip(text[1:], expected[index][read], strict=True))
            settled[index] = all(plausible[index][read]) and agreed >= _AGREEMENT * (len(text) - 1)
            self.kept[index] = settled[index] and self.passes[index] == whole_length
        all_settled = all(done or is_settled for done, is_settled in zip(finished, settled, strict=True))
        self.is_encoded = all_settled and length == whole_length
        if not self.is_encoded:
            self._cache.restore(snapshot)
        return mx.array(settled)

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
