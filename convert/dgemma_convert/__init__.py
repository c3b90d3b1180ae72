"""Converts DiffusionGemma checkpoints to MLX ones, streamed in little memory."""

from dgemma_convert.conversion import Report, carry_out, convert, prepare
from dgemma_convert.plan import Plan
from dgemma_convert.recipes import RECIPES, Recipe
from dgemma_convert.verify import Verification, verify

__all__ = ["RECIPES", "Plan", "Recipe", "Report", "Verification", "carry_out", "convert", "prepare", "verify"]
