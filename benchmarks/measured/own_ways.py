"""This project's ways of answering: its speed modes, with or without the encoder's check."""

from __future__ import annotations

from typing import Any

from dgemma_mlx import Model, generate
from dgemma_mlx.diffusion.speed import SPEEDS

from .questions import MAX_TOKENS
from .records import Answerer, Cost, Question

CHECKS = ("flag", "repair")  # modes of --verify


def is_way(name: str) -> bool:
    """Return whether a name is a speed mode, optionally followed by ``+flag`` or ``+repair``."""
    speed, plus, verify = name.partition("+")
    return speed in SPEEDS and (verify in CHECKS or not plus)


def answerer(model: Model, way: str) -> Answerer:
    """Return what answers questions in one way."""
    speed, _, verify = way.partition("+")

    def answer(question: Question) -> Cost:
        chosen: Any = verify or "off"
        done = generate(
            model, question.messages, max_tokens=MAX_TOKENS, seed=question.number, speed=speed, verify=chosen
        )
        counts = done.statistics
        return Cost(
            text=done.text, canvases=counts.canvases,
            decoder_passes=counts.denoising_steps, decoder_positions=counts.decoded_positions,
            encoder_passes=counts.encoder_passes, encoder_positions=counts.encoded_positions,
            low_confidence=counts.low_confidence, doubted=counts.doubted_tokens,
        )  # fmt: skip

    return answer
