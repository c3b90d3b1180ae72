"""Rotary position embedding in its two variants (Su et al., arXiv 2104.09864).

Pairs are (i, i + D/2). 'default' rotates every pair; 'proportional' (Gemma 4) rotates only the first
``partial_rotary_factor * D/2`` pairs, with exponents over the whole D, and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx


def rope_periods(parameters: Mapping[str, Any], head_dim: int) -> mx.array:
    """(D/2,) float32: the angle of pair i at position p is ``p / periods[i]``; inf does not rotate."""
    pairs = head_dim // 2
    periods = float(parameters["rope_theta"]) ** (mx.arange(pairs, dtype=mx.float32) / pairs)
    if parameters.get("rope_type") == "proportional":
        rotated = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
        periods = mx.where(mx.arange(pairs) < rotated, periods, mx.inf)
    return periods
