"""Speed modes: a sampler, and tests that commit a canvas before the reference's loop would."""

from __future__ import annotations

from dataclasses import dataclass, field

from dgemma_mlx.diffusion.sampler import EntropyBound, Sampler


@dataclass(frozen=True)
class ConfidentTest:
    """Commits a canvas on its mean entropy alone.

    Attributes:
        first_step: Number of the first step, from 1, in which the test is made.
        max_entropy: Upper bound on the mean entropy, in nats; the checkpoint's ``confidence_threshold`` where that is
            higher.
    """

    first_step: int
    max_entropy: float = 0.0


@dataclass(frozen=True)
class PlateauTest:
    """Commits a canvas whose argmax has not changed for a while.

    Attributes:
        steps: Number of earlier steps in which the argmax canvas must be the same.
        max_entropy: Upper bound on the mean entropy, in nats.
    """

    steps: int
    max_entropy: float


@dataclass(frozen=True)
class CheckRule:
    """Lets the causal encoder read canvases that no other test has settled (see ``diffusion.encoder_check``).

    Attributes:
        max_uncertain: Largest number of uncertain positions in a text that is worth a check.
        ratio: Least probability of a plausible token, as a share of that of the token that the encoder expects.
    """

    max_uncertain: int
    ratio: float


@dataclass(frozen=True)
class Speed:
    """What a speed mode adds to the reference's loop.

    Every test is made on the logits of a whole forward pass over the canvas, and that pass's argmax canvas is what is
    committed. A position "counts" unless it comes after a settled end-of-text id and ``ignore_after_end`` is set.

    Attributes:
        gap: Commit when, at every position that counts, the two most probable tokens differ by more than this in
            probability (early commit on confidence gaps: Prophet, arXiv 2508.19982). None makes no such test.
        confident: The test on the mean entropy alone, or None.
        plateau: The test for a canvas that does not change any more, or None.
        check: The encoder's check of canvases that stay open, or None.
        sampler: Which ids a step accepts, and what stands at the other positions.
        ignore_after_end: Whether positions after a settled end-of-text id do not count, because their text is dropped.
        reroll: Whether a canvas that is still uncertain after all steps, or that holds nothing but padding, is denoised
            once more, from other noise.
    """

    gap: float | None = None
    confident: ConfidentTest | None = None
    plateau: PlateauTest | None = None
    check: CheckRule | None = None
    sampler: Sampler = field(default_factory=EntropyBound)
    ignore_after_end: bool = True
    reroll: bool = True


# The reference's loop: no further test.
REFERENCE = Speed(ignore_after_end=False, reroll=False)

CHECK = CheckRule(max_uncertain=12, ratio=0.3)

SPEEDS: dict[str, Speed] = {
    "reference": REFERENCE,
    "balanced": Speed(gap=0.9, confident=ConfidentTest(2), plateau=PlateauTest(4, 0.05), check=CHECK),
    "fast": Speed(gap=0.8, confident=ConfidentTest(12, 0.05), plateau=PlateauTest(2, 0.1), check=CHECK),
}  # fmt: skip

DEFAULT_SPEED = "balanced"

# Mean entropy, in nats, above which a canvas that has used all its steps is still uncertain.
UNCERTAIN = 0.2

# Entropy, in nats, below which the first end-of-text id of the argmax canvas is settled.
SETTLED_END = 0.05
