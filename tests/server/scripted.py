"""A model that writes what a test tells it: the demo, whose logits are replaced by a script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from dgemma_mlx import Model, load
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.model.text import DiffusionGemma

OPENINGS = ("<|turn>model\n", "<tool_response|>")  # after a result, the model's turn goes on


class ScriptedNetwork(DiffusionGemma):
    """The demo's network, with its real caches and steps. Only its predictions come from a script."""

    def extend(self, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None = None) -> None:
        """Remember what was encoded."""
        rows: Any = ids.tolist()
        cache.script = (*getattr(cache, "script", ())[: cache.offset], *rows[0])  # type: ignore[attr-defined]
        super().extend(ids, cache, soft)

    def decode_layers(self, x: mx.array, cache: PrefixCache, *more: Any, **options: Any) -> mx.array:
        """Remember which canvas ``project`` is asked for."""
        self._prefix = getattr(cache, "script", ())[: cache.offset]
        return super().decode_layers(x, cache, *more, **options)

    def project(self, hidden: mx.array) -> mx.array:
        """Return logits that are certain of the script's next tokens, and of padding after its end."""
        if hidden.ndim != 3:
            return super().project(hidden)
        ids = self._next(list(self._prefix), hidden.shape[1])
        return mx.eye(self.config.vocab_size)[mx.array(ids)][None] * 40.0


def _last_end(ids: list[int], part: list[int]) -> int:
    """Return where the last occurrence of a part ends; 0 when there is none."""
    starts = range(len(ids) - len(part), -1, -1)
    return next((start + len(part) for start in starts if ids[start : start + len(part)] == part), 0)


def scripted_model(answer: Callable[[str], str]) -> Model:
    """Return a model that answers a prompt with the text that ``answer`` returns for it.

    ``answer`` gets the whole prompt with its control tokens. Control tokens in its result, such as
    ``<|tool_call>call:add{a:2}<tool_call|>`` and ``<|channel>thought\\n...<channel|>``, are the model's own. The end of
    the turn is added.
    """
    model = load("demo")
    tokenizer, pad = model.tokenizer, model.generation.pad_token_id
    openings = [tokenizer.encode_control(opening) for opening in OPENINGS]

    def next_ids(prefix: list[int], length: int) -> list[int]:
        start = max(_last_end(prefix, opening) for opening in openings) or len(prefix)
        # What the template has begun for the model, such as an empty thought, belongs to the prompt.
        script = tokenizer.encode_control(answer(tokenizer.decode(prefix[:start], keep_special=True)) + "<turn|>")
        written = [*script, *[pad] * (len(prefix) + length)][len(prefix) - start :]
        return written[:length]

    network: Any = model.network
    network.__class__ = ScriptedNetwork
    network._next = next_ids
    return replace(model, network=network)
