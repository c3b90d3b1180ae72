"""Launching of a compiled kernel in the simulator's runtime (``runtime/launch.h``)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.metalsim import toolchain

Bytes = NDArray[np.uint8]


@dataclass
class Memory:
    """A buffer of a launch.

    Attributes:
        name: Name of the parameter.
        data: The bytes of the buffer.
        item: Size of an element in bytes.
        pointer: Offset in ``data`` to which the kernel's pointer points.
        phase: Offset of the start of ``data`` from a multiple of 64 in the simulated memory.
        valid: 0 for each byte between the elements of a strided array; None if all bytes belong to elements.
        is_output: Whether the kernel may write to the buffer.
        is_filled: Whether an output is initialized before the launch.
    """

    name: str
    data: Bytes
    item: int
    pointer: int = 0
    phase: int = 0
    valid: Bytes | None = None
    is_output: bool = False
    is_filled: bool = False


@dataclass(frozen=True)
class Failure:
    """A fault that a run found.

    Attributes:
        text: The message.
        line: Line of the kernel's text, or 0 if it is not known.
    """

    text: str
    line: int


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("size", ctypes.c_uint64),
        ("item", ctypes.c_uint64),
        ("pointer", ctypes.c_uint64),
        ("phase", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("is_output", ctypes.c_uint32),
        ("is_filled", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("sites", ctypes.c_void_p),
        ("slots", ctypes.POINTER(ctypes.c_char_p)),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("check", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("timeout_seconds", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("failed", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("text", ctypes.c_char * 1024),
    ]


@cache
def _runtime() -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(toolchain.runtime()), ctypes.RTLD_GLOBAL)


@cache
def _kernel(library: Path) -> ctypes.CDLL:
    _runtime()
    return ctypes.CDLL(str(library))


def _address(array: Bytes | None) -> int | None:
    return None if array is None else array.ctypes.data


def launch(
    library: Path,
    memories: list[Memory],
    slots: list[str],
    *,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    check: bool,
    order: int,
    timeout: int,
) -> Failure | None:
    """Run a kernel in a separate process, write its results to the ``data`` of the outputs, and return a fault or None.

    ``order`` is the order of the threads: 0 for ascending, 1 for descending, and larger numbers are seeds of random
    orders. ``timeout`` is in seconds.
    """
    kernel, runtime = _kernel(library), _runtime()
    buffers = (_Buffer * len(memories))(
        *(
            _Buffer(
                memory.name.encode(),
                memory.data.size,
                memory.item,
                memory.pointer,
                memory.phase,
                _address(memory.data),
                _address(memory.valid),
                memory.is_output,
                memory.is_filled,
            )
            for memory in memories
        )
    )
    names = (ctypes.c_char_p * max(1, len(slots)))(*(name.encode() for name in slots))
    call = _Launch(
        entry=ctypes.cast(kernel.msl_entry, ctypes.c_void_p).value,
        sites=ctypes.addressof(ctypes.c_char.in_dll(kernel, "msl_sites")),
        slots=names,
        buffers=buffers,
        buffer_count=len(memories),
        check=check,
        order=min(order, 2),
        seed=order,
        timeout_seconds=timeout,
        grid=(ctypes.c_uint32 * 3)(*grid),
        group=(ctypes.c_uint32 * 3)(*map(min, threadgroup, grid)),  # as in MLX
    )
    report: Any = _Report()
    if runtime.msl_run(ctypes.byref(call), ctypes.byref(report)) == 0:
        return None
    return Failure(report.text.decode(errors="replace"), report.line)
