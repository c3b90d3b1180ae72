"""The golden checkpoint and the numbers that transformers computed with it. ``export.py`` describes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma

FOLDER = Path(__file__).parent
CONFIG = ModelConfig.load(FOLDER)

# The largest difference found on a CPU is 2.3e-6. A GPU sums in another order and may round the products.
TOLERANCE = 1e-4 if mx.default_device() == mx.Device(mx.cpu) else 1e-3


@cache
def golden_model() -> DiffusionGemma:
    return load_model(FOLDER, CONFIG)[0]


def golden_numbers(part: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of one part of ``numbers.npz``: ``plain``, ``padded`` or ``trace``."""
    with np.load(FOLDER / "numbers.npz") as numbers:
        return {name.removeprefix(f"{part}."): numbers[name] for name in numbers if name.startswith(f"{part}.")}
