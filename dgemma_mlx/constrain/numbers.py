"""Regular expressions for JSON numbers within bounds.

Integers have at most 18 digits, so they fit into 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from dgemma_mlx.constrain.regex import any_of, integers, naturals

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST = 10**18 - 1  # largest absolute value of an integer
NUMBER = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][+\-]?[0-9]{1,2})?"
SHORT_NUMBER = r"-?(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?"
# One to six digits after the point, the last not 0. With an integer part of up to _LARGEST_WITH_FRACTION, a reader that
# uses doubles never rounds the number to an integer.
_FRACTION = r"\.[0-9]{0,5}[1-9]"
_LARGEST_WITH_FRACTION = 10**9 - 1


def integer_within(bounds: Mapping[str, Any]) -> str | None:
    """Match the integers within the bounds, a mapping with any of the keys ``BOUNDS``.

    Return None when the bounds exclude all integers.
    """
    least, most = _least(bounds), _most(bounds)
    return integers(least, most) if least <= most else None


def number_within(bounds: Mapping[str, Any]) -> str | None:
    """Match numbers within the bounds, a mapping with any of the keys ``BOUNDS``.

    Without bounds the result matches all numbers. With bounds it matches integers, and numbers with up to six digits
    after the point that lie between two integers within the bounds. Return None when the bounds exclude all of these.
    """
    if not any(name in bounds for name in BOUNDS):
        return NUMBER
    lower = max(_exact(bounds, "minimum", -_LARGEST), _exact(bounds, "exclusiveMinimum", -_LARGEST))
    upper = min(_exact(bounds, "maximum", _LARGEST), _exact(bounds, "exclusiveMaximum", _LARGEST))
    # Largest integer parts of numbers with a fraction: n.f lies between n and n + 1, -n.f between -n - 1 and -n.
    most_positive, most_negative = math.floor(upper) - 1, -math.ceil(lower) - 1
    positive = naturals(max(0, math.ceil(lower)), min(most_positive, _LARGEST_WITH_FRACTION))
    negative = naturals(max(0, math.ceil(-upper)), min(most_negative, _LARGEST_WITH_FRACTION))
    whole = integer_within(bounds)
    found = [] if whole is None else [whole]
    found += [f"{any_of(*positive)}{_FRACTION}"] if positive else []
    found += [f"-{any_of(*negative)}{_FRACTION}"] if negative else []
    return any_of(*found) if found else None


def _least(bounds: Mapping[str, Any]) -> int:
    """Return the smallest integer within the bounds."""
    given = math.ceil(_exact(bounds, "minimum", -_LARGEST))
    return max(given, math.floor(_exact(bounds, "exclusiveMinimum", -_LARGEST - 1)) + 1)


def _most(bounds: Mapping[str, Any]) -> int:
    """Return the largest integer within the bounds."""
    given = math.floor(_exact(bounds, "maximum", _LARGEST))
    return min(given, math.ceil(_exact(bounds, "exclusiveMaximum", _LARGEST + 1)) - 1)


def _exact(bounds: Mapping[str, Any], name: str, default: int) -> Fraction:
    """Return a bound as an exact fraction of its decimal form: 0.1 is one tenth.

    Bounds beyond ``_LARGEST`` are clipped just beyond it, which has the same effect.
    """
    value = Fraction(str(bounds.get(name, default)))
    return max(min(value, Fraction(_LARGEST + 2)), Fraction(-_LARGEST - 2))
