"""Nonsense for every place of a JSON document."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_mlx.errors import DgemmaError

ABSENT = object()
ODD_VALUES: list[Any] = [
    ABSENT, None, True, False, 0, -1, 3, 2**24 + 1, 10**30, -0.5, 0.5, 1e300, float("inf"), float("nan"), "", "64",
    "full_attention", "²", [], [1], [None], ["full_attention"], [[]], {}, {"5": 1}, {"0": {}}, {"2": {"head_dim": "x"}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document but the whole."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


def flipped_headers(file: Path, count: int) -> Iterator[int]:
    """Flips bits of one random byte in the header of a safetensors file, ``count`` times; yields its position."""
    original = file.read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    rng = np.random.default_rng(0)
    for position in rng.integers(0, header, count).tolist():
        damaged = bytearray(original)
        damaged[position] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        yield position


def one_line(error: DgemmaError) -> bool:
    return bool(error.message and error.hint) and "\n" not in error.message + error.hint


def reported(call: Callable[..., Any], *arguments: Any) -> DgemmaError | None:
    """The error that a call raises for the user; any other one passes."""
    try:
        call(*arguments)
    except DgemmaError as error:
        return error
    return None
