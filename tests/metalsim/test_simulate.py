"""Tests that launches equal those of MLX (threads, buffers, strides, constants), and of faults in checked runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metalsim.run_source import run_source
from tests.metalsim.simulate import SimulationError, simulated
from tests.metalsim.source import trace
from tests.metalsim.toolchain import available

ONE: dict[str, Any] = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}  # one thread

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]


def test_a_traced_call_has_the_text_and_the_launch_that_mlx_would_make() -> None:
    kernel: Any = mx.fast.metal_kernel(
        name="scale",
        input_names=["x", "few", "by", "plain"],
        output_names=["out", "more"],
        source="out[0] = T(x[0]) * by * plain + few_shape[0] + x_strides[0] + x_ndim + N + thread_index_in_simdgroup;",
        header="// here\n",
        ensure_row_contiguous=False,
    )
    call = trace(
        kernel,
        inputs=[mx.zeros((4, 8)).T, mx.zeros(7), mx.array(2, mx.int32), 0.5],
        template=[("T", mx.bfloat16), ("N", 3)],
        grid=(5, 2, 1),
        threadgroup=(4, 1, 1),
        output_shapes=[(1,), (2, 3)],
        output_dtypes=[mx.float32, mx.bool_],
        init_value=0,
    )
    assert call.text.startswith("// here\ntemplate <typename T, int N>\n[[kernel]] void custom_kernel_scale")
    assert call.function.endswith("<bfloat16_t, 3>")
    assert [(p.role, p.declared, p.name) for p in call.parameters] == [
        ("input", "const device float*", "x"),
        ("strides", "const constant int64_t*", "x_strides"),
        ("ndim", "const constant int&", "x_ndim"),
        ("input", "const constant float*", "few"),
        ("shape", "const constant int*", "few_shape"),
        ("input", "const constant int32_t&", "by"),
        ("input", "const constant float&", "plain"),
        ("output", "device float*", "out"),
        ("output", "device bool*", "more"),
        ("attribute", "uint", "thread_index_in_simdgroup"),
    ]
    assert [value.tolist() for value in call.inputs[2:]] == [2, 0.5]
    assert (call.grid, call.threadgroup) == ((5, 2, 1), (4, 1, 1))
    assert (call.output_shapes, call.output_dtypes) == (((1,), (2, 3)), (mx.float32, mx.bool_))
    assert not call.ensure_row_contiguous


def test_threads_know_their_place_in_a_grid_that_threadgroups_do_not_fill() -> None:
    grid, group = np.array([70, 3, 3]), np.array([32, 2, 2])
    source = """
        uint3 p = thread_position_in_grid;
        uint at = (p.z * 3 + p.y) * 70 + p.x;
        uint values[] = {thread_position_in_threadgroup.x, thread_position_in_threadgroup.y,
                         threadgroup_position_in_grid.x, threadgroup_position_in_grid.z,
                         thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
                         threads_per_threadgroup.x, threads_per_threadgroup.y, threads_per_grid.x,
                         threadgroups_per_grid.y, simdgroups_per_threadgroup, dispatch_threads_per_threadgroup.z,
                         threads_per_simdgroup, grid_size.z, grid_origin.x};
        for (uint j = 0; j < 16; j++) { out[at * 16 + j] = values[j]; }
    """
    shape = (3, 3, 70, 16)
    (got,) = run_source(source, {}, {"out": (shape, mx.uint32)}, grid=(70, 3, 3), threadgroup=(32, 2, 2), orders=1)
    expected = np.zeros(shape, np.uint32)
    for z, y, x in np.ndindex(3, 3, 70):
        place = np.array([x, y, z])
        at, position = place % group, place // group
        size = np.minimum(group, grid - position * group)
        index = int(at[0] + size[0] * (at[1] + size[1] * at[2]))
        expected[z, y, x] = [
            *(at[0], at[1], position[0], position[2], index, index % 32, index // 32),
            *(size[0], size[1], 70, 2, -(-int(size.prod()) // 32), 2, 32, 3, 0),
        ]
    np.testing.assert_array_equal(np.array(got), expected)


STRIDED: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda a: a.T,
    "every other": lambda a: a[:, ::2],
    "backwards": lambda a: a[::-1],
    "a column": lambda a: a[:, 1],
    "broadcast": lambda a: mx.broadcast_to(a[:1], (3, 8)),
    "the middle": lambda a: a[2:4],
}


@pytest.mark.parametrize("view", list(STRIDED))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_inputs_arrive_with_the_strides_that_mlx_gives_them(view: str, dtype: mx.Dtype, contiguous: bool) -> None:
    x = STRIDED[view](mx.arange(48).reshape(6, 8).astype(dtype))
    source = "uint i = thread_position_in_grid.x; out[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];"
    if contiguous:
        source = "uint i = thread_position_in_grid.x; out[i] = x[i];"
    (got,) = run_source(source, {"x": x}, {"out": (x.shape, dtype)}, grid=(x.size, 1, 1), contiguous=contiguous)
    assert mx.array_equal(got, x)


def test_a_slice_starts_where_it_starts_in_its_array() -> None:
    source = "float4 v = ((const device float4*)x)[0]; out[0] = v.w;"
    whole = mx.arange(32).astype(mx.float32)
    (got,) = run_source(source, {"x": whole[4:]}, {"out": ((1,), mx.float32)}, **ONE)
    assert got.item() == 7
    with pytest.raises(SimulationError, match="an address that its type does not allow"):
        run_source(source, {"x": whole[2:]}, {"out": ((1,), mx.float32)}, **ONE)


def test_an_input_that_is_not_contiguous_has_nothing_between_its_elements() -> None:
    x = mx.zeros((8, 8))[:, ::2]
    with pytest.raises(SimulationError, match="between the elements of x"):
        run_source("out[0] = x[1];", {"x": x}, {"out": ((1,), mx.float32)}, grid=(1, 1, 1), contiguous=False)


def test_dtypes_constants_and_numbers_as_inputs() -> None:
    inputs = {
        "flags": mx.array([True, False] * 8),
        "bytes": mx.arange(-8, 8).astype(mx.int8),
        "long_ones": mx.array([1 << 40] * 8, mx.int64),
        "few": mx.array([1.5, 2.5], mx.float16),
        "one": mx.array(3, mx.uint16),
        "real": 0.25,
        "whole": 7,
        "z": mx.array([1 + 2j] * 8),
    }
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = flags[i] + 10 * bytes[i] + float(long_ones[i] >> 38) + few[i % 2] + one + real * whole + z[i].imag;
        big[i] = long_ones[i] + i;
    """
    outputs: dict[str, Any] = {"out": ((8,), mx.float32), "big": ((8,), mx.int64)}
    out, big = run_source(source, inputs, outputs, grid=(8, 1, 1))
    assert out.tolist() == [(i % 2 == 0) + 10 * (i - 8) + 4 + [1.5, 2.5][i % 2] + 3 + 1.75 + 2 for i in range(8)]
    assert big.tolist() == [(1 << 40) + i for i in range(8)]


