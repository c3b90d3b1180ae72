"""Simulation of a kernel that is given as a few lines of source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tests.metalsim.simulate import simulate

Output = tuple[Sequence[int], mx.Dtype]


def run_source(
    source: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Output],
    *,
    grid: tuple[int, int, int] = (32, 1, 1),
    threadgroup: tuple[int, int, int] = (32, 1, 1),
    header: str = "",
    contiguous: bool = True,
    **options: Any,
) -> list[mx.array]:
    """Simulate ``source`` as the body of a kernel and return its outputs.

    ``inputs`` and ``outputs`` are keyed by name. An output is described by its shape and dtype.
    """
    kernel: Any = mx.fast.metal_kernel(
        name="test",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=contiguous,
    )
    return simulate(
        kernel,
        inputs=list(inputs.values()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        **options,
    )


def bits(array: mx.array) -> NDArray[Any]:
    """Return the elements' bits as unsigned integers, for exact comparisons."""
    return np.array(array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]))


def wide(array: mx.array) -> NDArray[np.float64]:
    """Return the values in float64."""
    with np.errstate(invalid="ignore"):  # caused by signalling NaNs
        return np.array(array.astype(mx.float32)).astype(np.float64)
