"""The description of an operation: its Metal kernel, its reference in plain MLX operations, and how to compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (mx.bfloat16, mx.float16)  # of the weights of checkpoints on Macs

# Largest error of a kernel, relative to the reference's largest absolute value: a few rounding errors of the dtype.
_TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def close(found: Any, expected: Any) -> bool:
    """Return whether two results agree: arrays, or trees of arrays with the same structure.

    Shapes and dtypes must be equal, integers must be equal, and floats must agree within a tolerance of their dtype.
    """
    return all(_array_close(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree of tuples, lists and dicts."""
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _array_close(found: mx.array, expected: mx.array) -> bool:
    """Return whether two arrays agree, as ``close`` defines it."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not mx.issubdtype(expected.dtype, mx.floating):
        return bool((found == expected).all().item())
    found, wide = found.astype(mx.float32), expected.astype(mx.float32)
    bound = _TOLERANCE[expected.dtype] * mx.abs(wide).max()
    return bool((mx.abs(found - wide) <= bound).all().item())  # False for a NaN


@dataclass(frozen=True, eq=False)
class Operation(Generic[P, R]):
    """A Metal kernel and its reference, two functions that take the same arguments and compute the same result.

    Attributes:
        name: Name of the operation, unique among all operations.
        kernel: The function that launches the Metal kernel.
        reference: The same function in plain MLX operations.
        examples: One function for each variant of the kernel. It takes a dtype and returns positional arguments with
            the published model's sizes, with which the kernel is checked and timed.
        source: The kernel's complete Metal source. The self-check is repeated when it changes.
        dtypes: The dtypes that an answer can need a verdict for, that is, of the first array of floats in a call.
        agree: ``agree(found, expected)`` returns whether a kernel's result is close enough to the reference's.
    """

    name: str
    kernel: Callable[P, R]
    reference: Callable[P, R]
    examples: Sequence[Callable[[mx.Dtype], tuple[Any, ...]]]
    source: str
    dtypes: Sequence[mx.Dtype] = DTYPES
    agree: Callable[[R, R], bool] = close
