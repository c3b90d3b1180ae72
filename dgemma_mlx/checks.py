"""Checks of single values that callers and files supply."""

from __future__ import annotations

import math
from typing import Any

from dgemma_mlx.errors import DgemmaError

LARGEST_SEED = 2**64 - 1  # the largest seed that ``mlx.core.random.key`` accepts


def is_whole(value: Any) -> bool:
    """Whether the value is an integer; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether the value is a string that UTF-8 can encode: a command line may hold other bytes, and JSON may hold one
    half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def check_count(name: str, value: Any) -> None:
    """Raises ``DgemmaError`` (exit code 2) unless the value is an integer of at least 1."""
    if not is_whole(value) or not 1 <= value <= LARGEST_SEED:
        raise DgemmaError(f"{name} must be at least 1, not {value!r}", "It is a whole number.", exit_code=2)


def check_seed(value: Any) -> None:
    """Raises ``DgemmaError`` (exit code 2) unless the value is None or a seed that MLX accepts."""
    if value is not None and not (is_whole(value) and 0 <= value <= LARGEST_SEED):
        raise DgemmaError(f"not a seed: {value!r}", "A seed is a whole number from 0 to 2^64 - 1.", exit_code=2)


def check_temperature(value: Any) -> None:
    """Raises ``DgemmaError`` (exit code 2) unless the value is None or a finite number of at least 0."""
    if value is not None and not ((is_whole(value) or isinstance(value, float)) and 0 <= value < math.inf):
        raise DgemmaError(
            f"temp must be a number of at least 0, not {value!r}", "0 takes the most probable tokens.", exit_code=2
        )
