"""Translation of a kernel from Metal to C++ for OpenCL.

The two languages differ in few places, which are replaced without changing the line numbers. The translation also adds
the function that a launch calls.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import mlx

from tests.metalsim.source import KernelCall, Parameter
from tests.metalsim.toolchain import KERNEL_FILE

SHIM = Path(__file__).parent / "shim"

_SCALAR = r"(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)"
_VECTOR = rf"(?:(?:metal::)?(?:(?:packed_)?{_SCALAR}[234]|vec\s*<[^<>;(){{}}]*(?:<[^<>]*>)?[^<>;(){{}}]*>))"


class TransformError(Exception):
    """The source is not valid Metal, or the simulator does not support it.

    Attributes:
        line: Line of the kernel's text.
    """

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@cache
def preamble() -> str:
    """Return the text that precedes every kernel: the shim, and the file ``utils.h`` of the MLX package."""
    include = Path(mlx.__path__[0]) / "include"
    utils = '#include "mlx/backend/metal/kernels/utils.h"\n'
    seen: set[Path] = set()
    shim = _expand('#include "msl.h"\n', [SHIM], seen)
    return shim + '\n#line 1 "utils.h"\n' + _translate(_expand(utils, [SHIM, include], seen))[0]


def _expand(text: str, folders: list[Path], seen: set[Path]) -> str:
    """Replace every ``#include`` by the content of the file, and by nothing if the file is already included.

    Metal's own headers are also replaced by nothing, because the shim replaces all of them.
    """

    def included(match: re.Match[str]) -> str:
        if match[1].startswith("metal_"):
            return ""
        path = next(folder / match[1] for folder in folders if (folder / match[1]).is_file())
        if path in seen:
            return ""
        seen.add(path)
        return _expand(path.read_text(), folders, seen)

    return re.sub(r'^#include [<"]([^>"]+)[>"]', included, text.replace("#pragma once", ""), flags=re.MULTILINE)


def without_comments(text: str) -> str:
    """Replace the comments of a text by spaces. Lines and columns do not change."""
    return re.sub(
        r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/',
        lambda match: match[1] or re.sub(r"[^\n]", " ", match[0]),
        text,
        flags=re.DOTALL,
    )


def translate(call: KernelCall) -> tuple[str, list[str]]:
    """Translate a kernel to the text that Clang compiles after the preamble.

    Returns the text and the names of the threadgroup variables.

    Raises:
        TransformError: A threadgroup variable is outside the kernel function, or a cast would have another meaning.
    """
    body = re.sub(r"template \[\[host_name\(.*|#\s*include <metal_\w+>", "", without_comments(call.text))
    start = body.index(f"[[kernel]] void {call.function.split('<')[0]}(")
    text, slots = _translate(body, start)
    return f'#line 1 "{KERNEL_FILE}"\n{text}\n{_entry(call)}', slots


def _translate(text: str, kernel_start: int | None = None) -> tuple[str, list[str]]:
    text = without_comments(text)
    text, slots = _threadgroup_variables(text, kernel_start)
    _refuse_vector_casts(text)
    text = _vector_constructors(text)
    # Remove the address space of constructors, because Clang has no temporaries in one.
    text = re.sub(r"\)\s*thread(\s*(?::(?!:)|\{))", r")\1", text)
    text = re.sub(r"\b(?:const\s+thread|thread\s+const)\s+([\w:<>, ]+?)\s*&(?!&)", r"const \1&", text)
    return _float_literals(text), slots


def _float_literals(text: str) -> str:
    """Write ``0.1`` as ``0.1f`` and ``0.1bf`` as a bfloat.

    In Metal, 0.1 is a float. Clang would make it a double in a template.
    """
    decimal = r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+"
    hexadecimal = r"0[xX][\da-fA-F]*\.?[\da-fA-F]*[pP][+-]?\d+"
    text = re.sub(rf"(?<![\w.])({hexadecimal}|{decimal})(?![\w.])", r"\1f", text)
    return re.sub(rf"(?<![\w.])({decimal})bf\b", r"bfloat(\1f)", text)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _threadgroup_variables(text: str, kernel_start: int | None) -> tuple[str, list[str]]:
    """Replace each ``threadgroup T x[N];`` by a reference to memory of the runtime, and return the variables' names.

    C++ for OpenCL does not allow such variables in templates.
    """
    slots: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        if kernel_start is None or match.start() < kernel_start:
            message = "a threadgroup variable outside the kernel function: Metal allows it only there"
            raise TransformError(message, _line(text, match.start("type")))
        result = match[1]
        for declarator in re.split(r",(?![^\[\]()<>{}]*[\])>}])", match["names"]):
            parts = re.fullmatch(r"\s*(\w+)\s*((?:\[[^\]]*\]\s*)*)(=.*)?\s*", declarator, re.DOTALL)
            if parts is None:
                message = f"not understood: threadgroup {declarator.strip()}"
                raise TransformError(message, _line(text, match.start("type")))
            name, number = parts[1], len(slots)
            slots.append(name)
            kind = f"msl_slot_{number}"
            made = f"msl_threadgroup_slot({number}, sizeof({kind}), alignof({kind}), sizeof({match['type']}))"
            result += (
                f"typedef {match['type']} {kind}{parts[2]}; "
                f"threadgroup {kind}& {name} = *(threadgroup {kind}*)ulong({made});"
            )
        return result + "\n" * match[0].count("\n", len(match[1]))

    type_name = r"(?:const\s+)?(?:volatile\s+)?(?:unsigned\s+)?[\w:]+(?:\s*<[^;(){}]*>)?"
    names = r"\w+\s*(?:\[[^;{}]*|=[^;]*|,[^;(){}*&]*)?"
    pattern = rf"((?<=[;{{}}\n])\s*)threadgroup\s+(?P<type>{type_name})\s+(?P<names>{names});"
    return re.sub(pattern, replaced, text), slots


def _vector_constructors(text: str) -> str:
    """Replace ``float4(a, b)`` by ``metal::msl_make<float4>(a, b)``, also for aliases of vector types."""
    aliases = re.findall(rf"\busing\s+(\w+)\s*=\s*{_VECTOR}\s*;", text)
    aliases += re.findall(rf"\btypedef\s+{_VECTOR}\s+(\w+)\s*;", text)
    names = "|".join([_VECTOR, *map(re.escape, aliases)])
    text = re.sub(rf"\bstatic_cast\s*<\s*({names})\s*>\s*\(", r"metal::msl_make<\1>(", text)
    text = re.sub(rf"\b({names})\s+(\w+)\s*\(([^;{{}}]*)\)\s*;", _declaration, text)
    not_a_pointer = r"(?!\s*[*&]\s*\w+\s*\)\s*[\[(])"
    return re.sub(rf"(?<![\w<:])(?<!operator )({names})\s*\({not_a_pointer}", r"metal::msl_make<\1>(", text)


def _declaration(match: re.Match[str]) -> str:
    """Replace ``float2 v(a, b);`` by an initialization from ``msl_make``, unless it declares a function."""
    if re.match(rf"\s*(?:const|thread|device|constant|threadgroup|{_SCALAR}[234]?)\s+\w+", match[3]):
        return match[0]
    return f"{match[1]} {match[2]} = metal::msl_make<{match[1]}>({match[3]});"


def _refuse_vector_casts(text: str) -> None:
    """Raise ``TransformError`` for a C-style cast to a vector, which converts in Metal but not in Clang."""
    for match in re.finditer(rf"(?<!sizeof)(?<![\w>])\s*\(\s*({_VECTOR})\s*\)\s*[\w(]", text):
        message = f"write {match[1]}(x) for ({match[1]})x: Clang would take the bits where Metal converts"
        raise TransformError(message, _line(text, match.start(1)))


_ATTRIBUTES = {
    "dispatch_simdgroups_per_threadgroup": "t->dispatch_simdgroups",
    "dispatch_quadgroups_per_threadgroup": "(t->dispatch_simdgroups * 8)",
    "dispatch_threads_per_threadgroup": "t->dispatch_group_size",
    "grid_origin": "t->grid_origin",
    "grid_size": "t->grid_size",
    "quadgroup_index_in_threadgroup": "(t->index_in_group / 4)",
    "quadgroups_per_threadgroup": "(t->simdgroups * 8)",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "(t->lane % 4)",
    "thread_index_in_simdgroup": "t->lane",
    "thread_index_in_threadgroup": "t->index_in_group",
    "thread_position_in_grid": "t->position_in_grid",
    "thread_position_in_threadgroup": "t->position_in_group",
    "threadgroup_position_in_grid": "t->group_position",
    "threadgroups_per_grid": "t->groups",
    "threads_per_grid": "t->grid_size",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "t->group_size",
}


def _argument(parameter: Parameter, number: int) -> str:
    if parameter.role != "attribute":
        kind = parameter.declared.rstrip("&* ")
        pointer = f"({kind}*)ulong(b[{number}])"
        return f"*{pointer}" if parameter.declared.endswith("&") else pointer
    value = _ATTRIBUTES[parameter.name]
    return f"uint3({value}[0], {value}[1], {value}[2])" if parameter.declared == "uint3" else value


def _entry(call: KernelCall) -> str:
    arguments = ", ".join(_argument(parameter, number) for number, parameter in enumerate(call.parameters))
    return (
        '#line 1 "entry"\n'
        'extern "C" __attribute__((visibility("default"))) '
        "void msl_entry(thread void* const thread* b, const thread msl_thread* t) {\n"
        f"  {call.function}({_vector_constructors(arguments)});\n}}\n"
    )
