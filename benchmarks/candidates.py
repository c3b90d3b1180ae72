"""Samplers that were tried and that no speed mode uses. ``answers.py`` measures them by name."""

from __future__ import annotations

from dataclasses import replace

from dgemma_mlx.diffusion.ancestral import Ancestral
from dgemma_mlx.diffusion.speed import SPEEDS, Speed

BALANCED = SPEEDS["balanced"]

CANDIDATES: dict[str, Speed] = {
    "ddim4": replace(BALANCED, sampler=Ancestral(4)),
    "ddim8": replace(BALANCED, sampler=Ancestral(8)),
    "ddim16": replace(BALANCED, sampler=Ancestral(16)),
    "corrector8": replace(BALANCED, sampler=Ancestral(8, corrector_steps=1, corrector_k=4)),
    "corrector16": replace(BALANCED, sampler=Ancestral(16, corrector_steps=1, corrector_k=4)),
}
SPEEDS.update(CANDIDATES)  # so that ``generate`` finds them
