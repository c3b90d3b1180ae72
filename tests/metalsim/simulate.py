"""Simulation of an ``mx.fast.metal_kernel`` on the CPU, from the exact source that MLX would give to Metal."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from tests.metalsim import toolchain, transform
from tests.metalsim.launch import Memory, launch
from tests.metalsim.lint import Finding, lint
from tests.metalsim.source import KernelCall, trace

MAX_THREADS = 1024
MAX_BUFFERS = 31
ALIGNMENT = 16  # bytes; the largest alignment of any Metal type


class SimulationError(Exception):
    """A fault in a kernel or its launch. The message names the line of the kernel's text."""


def simulate(
    kernel: Callable[..., Any],
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: list[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    orders: int = 3,
    check: bool = True,
    timeout: int = 60,
) -> list[mx.array]:
    """Return the arrays that ``kernel(inputs=..., ...)`` returns on a machine with Metal.

    The last three arguments belong to the simulator. With ``check``, every memory access is checked, and the kernel
    runs in ``orders`` orders of its threads (ascending, descending, then random), whose results must be equal in every
    bit. Without ``check``, it runs once, as fast as compiled C++. ``timeout`` is the limit of each run in seconds.

    Raises:
        SimulationError: The kernel does not compile, or a run found a fault.
    """
    call = trace(
        kernel,
        inputs=inputs,
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
        init_value=init_value,
    )
    threads = prod(call.threadgroup)
    if threads > MAX_THREADS:
        raise SimulationError(f"{call.name}: {threads} threads in a threadgroup; Metal has {MAX_THREADS}")
    buffers = sum(parameter.role != "attribute" for parameter in call.parameters)
    if buffers > MAX_BUFFERS:
        raise SimulationError(f"{call.name}: {buffers} buffers, shapes and strides among them; Metal has {MAX_BUFFERS}")
    library, slots = build(call, check=check)
    bound = _input_memories(call)
    first: list[Memory] = []
    for order in range(orders if check else 1):
        outputs = _output_memories(call)
        failure = launch(
            library,
            [*bound, *outputs],
            slots,
            grid=call.grid,
            threadgroup=call.threadgroup,
            check=check,
            order=order,
            timeout=timeout,
        )
        if failure is not None:
            raise SimulationError(_message(call, failure.text, failure.line))
        for got, expected in zip(outputs, first, strict=False):
            _same(call, got, expected)
        first = first or outputs
    return [
        _array(memory.data, shape, dtype)
        for memory, shape, dtype in zip(first, call.output_shapes, call.output_dtypes, strict=True)
    ]


def simulated(kernel: Callable[..., Any], **options: Any) -> Callable[..., list[mx.array]]:
    """Return a function that takes the same arguments as ``kernel`` and simulates the call.

    ``options`` are ``orders``, ``check`` and ``timeout`` of ``simulate``.
    """

    def run(*, stream: Any = None, verbose: bool = False, **call: Any) -> list[mx.array]:
        return simulate(kernel, **call, **options)

    return run


def build(call: KernelCall, *, check: bool) -> tuple[Path, list[str]]:
    """Compile a kernel and return its shared object and the names of its threadgroup variables.

    Raises:
        SimulationError: Clang refuses the kernel or, with ``check``, Metal would.
    """
    try:
        text, slots = transform.translate(call)
        library = toolchain.compile_kernel(text, transform.preamble(), check=check)
        findings = _findings(call.text, text) if check else []
    except transform.TransformError as error:
        raise SimulationError(_message(call, str(error), error.line)) from error
    except toolchain.CompileError as error:
        found = re.search(rf"{toolchain.KERNEL_FILE}:(\d+):\d+: (?:fatal )?error: (.*)", str(error))
        if found is None:
            raise SimulationError(f"{call.name}: does not compile\n{error}") from error
        notes = re.findall(r"note: (candidate .*)", str(error))[:3]
        text = "\n  ".join([f"does not compile: {found[2]}", *notes])
        raise SimulationError(_message(call, text, int(found[1]))) from error
    if findings:
        raise SimulationError("\n".join(_message(call, f"Metal refuses: {f.message}", f.line) for f in findings))
    return library, slots


@cache
def _findings(text: str, translation: str) -> list[Finding]:
    return lint(text, toolchain.syntax_tree(translation, transform.preamble()))


def _message(call: KernelCall, text: str, line: int) -> str:
    if line == 0:
        return f"{call.name}: {text}"
    return f"{call.name}: {text}\n  line {line}: {call.text.splitlines()[line - 1].strip()}"


def _bits(array: mx.array) -> NDArray[Any]:
    """Return the memory of an array as a NumPy array, with bfloat16 as uint16."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _input_memories(call: KernelCall) -> list[Memory]:
    """Return the buffers that MLX binds before the outputs.

    These are the inputs and those of their shapes, strides and numbers of dimensions that the kernel uses.
    """
    values = call.inputs
    if call.ensure_row_contiguous:
        values = tuple(value if _bits(value).flags.c_contiguous else mx.contiguous(value) for value in values)
    arrays = [_bits(value) for value in values]
    memories = []
    for parameter in call.parameters:
        if parameter.role in ("output", "attribute"):
            continue
        array = arrays[parameter.array]
        if parameter.role == "shape":
            array = np.array(array.shape, np.int32)
        elif parameter.role == "strides":  # counted in elements
            array = np.array([stride // array.itemsize for stride in array.strides], np.int64)
        elif parameter.role == "ndim":
            array = np.array(array.ndim, np.int32)
        memories.append(_memory(parameter.name, array))
    return memories


def _memory(name: str, array: NDArray[Any]) -> Memory:
    """Return the span of memory that an array covers, with a mask of its elements' bytes if the array is strided."""
    if array.flags.c_contiguous:
        return Memory(name, array.reshape(-1).view(np.uint8), array.itemsize, phase=_phase(array.ctypes.data))
    low, high = byte_bounds(array)
    pointer = array.ctypes.data - low
    data = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
    valid = np.zeros(high - low, np.uint8)
    as_strided(valid[pointer:], (*array.shape, array.itemsize), (*array.strides, 1))[...] = 1
    return Memory(name, data, array.itemsize, pointer, _phase(low), valid)


def _phase(address: int) -> int:
    """Return the offset from a multiple of ``ALIGNMENT`` that memory at ``address`` would have in an array of Metal."""
    return (address - _allocated()) % ALIGNMENT


@cache
def _allocated() -> int:
    return int(_bits(mx.zeros(64)).ctypes.data) % ALIGNMENT  # on a CPU, MLX stores a size before the data


def _output_memories(call: KernelCall) -> list[Memory]:
    names = [parameter.name for parameter in call.parameters if parameter.role == "output"]
    memories = []
    for name, shape, dtype in zip(names, call.output_shapes, call.output_dtypes, strict=True):
        value = mx.full(shape, call.init_value or 0, dtype)
        data = np.array(_bits(value)).reshape(-1).view(np.uint8)
        memories.append(Memory(name, data, dtype.size, is_output=True, is_filled=call.init_value is not None))
    return memories


def _same(call: KernelCall, got: Memory, expected: Memory) -> None:
    different = np.flatnonzero(got.data != expected.data)
    if different.size:
        at = int(different[0]) // got.item
        raise SimulationError(f"{call.name}: race: {got.name}[{at}] depends on the order of the threads")


def _array(data: NDArray[np.uint8], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    kinds = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    whole = mx.array(data.view(f"u{dtype.size}"), dtype=kinds[dtype.size])
    return whole.view(dtype).reshape(shape)