def test_template_arguments_headers_and_init_value() -> None:
    header = "#include <metal_stdlib>\nusing namespace metal;  // as kernels from elsewhere have it\n"
    header += "template <int N> float power(float v) { float r = 1; for (int i = 0; i < N; i++) { r *= v; } return r; }"
    source = "if (FLIP) { out[2] = T(power<N>(x[2])); }"
    (got,) = run_source(
        source,
        {"x": mx.arange(8).astype(mx.float32)},
        {"out": ((4,), mx.bfloat16)},
        header=header,
        template=[("T", mx.bfloat16), ("N", 3), ("FLIP", True)],
        grid=(1, 1, 1),
        init_value=-1,
    )
    assert got.dtype == mx.bfloat16
    assert got.tolist() == [-1, -1, 8, -1]


def test_a_simulated_kernel_takes_the_same_arguments() -> None:
    kernel: Any = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["y"], source="y[0] = 2 * x;")
    launch: dict[str, Any] = {"grid": (1, 1, 1), "threadgroup": (256, 1, 1), "output_shapes": [()]}
    for fake in (simulated(kernel, check=False), simulated(kernel, orders=2)):
        (got,) = fake(inputs=[mx.array(4.0)], output_dtypes=[mx.float32], stream=mx.cpu, verbose=False, **launch)
        assert got.shape == ()
        assert got.item() == 8


