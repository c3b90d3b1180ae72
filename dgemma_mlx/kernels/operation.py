"""What a kernel is here: a Metal kernel, the reference in plain operations, and the means to compare the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

P = ParamSpec("P")
R = TypeVar("R")

_TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}  # of the largest value: a few roundings


def close(found: Any, expected: Any) -> bool:
    """Whether two results, arrays or tuples of arrays, agree: floats within a tolerance, integers exactly."""
    return all(_array_close(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree of tuples, lists and dicts."""
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat]


def _array_close(found: mx.array, expected: mx.array) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not mx.issubdtype(expected.dtype, mx.floating):
        return bool((found == expected).all().item())
    found, wide = found.astype(mx.float32), expected.astype(mx.float32)
    bound = _TOLERANCE[expected.dtype] * mx.abs(wide).max()
    return bool((mx.abs(found - wide) <= bound).all().item())  # a NaN is never within


@dataclass(frozen=True)
class Operation(Generic[P, R]):
    """A kernel and its reference, which compute the same.

    Attributes:
        name: The operation's name, unique among all operations.
        kernel: The Metal kernel.
        reference: The same function in plain MLX operations.
        examples: One function for each form of the kernel: it takes a dtype and returns positional arguments of the
            published model's sizes, with which the kernel is checked and timed.
        source: All of the kernel's Metal source, so that a change of it invalidates what was measured.
        agree: Compares a result of the kernel with one of the reference: ``agree(found, expected)``.
    """

    name: str
    kernel: Callable[P, R]
    reference: Callable[P, R]
    examples: Sequence[Callable[[mx.Dtype], tuple[Any, ...]]]
    source: str
    agree: Callable[[R, R], bool] = close
