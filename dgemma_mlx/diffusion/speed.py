"""Speed modes: when a canvas may be committed before the reference would, as documented bundles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """What a mode adds to the reference's loop; without any of it, it is the reference's loop.

    Every test is made on the logits of a whole forward pass over the canvas, and it is that pass's argmax canvas that
    is committed. A position "counts" unless it comes behind an end-of-text id that is settled.
    """

    gap: float | None = None
    """commit when at each position that counts the two most probable tokens are so far apart in probability
    (early commit on confidence gaps: Prophet, arXiv 2508.19982)"""
    confident_steps: int | None = None
    """commit on entropy alone, from this step on, ..."""
    confident_entropy: float = 0.0
    """... when the mean entropy is below this (nats), or the ``confidence_threshold`` where that is higher"""
    plateau_steps: int | None = None
    """commit when the argmax has been the same for so many steps before this one and ..."""
    plateau_entropy: float = 0.0
    """... the mean entropy is below this (nats)"""
    entropy_bound_factor: float = 1.0
    """above 1: more tokens are accepted in a step"""
    ignore_after_end: bool = True
    """positions behind a settled end-of-text id do not count: their text is dropped"""
    reroll: bool = True
    """start once more, from other noise, where all steps were used and the canvas is still uncertain"""


REFERENCE = Speed(ignore_after_end=False, reroll=False)

SPEEDS: dict[str, Speed] = {
    "reference": REFERENCE,
    "balanced": Speed(gap=0.9, confident_steps=2, plateau_steps=4, plateau_entropy=0.05),
    "fast": Speed(
        gap=0.8, confident_steps=12, confident_entropy=0.05, plateau_steps=2, plateau_entropy=0.1,
        entropy_bound_factor=2.0,
    ),
}  # fmt: skip

DEFAULT_SPEED = "balanced"

UNCERTAIN = 0.2
"""nats: a canvas that used all its steps is still uncertain when its mean entropy is above"""

SETTLED_END = 0.05
"""nats: below, the first end-of-text id of the argmax canvas is settled"""
