"""Tracing of a kernel call: the exact Metal source that MLX would compile, and the launch that it would make."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel function.

    Attributes:
        name: Name of the parameter.
        role: ``input``, ``shape``, ``strides``, ``ndim``, ``output`` or ``attribute``.
        declared: Type as written in the source, for example ``const device float*``.
        array: Index of the input or output that the parameter belongs to.
    """

    name: str
    role: str
    declared: str
    array: int = 0


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel, as MLX passes it to Metal.

    Attributes:
        name: Name of the kernel, without MLX's prefix.
        function: Name of the function that is launched, with its template arguments.
        text: The complete Metal source.
        parameters: Parameters of the kernel function, in order.
        inputs: The input arrays.
        output_shapes: Shape of each output.
        output_dtypes: Dtype of each output.
        grid: Number of threads along each axis.
        threadgroup: Number of threads in a threadgroup along each axis.
        ensure_row_contiguous: Whether MLX copies inputs that are not row-contiguous.
        init_value: Value with which MLX fills the outputs; None leaves them uninitialized.
    """

    name: str
    function: str
    text: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[mx.array, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    ensure_row_contiguous: bool
    init_value: float | None


def trace(
    kernel: Callable[..., Any], *, inputs: Sequence[Any], init_value: float | None = None, **call: Any
) -> KernelCall:
    """Trace the call ``kernel(inputs=..., **call)`` of an ``mx.fast.metal_kernel``, without running it.

    This does not need Metal.

    Raises:
        ValueError: MLX refuses the arguments.
    """
    arrays = [value for value in inputs if isinstance(value, mx.array)]
    mx.eval(arrays)
    known: dict[str, mx.array] = {}
    found: list[dict[str, Any]] = []

    def build(*traced: mx.array) -> Any:
        left = iter(traced)
        given = [next(left) if isinstance(value, mx.array) else value for value in inputs]
        return kernel(inputs=given, init_value=init_value, **call)

    def note(part: dict[str, Any]) -> None:
        if part["type"] == "inputs":
            known.update((name, array) for (name, _, _), array in zip(part["inputs"], arrays, strict=True))
        elif part["type"] == "constants":
            known.update(part["constants"])
        elif part["type"] == "primitive" and part["name"] == "CustomKernel":
            found.append(part)

    mx.export_function(note, build, *arrays)
    (primitive,) = found
    name, text, *sizes, infos, contiguous = primitive["arguments"][:10]
    grid, threadgroup = tuple(sizes[:3]), tuple(sizes[3:])
    outputs = primitive["outputs"]
    instance = re.search(rf"\[\[kernel\]\] decltype\(({name}<.*?>)\) ", text)
    return KernelCall(
        name=re.sub(r"^custom_kernel_", "", name),
        function=instance[1] if instance else name,
        text=text,
        parameters=tuple(_parameters(name, text, infos, len(outputs))),
        inputs=tuple(known[name] for name, _, _ in primitive["inputs"]),
        output_shapes=tuple(shape for _, shape, _ in outputs),
        output_dtypes=tuple(dtype for _, _, dtype in outputs),
        grid=grid,
        threadgroup=threadgroup,
        ensure_row_contiguous=contiguous,
        init_value=init_value,
    )


def _parameters(name: str, text: str, infos: list[tuple[bool, bool, bool]], outputs: int) -> list[Parameter]:
    """Return the parameters of the signature that MLX has generated.

    These are the inputs, each followed by those of its shape, strides and ndim that the kernel uses, then the outputs,
    and then the attributes of the thread.
    """
    roles = []
    for i, info in enumerate(infos):
        roles.append(("input", i))
        roles += [(role, i) for role, wanted in zip(("shape", "strides", "ndim"), info, strict=True) if wanted]
    roles += [("output", i) for i in range(outputs)]
    signature = text[text.index(f"[[kernel]] void {name}(") :]
    signature = signature[: signature.index(") {")]
    declared = re.findall(r"^\s*(.*?)\s*(\w+) \[\[(\w+)(?:\(\d+\))?\]\]", signature, re.MULTILINE)
    result = []
    for number, (kind, variable, attribute) in enumerate(declared):
        if attribute == "buffer":
            role, array = roles[number]
            result.append(Parameter(variable, role, kind, array))
        else:
            result.append(Parameter(variable, "attribute", kind))
    return result
