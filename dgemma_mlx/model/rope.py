"""Rotary position embedding in the two variants of Gemma 4 (Su et al., arXiv 2104.09864).

A head's values i and i + D/2 form a pair, which is rotated by an angle proportional to the position. The 'default'
variant rotates every pair. The 'proportional' variant rotates only the first ``partial_rotary_factor * D/2`` pairs,
with exponents computed over the whole D, and leaves the other pairs unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx


def rope_periods(parameters: Mapping[str, Any], head_dim: int) -> mx.array:
    """Return the periods of a head's rotated pairs, (D/2,) float32, where D is ``head_dim``.

    At position p, pair i turns by the angle ``p / periods[i]`` in radians. A period of infinity means no rotation.
    ``parameters`` is an entry of ``rope_parameters`` in config.json: ``rope_theta``, ``rope_type`` and, for the
    'proportional' type, ``partial_rotary_factor``.
    """
    pairs = head_dim // 2
    periods = float(parameters["rope_theta"]) ** (mx.arange(pairs, dtype=mx.float32) / pairs)
    if parameters.get("rope_type") == "proportional":
        rotated = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
        periods = mx.where(mx.arange(pairs) < rotated, periods, mx.inf)
    mx.eval(periods)  # a lazy array could only be computed by the thread that made it
    return periods
