"""Invalid values for every place in a JSON document and in a safetensors header."""

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
    """Yield the path of every value in a JSON document, except of the document itself."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a JSON document with the value at a path replaced, or removed for ``ABSENT``."""
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
    """Damage one random byte in the header of a safetensors file, ``count`` times, and yield its position each time."""
    original = file.read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    rng = np.random.default_rng(0)
    for position in rng.integers(0, header, count).tolist():
        damaged = bytearray(original)
        damaged[position] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        yield position


def one_line(error: DgemmaError) -> bool:
    """Return whether an error has a message and a hint of one line each."""
    return bool(error.message and error.hint) and "\n" not in error.message + error.hint


def reported(call: Callable[..., Any], *arguments: Any) -> DgemmaError | None:
    """Return the ``DgemmaError`` that a call raises, or None. Other exceptions are not caught."""
    try:
        call(*arguments)
    except DgemmaError as error:
        return error
    return None