def test_threadgroups_and_their_memory_sum_rows_of_any_length() -> None:
    source = """
        threadgroup float partial[8]; threadgroup float total, spare[2][2];
        uint row = threadgroup_position_in_grid.y, t = thread_position_in_threadgroup.x;
        float sum = 0;
        for (uint j = t; j < N; j += 256) { sum += x[row * N + j]; }
        sum = simd_sum(sum);
        if (thread_index_in_simdgroup == 0) { partial[simdgroup_index_in_threadgroup] = sum; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 0) { total = spare[1][1] = 0; for (uint j = 0; j < 8; j++) { total += partial[j]; } }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 255) { out[row] = total + spare[1][1]; }
    """
    for n in (7, 1000):
        x = mx.random.normal((5, n))
        launch: dict[str, Any] = {"grid": (256, 5, 1), "threadgroup": (256, 1, 1), "template": [("N", n)]}
        for check in (True, False):
            (got,) = run_source(source, {"x": x}, {"out": ((5,), mx.float32)}, check=check, **launch)
            expected = np.array(x, np.float64).sum(axis=1)
            np.testing.assert_allclose(np.array(got), expected, rtol=1e-5, atol=1e-5)


NAMES = """
    uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
    mem_flags none = mem_flags::mem_none, group = mem_flags::mem_threadgroup, device_memory = mem_flags::mem_device;
"""
REFUSED = {
    "threadgroup float b[64]; b[i] = x[i]; out[i] = b[63 - i];": "race: .* b.*nothing orders",
    "threadgroup float b[64]; b[i] = x[i]; simdgroup_barrier(group); out[i] = b[i ^ 32];": "race: .*another SIMD-group",
    "threadgroup float b[64]; b[i] = x[i]; threadgroup_barrier(device_memory); out[i] = b[i ^ 1];": "race: .*reads b",
    "threadgroup float b[64]; if (i > 3) b[i] = 1; out[i] = b[i];": r"reads b\[0\], which nobody has written",
    "threadgroup float b[9000]; b[i] = 1; out[i] = b[i];": "36000 bytes of threadgroup memory",
    "out[i / 2] = x[i];": r"race: .*writes out\[0\], which thread 0 of its SIMD-group wrote",
    "if (i != 5) out[i] = x[i];": r"out\[5\] was never written",
    "out[i] = x[i + 1];": r"reads out of bounds: x\[64\], beyond the end of x",
    "out[i] = x[int(i) - 1];": r"reads out of bounds: x\[-1\], before the start of x",
    "out[i + 1] = x[i];": r"writes out of bounds: out\[64\]",
    "out[i] = x[i + 100000000];": "out of bounds",
    "float a[4]; for (int j = 0; j < 4; j++) a[j] = j; out[i] = a[int(x[i])];": "array index out of bounds",
    "if (i < 40) threadgroup_barrier(none); out[i] = 1;": "threadgroup_barrier that .* never reached",
    "if (i < 32) threadgroup_barrier(none); else threadgroup_barrier(none); out[i] = 1;": "another",
    "float s = 0; if (lane < 4) s = simd_sum(x[i]); out[i] = simd_max(s);": "operation that .* did not reach",
    "if (lane > 20) { out[i] = 0; return; } out[i] = simd_shuffle_down(x[i], 1);": "lane 21 of its SIMD-group",
    "out[i] = simd_shuffle(x[i], ushort(lane + 1));": "lane 32 of its SIMD-group",
    "float2 v = ((const device float2*)(x + 1))[i % 8]; out[i] = v.x;": "an address that its type does not allow",
    "out[i] = 7 / int(x[i]);": "integer division by zero",
    "out[i] = int(x[i] * 1e10f);": "a float that the integer type cannot hold",
    "volatile float a[40000]; a[i] = 1; out[i] = a[i];": "stack overflow",
    "while (x[0] == 0) { out[i] = 1; }": "still running after 1 s",
    "double d = x[i]; out[i] = d;": "does not compile: .*'double'",
    "float s; if (x[0] > 1) s = 2; out[i] = s;": "uninitialized",
    "float4 v = (float4)int4(1); out[i] = v.x;": r"write float4\(x\)",
    "undeclared(x);": "does not compile: use of undeclared identifier",
}


