"""Choosing among given answers with one pass over one short canvas: a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dgemma_mlx.checks import check_text, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model, ModelText, block_length
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import PromptIds
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.infill.fill import end_id
from dgemma_mlx.infill.writer import Writer
from dgemma_mlx.text.exact import encode_exactly
from dgemma_mlx.text.images import Image


@dataclass(frozen=True)
class Choice:
    """One of the answers, and how probable it is.

    Attributes:
        text: The answer.
        probability: Its probability among the choices; those of all choices add up to 1.
        log_probability: Log-probability, in nats, of the canvas that holds it, before it is compared with the others.
    """

    text: str
    probability: float
    log_probability: float


def choose(
    model: Model, question: str, choices: Sequence[str], *, listed: bool = False, system: str | None = None,
    raw: bool = False, seed: int | None = None, prefill_step_size: int | None = None,
    memory_limit: int | None = None, cancelled: Callable[[], bool] | None = None,
    images: Sequence[Image] | None = None,
) -> list[Choice]:
    """Return how probable each of the choices is as the answer, the most probable first.

    The decoder passes once over a canvas of noise, as in the first step of an answer. A choice's score is the sum of
    the log-probabilities of its tokens there, of the end of text after them, and of padding up to where the longest
    choice ends, each position by itself. The probabilities are a softmax over the scores.

    Args:
        model: What ``load`` returned.
        question: What is asked.
        choices: Two or more different answers.
        listed: Whether the question names the choices.
        system: A system prompt.
        raw: Whether the question is plain text, without the chat template.
        seed: Seed of the canvas of noise. None draws one.
        prefill_step_size: Number of prompt positions encoded at once. None takes 2,048 (512 without Metal), or fewer
            to stay within the memory limit.
        memory_limit: Bytes that the work may take. None is the device's own limit.
        cancelled: A function that is called while the prompt is encoded. Once it returns True, the work ends.
        images: Images that the question shows, as in ``stream``.

    Raises:
        DgemmaError: For fewer than two choices, equal or empty ones, one that a canvas does not hold or that the
            model's tokenizer cannot keep, and an image that cannot be read.
        KeyboardInterrupt: After ``cancelled`` has returned True.
    """
    prepared = prepare_choices(model, question, choices, listed=listed, system=system, raw=raw, images=images)
    options = GenerationOptions(
        prefill_step_size=prefill_step_size, memory_limit=memory_limit, cancelled=cancelled
    )
    return weigh(model, prepared, seed, options)


class PreparedChoices(NamedTuple):
    """A question and the answers to choose among, checked and encoded.

    Attributes:
        ids: Ids (P) of the question.
        texts: The answers.
        rows: Ids of each answer and the end-of-text id.
    """

    ids: PromptIds
    texts: list[str]
    rows: list[list[int]]


def prepare_choices(
    model: ModelText, question: str, choices: Sequence[str], *, listed: bool = False, system: str | None = None,
    raw: bool = False, images: Sequence[Image] | None = None,
) -> PreparedChoices:
    """Check and encode a question. The arguments are those of ``choose``, whose errors are raised here."""
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise DgemmaError(f"the choices must be a list of texts, not {shown(choices)}", 'As in ["yes", "no"].', 2)
    check_text("the question", question)
    for choice in choices:
        check_text("a choice", choice)
    texts = [choice.strip() for choice in choices]
    if len(set(texts)) < 2 or len(set(texts)) < len(texts) or not all(texts):
        raise DgemmaError(
            f"at least two different answers are needed, not {', '.join(map(repr, choices)) or 'none'}",
            "Write each answer once; none may be empty.", exit_code=2,
        )
    rows = [[*encode_exactly(model.tokenizer, text), end_id(model)] for text in texts]
    longest = max(map(len, rows))
    if longest > model.config.canvas_length:
        raise DgemmaError(
            f"a choice has {longest - 1:,} tokens, but a canvas holds only {model.config.canvas_length - 1}",
            "Use shorter answers.", exit_code=2,
        )  # fmt: skip
    asked = f"{question}\n\nAnswer with one of: {', '.join(texts)}." if listed else question
    ids = model.encode_prompt(asked, system=system, raw=raw, images=images)
    model.check_prompt(ids)
    return PreparedChoices(ids, texts, rows)


@wired_memory()
def weigh(model: Model, prepared: PreparedChoices, seed: int | None, options: GenerationOptions) -> list[Choice]:
    """Return how probable each of the prepared choices is, the most probable first."""
    _, texts, rows = prepared
    longest = max(map(len, rows))
    writer = Writer(model, prepared.ids, 1, seed, options)
    table = np.array(writer.first_step(block_length(longest, model.config.canvas_length))[:longest])  # (L, V)
    tails = table[:, [model.generation.pad_token_id, *model.generation.eos_token_ids]].max(axis=-1)
    scores = [float(table[np.arange(len(row)), row].sum() + tails[len(row) :].sum()) for row in rows]
    most = max(scores)
    total = sum(math.exp(score - most) for score in scores)
    found = [Choice(text, math.exp(score - most) / total, score) for text, score in zip(texts, scores, strict=True)]
    return sorted(found, key=lambda choice: -choice.probability)
