"""JSON numbers within bounds. Integers have at most 18 digits, which every reader takes exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from dgemma_mlx.constrain.regex import any_of, integers, naturals

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST = 10**18 - 1
NUMBER = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][+\-]?[0-9]{1,2})?"
SHORT_NUMBER = r"-?(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?"
_FRACTION = r"\.[0-9]{0,5}[1-9]"  # never 0, and never rounded to an integer, behind one up to
_LARGEST_WITH_FRACTION = 10**9 - 1


def integer_within(bounds: Mapping[str, Any]) -> str | None:
    """The integers within the ``BOUNDS`` that are given; None where there are none."""
    least, most = _least(bounds), _most(bounds)
    return integers(least, most) if least <= most else None


def number_within(bounds: Mapping[str, Any]) -> str | None:
    """Integers, and numbers with up to six digits behind the point, if both integers beside them are within; all
    numbers where no bound is given."""
    if not any(name in bounds for name in BOUNDS):
        return NUMBER
    lower = max(_exact(bounds, "minimum", -_LARGEST), _exact(bounds, "exclusiveMinimum", -_LARGEST))
    upper = min(_exact(bounds, "maximum", _LARGEST), _exact(bounds, "exclusiveMaximum", _LARGEST))
    below, above = math.floor(upper) - 1, -math.ceil(lower) - 1  # the last integers that may have a fraction, 0 and on
    positive = naturals(max(0, math.ceil(lower)), min(below, _LARGEST_WITH_FRACTION))
    negative = naturals(max(0, math.ceil(-upper)), min(above, _LARGEST_WITH_FRACTION))
    whole = integer_within(bounds)
    found = [] if whole is None else [whole]
    found += [f"{any_of(*positive)}{_FRACTION}"] if positive else []
    found += [f"-{any_of(*negative)}{_FRACTION}"] if negative else []
    return any_of(*found) if found else None


def _least(bounds: Mapping[str, Any]) -> int:
    """The smallest integer that is allowed."""
    given = math.ceil(_exact(bounds, "minimum", -_LARGEST))
    return max(given, math.floor(_exact(bounds, "exclusiveMinimum", -_LARGEST - 1)) + 1)


def _most(bounds: Mapping[str, Any]) -> int:
    given = math.floor(_exact(bounds, "maximum", _LARGEST))
    return min(given, math.ceil(_exact(bounds, "exclusiveMaximum", _LARGEST + 1)) - 1)


def _exact(bounds: Mapping[str, Any], name: str, default: int) -> Fraction:
    """A bound as it is written: 0.1 is a tenth. Beyond ``_LARGEST`` it does not matter by how much."""
    value = Fraction(str(bounds.get(name, default)))
    return max(min(value, Fraction(_LARGEST + 2)), Fraction(-_LARGEST - 2))
