"""Conversion of DiffusionGemma checkpoints to quantized MLX checkpoints, streamed so that it takes little memory.

``convert`` does everything. ``prepare`` only plans, and ``carry_out`` writes what a plan describes. ``RECIPES`` are the
available quantizations. ``verify`` compares an output with its source.
"""

from dgemma_convert.conversion import Report, carry_out, convert, prepare
from dgemma_convert.plan import Plan
from dgemma_convert.recipes import RECIPES, Recipe
from dgemma_convert.verify import Verification, verify

__all__ = ["RECIPES", "Plan", "Recipe", "Report", "Verification", "carry_out", "convert", "prepare", "verify"]
