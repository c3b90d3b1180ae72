"""Reading of parts of tensors from safetensors files, so that a machine neither reads nor holds the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.checkpoint.shards import StoredTensor
from dgemma_mlx.errors import DgemmaError

_BLOCK_BYTES = 8 << 20  # of whole rows that are read to take columns out of them
# The dtypes that MLX reads, and an integer dtype of the same size in which NumPy sees them.
_DTYPES = {
    "BOOL": (mx.bool_, mx.uint8), "U8": (mx.uint8, mx.uint8), "I8": (mx.int8, mx.uint8), "U16": (mx.uint16, mx.uint16),
    "I16": (mx.int16, mx.uint16), "F16": (mx.float16, mx.uint16), "BF16": (mx.bfloat16, mx.uint16),
    "U32": (mx.uint32, mx.uint32), "I32": (mx.int32, mx.uint32), "F32": (mx.float32, mx.uint32),
}  # fmt: skip


def read_part(stored: StoredTensor, axis: int = -1, ranges: Sequence[range] | None = None) -> mx.array:
    """Read the rows or columns in ``ranges`` of a stored tensor, one range after another; all of it for None.

    ``axis`` is -2 for rows or -1 for columns. The array is evaluated and has the stored dtype. Raises ``DgemmaError``
    when the file cannot be read, or has a dtype that MLX does not have.
    """
    if stored.dtype not in _DTYPES:
        raise DgemmaError(f"{stored.path} has a tensor of dtype {stored.dtype}", "Convert the checkpoint again.")
    dtype, seen_as = _DTYPES[stored.dtype]
    shape = list(stored.shape)
    if ranges is not None:
        shape[axis] = sum(map(len, ranges))
    part = mx.zeros(shape, seen_as)
    mx.eval(part)
    view: NDArray[Any] = np.array(part, copy=False)  # NumPy writes into the array itself: no second copy exists
    try:
        with stored.path.open("rb", buffering=0) as file:
            if ranges is None:
                _read_into(file, stored.start, view.reshape(-1))
            elif axis == -2:
                _read_rows(file, stored, ranges, view)
            else:
                _read_columns(file, stored, ranges, view)
    except OSError as error:
        message = f"{stored.path} cannot be read: {os.strerror(error.errno) if error.errno else error}"
        raise DgemmaError(message, "Fetch the checkpoint again.") from None
    return part.view(dtype)


def _read_rows(file: BinaryIO, stored: StoredTensor, ranges: Sequence[range], view: NDArray[Any]) -> None:
    """Read rows into a view (..., rows, columns). Those of one range are one read."""
    *lead, rows, columns = stored.shape
    width = columns * view.itemsize
    for matrix, target in enumerate(view.reshape(prod(lead), -1, columns)):
        done = 0
        for part in ranges:
            place = stored.start + (matrix * rows + part.start) * width
            _read_into(file, place, target[done : done + len(part)].reshape(-1))
            done += len(part)


def _read_columns(file: BinaryIO, stored: StoredTensor, ranges: Sequence[range], view: NDArray[Any]) -> None:
    """Read columns into a view (..., rows, columns), from blocks of whole rows."""
    columns = stored.shape[-1]
    targets = view.reshape(-1, view.shape[-1])
    step = max(1, _BLOCK_BYTES // (columns * view.itemsize))
    block: NDArray[Any] = np.empty((min(step, len(targets)), columns), view.dtype)
    for start in range(0, len(targets), step):
        target = targets[start : start + step]
        whole = block[: len(target)]
        _read_into(file, stored.start + start * columns * view.itemsize, whole.reshape(-1))
        done = 0
        for part in ranges:
            target[:, done : done + len(part)] = whole[:, part.start : part.stop]
            done += len(part)


def _read_into(file: BinaryIO, place: int, target: NDArray[Any]) -> None:
    """Fill a one-dimensional contiguous array with the bytes from ``place`` on."""
    file.seek(place)
    rest = target.view(np.uint8).data
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise OSError(None, "it is shorter than its header says")
        rest = rest[count:]
