"""Choosing among given answers by one pass over one short canvas: a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.infill.fill import end_id
from dgemma_mlx.infill.layout import block_length
from dgemma_mlx.infill.writer import Writer


@dataclass(frozen=True)
class Choice:
    """One of the answers, and how probable it is among them."""

    text: str
    probability: float
    """of all choices together 1"""
    log_probability: float
    """of the canvas that holds it, in nats, before it is compared with the others"""


def choose(
    model: Model, question: str, choices: Sequence[str], *, listed: bool = False, system: str | None = None,
    raw: bool = False, seed: int | None = None, **options: Any,
) -> list[Choice]:
    """How probable each of the choices is as the answer, the most probable first.

    The decoder passes once over a canvas of noise, the first step of an answer. A choice's score is the
    log-probability of its tokens there, of the end of text behind them and of padding up to where the longest ends,
    each position by itself; probabilities are a softmax over the scores. ``listed`` names the choices in the
    question. ``DgemmaError`` for fewer than two choices, equal or empty ones, and what a canvas does not hold.
    """
    texts = [choice.strip() for choice in choices]
    if len(set(texts)) < 2 or len(set(texts)) < len(texts) or not all(texts):
        raise DgemmaError(f"no choices: {', '.join(map(repr, choices))}", "Two or more different ones.", exit_code=2)
    ids = [[*model.tokenizer.encode(text), end_id(model)] for text in texts]
    longest = max(map(len, ids))
    if longest > model.config.canvas_length:
        raise DgemmaError(f"a choice has {longest - 1:,} tokens, a canvas holds {model.config.canvas_length - 1}",
                          exit_code=2)  # fmt: skip
    asked = f"{question}\n\nAnswer with one of: {', '.join(texts)}." if listed else question
    writer = Writer(model, model.encode_prompt(asked, system=system, raw=raw), 1, seed, options)
    table = np.array(writer.first_step(block_length(longest, model.config.canvas_length))[:longest])  # (L, V)
    tails = table[:, [model.generation.pad_token_id, *model.generation.eos_token_ids]].max(axis=-1)
    scores = [float(table[np.arange(len(row)), row].sum() + tails[len(row) :].sum()) for row in ids]
    most = max(scores)
    total = sum(math.exp(score - most) for score in scores)
    found = [Choice(text, math.exp(score - most) / total, score) for text, score in zip(texts, scores, strict=True)]
    return sorted(found, key=lambda choice: -choice.probability)