@pytest.mark.parametrize("source", list(REFUSED))
def test_a_checked_run_reports_the_fault_and_its_line(source: str) -> None:
    x = mx.arange(64).astype(mx.float32)
    with pytest.raises(SimulationError, match=REFUSED[source]) as caught:
        run_source(
            NAMES + source, {"x": x}, {"out": ((64,), mx.float32)}, grid=(64, 1, 1), threadgroup=(64, 1, 1), timeout=1
        )
    assert source in str(caught.value) or "never written" in str(caught.value)


def test_two_threadgroups_may_not_write_one_element() -> None:
    with pytest.raises(SimulationError, match=r"race: .*writes out\[0\], which thread 0 of another threadgroup wrote"):
        run_source("out[0] = 1;", {}, {"out": ((1,), mx.float32)}, grid=(2, 1, 1), threadgroup=(1, 1, 1))


def test_more_threads_than_a_threadgroup_has() -> None:
    with pytest.raises(SimulationError, match="1025 threads"):
        run_source("out[0] = 1;", {}, {"out": ((1,), mx.float32)}, threadgroup=(1025, 1, 1))


def test_more_buffers_than_metal_binds() -> None:
    inputs = {f"x{n}": mx.zeros(8) for n in range(16)}
    source = " + ".join(f"{name}[0] + {name}_shape[0]" for name in inputs)
    with pytest.raises(SimulationError, match="33 buffers"):
        run_source(f"out[0] = {source};", inputs, {"out": ((1,), mx.float32)}, **ONE)


@pytest.mark.parametrize("beyond", [1, 948, 1000, 2948, 4096, 100_000, 10_000_000])
def test_an_index_far_out_of_bounds_reaches_no_other_array(beyond: int) -> None:
    """A wrong stride causes this. An access to another array must not count as an access to the right one."""
    with pytest.raises(SimulationError, match=rf"reads out of bounds: w\[{999 + beyond}\], beyond the end of w"):
        run_source(
            f"out[thread_position_in_grid.x] = w[999 + {beyond}] + x[0];", {"w": mx.zeros(1000), "x": mx.zeros(1000)},
            {"out": ((64,), mx.float32)},
        )  # fmt: skip


def test_a_check_that_would_take_too_much_memory_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"too much memory.*check=False"):
        run_source("out[thread_position_in_grid.x] = 1;", {}, {"out": ((256, 262144), mx.float32)})


def test_a_result_that_depends_on_the_order_of_threads_is_a_race() -> None:
    source = """
        device atomic_uint* turn = (device atomic_uint*)out;
        uint mine = atomic_fetch_add_explicit(turn, 1u, memory_order_relaxed);
        out[1 + thread_position_in_grid.x] = mine;
    """
    with pytest.raises(SimulationError, match=r"race: out\[1\] depends on the order of the threads"):
        run_source(source, {}, {"out": ((9,), mx.uint32)}, grid=(8, 1, 1), init_value=0)


def test_a_crash_without_checks_is_reported_too() -> None:
    with pytest.raises(SimulationError, match="out of bounds"):
        run_source("out[0] = x[20];", {"x": mx.zeros(8)}, {"out": ((1,), mx.float32)}, grid=(1, 1, 1), check=False)


def test_mlx_itself_refuses_a_call_with_too_few_inputs() -> None:
    kernel: Any = mx.fast.metal_kernel(name="k", input_names=["x", "y"], output_names=["out"], source="out[0] = x[0];")
    with pytest.raises(ValueError, match="inputs"):
        trace(kernel, inputs=[mx.zeros(8)], output_shapes=[()], output_dtypes=[mx.float32], **ONE)
