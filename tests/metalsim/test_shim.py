"""Tests of the Metal headers against NumPy, MLX on the CPU, and loops over the lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.metalsim.run_source import bits, run_source, wide
from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
LANES = 32


def _random(n: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_each_operation_on_half_and_bfloat_rounds_to_nearest_even(dtype: mx.Dtype) -> None:
    pattern = np.random.default_rng(1).integers(0, 1 << 16, (2, 4096)).astype(np.uint16)
    a, b = (mx.array(row).view(dtype) for row in pattern)
    x = mx.array(np.random.default_rng(2).integers(0, 1 << 32, 4096, dtype=np.uint32)).view(mx.float32)
    source = I + "add[i] = a[i] + b[i]; mul[i] = a[i] * b[i]; div[i] = a[i] / b[i];"
    source += "cast[i] = T(x[i]); back[i] = float(a[i]);"
    shape = (4096,)
    names = ["add", "mul", "div", "cast"]
    results = run_source(
        source.replace("T(", "bfloat(" if dtype == mx.bfloat16 else "half("),
        {"a": a, "b": b, "x": x},
        {**dict.fromkeys(names, (shape, dtype)), "back": (shape, mx.float32)},
        grid=(4096, 1, 1),
        orders=1,
    )
    expected = [a + b, a * b, a / b, x.astype(dtype), a.astype(mx.float32)]
    for name, got, want in zip([*names, "back"], results, expected, strict=True):
        nan = np.isnan(wide(want))
        np.testing.assert_array_equal(np.isnan(wide(got)), nan, err_msg=name)
        np.testing.assert_array_equal(bits(got)[~nan], bits(want)[~nan], err_msg=name)


def test_a_sum_of_bfloats_rounds_at_every_step() -> None:
    values = mx.array(_random(64)).astype(mx.bfloat16)
    source = "bfloat s = 0.0bf; for (int j = 0; j < 64; j++) { s += x[j]; } out[0] = s;"
    (got,) = run_source(source, {"x": values}, {"out": ((1,), mx.bfloat16)}, grid=(1, 1, 1))
    total = mx.array(0.0, mx.bfloat16)
    for value in values:
        total = total + value
    assert bits(got)[0] == bits(total)


def test_vectors_have_swizzles_constructors_and_arithmetic() -> None:
    source = """
        float4 v = float4(x[0], float2(x[1], x[2]), x[3]);
        v.xy = v.wz;                        // 3 2 2 3
        v.b += 10.0f;                       // z
        float2 w = v.zx * 2.0f;             // 24 6
        half3 h = half3(float3(v.xyz));
        int4 k = int4(v);
        uchar4 u(1, 2, 3, 4);
        vec<float, 2> t = vec<float, 2>(w.y, w[0]);
        using pair = vec<float, 2>;
        float4 s = float4(pair(0.5f), pair(half2(0.5h)));
        float values[14] = {v.x, v.y, v.z, v.w, w.x, w.y, float(h.z), float(k.z), float(u.a), t.x, t.y, s.w,
                            dot(v, v), float(any(v > 11.0f)) + 2 * float(all(v > 2.0f))};
        for (int j = 0; j < 14; j++) { out[j] = values[j]; }
    """
    (got,) = run_source(source, {"x": mx.arange(8).astype(mx.float32)}, {"out": ((14,), mx.float32)}, grid=(1, 1, 1))
    assert got.tolist() == [3, 2, 12, 3, 24, 6, 12, 12, 4, 6, 24, 0.5, 9 + 4 + 144 + 9, 1]


Function = Callable[[NDArray[np.float64]], NDArray[Any]]
UNARY: dict[str, Function] = {
    "acos(x / 4)": lambda x: np.arccos(x / 4),
    "acosh(1 + x * x)": lambda x: np.arccosh(1 + x * x),
    "asin(x / 4)": lambda x: np.arcsin(x / 4),
    "asinh(x)": np.arcsinh,
    "atan(x)": np.arctan,
    "atanh(x / 4)": lambda x: np.arctanh(x / 4),
    "ceil(x)": np.ceil,
    "cos(x)": np.cos,
    "cosh(x)": np.cosh,
    "cospi(x)": lambda x: np.cos(np.pi * x),
    "exp(x)": np.exp,
    "exp2(x)": np.exp2,
    "exp10(x)": lambda x: 10**x,
    "floor(x)": np.floor,
    "fract(x)": lambda x: x - np.floor(x),
    "log(abs(x))": lambda x: np.log(np.abs(x)),
    "log2(abs(x))": lambda x: np.log2(np.abs(x)),
    "log10(abs(x))": lambda x: np.log10(np.abs(x)),
    "rint(x * 2)": lambda x: np.rint(x * 2),
    "round(x)": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "rsqrt(abs(x))": lambda x: 1 / np.sqrt(np.abs(x)),
    "saturate(x)": lambda x: np.clip(x, 0, 1),
    "sign(x)": np.sign,
    "sin(x)": np.sin,
    "sinh(x)": np.sinh,
    "sinpi(x)": lambda x: np.sin(np.pi * x),
    "sqrt(abs(x))": lambda x: np.sqrt(np.abs(x)),
    "tan(x)": np.tan,
    "tanh(x)": np.tanh,
    "tanpi(x / 8)": lambda x: np.tan(np.pi * x / 8),
    "trunc(x)": np.trunc,
    "atan2(x, 0.3f)": lambda x: np.arctan2(x, np.float32(0.3)),
    "pow(abs(x), 1.5f)": lambda x: np.abs(x) ** 1.5,
    "fmod(x, 0.75f)": lambda x: np.fmod(x, 0.75),
    "copysign(2.0f, x)": lambda x: np.copysign(2, x),
    "fma(x, x, 1.0f)": lambda x: x * x + 1,
    "clamp(x, -1.0f, 0.5f)": lambda x: np.clip(x, -1, 0.5),
    "mix(x, 1.0f, 0.25f)": lambda x: x + (1 - x) * 0.25,
    "smoothstep(-1.0f, 1.0f, x)": lambda x: np.clip((x + 1) / 2, 0, 1) ** 2 * (3 - 2 * np.clip((x + 1) / 2, 0, 1)),
    "step(0.5f, x)": lambda x: np.where(x < 0.5, 0, 1),
    "max3(x, 0.0f, -x)": np.abs,
    "median3(x, 0.0f, 1.0f)": lambda x: np.clip(x, 0, 1),
    "ldexp(x, 3)": lambda x: x * 8,
    "select(x, 1.0f, isnan(x) || x < 0.0f)": lambda x: np.where(x < 0, 1, x),
}


@pytest.mark.parametrize("mode", ["", "precise::", "fast::"])
def test_mathematical_functions_follow_numpy(mode: str) -> None:
    x = np.linspace(-3.9, 3.9, 256, dtype=np.float32)
    calls = [name if mode == "" or name[:3] in ("sel", "isn") else f"metal::{mode}{name}" for name in UNARY]
    source = I + "float x = data[i];\n" + "\n".join(f"out[{n} * 256 + i] = {call};" for n, call in enumerate(calls))
    shape = (len(UNARY), 256)
    (got,) = run_source(source, {"data": mx.array(x)}, {"out": (shape, mx.float32)}, grid=(256, 1, 1), orders=1)
    expected = np.array([function(x.astype(np.float64)) for function in UNARY.values()])
    np.testing.assert_allclose(wide(got), expected, rtol=2e-6, atol=1e-6)


def test_half_vectors_and_bfloat_have_the_functions_too() -> None:
    source = I + "half2 h = half2(x[i], 1.0h); r[i] = exp(h).x;"
    source += "b[i] = metal::exp(y[i]); m[i] = max(y[i], bfloat(0.5f));"
    x = mx.array(_random(32))
    half, brain = x.astype(mx.float16), x.astype(mx.bfloat16)
    outputs = {"r": ((32,), mx.float16), "b": ((32,), mx.bfloat16), "m": ((32,), mx.bfloat16)}
    r, b, m = run_source(source, {"x": half, "y": brain}, outputs)
    np.testing.assert_array_equal(bits(r), np.exp(wide(half)).astype(np.float32).astype(np.float16).view(np.uint16))
    np.testing.assert_allclose(wide(b), np.exp(wide(brain)), rtol=2**-8)
    np.testing.assert_array_equal(wide(m), np.maximum(wide(brain), 0.5))


def test_integer_functions() -> None:
    values = np.random.default_rng(3).integers(0, 1 << 32, 64, dtype=np.uint32)
    values[:3] = [0, 1, 0xFFFFFFFF]
    calls = [
        "popcount(x)",
        "clz(x)",
        "ctz(x)",
        "rotate(x, 5u)",
        "reverse_bits(x)",
        "mulhi(x, 0x9e3779b9u)",
        "extract_bits(x, 3u, 7u)",
        "uint(absdiff(int(x), 5))",
        "addsat(x, 0x80000000u)",
        "uint(as_type<int>(x) >> 31)",
        "as_type<uint>(as_type<float>(x))",
        "uint(abs(int(x >> 1) - 100))",
    ]
    source = I + "uint x = data[i];\n" + "\n".join(f"out[{n} * 64 + i] = {call};" for n, call in enumerate(calls))
    (got,) = run_source(source, {"data": mx.array(values)}, {"out": ((len(calls), 64), mx.uint32)}, grid=(64, 1, 1))

    def brute(x: int) -> list[int]:
        text = f"{x:032b}"
        signed = x - (1 << 32) if x >> 31 else x
        return [
            text.count("1"),
            len(text) - len(text.lstrip("0")),
            len(text) - len(text.rstrip("0")),
            (x << 5 | x >> 27) % (1 << 32),
            int(text[::-1], 2),
            x * 0x9E3779B9 >> 32,
            x >> 3 & 127,
            abs(signed - 5),
            min(x + 0x80000000, 0xFFFFFFFF),
            0xFFFFFFFF if x >> 31 else 0,
            x,
            abs((x >> 1) - 100),
        ]

    np.testing.assert_array_equal(np.array(got).T, [brute(int(x)) for x in values])


def _metal(dtype: mx.Dtype) -> str:
    names = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat", mx.int32: "int", mx.uint8: "uchar"}
    return names[dtype]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8])
@pytest.mark.parametrize("lanes", [32, 20])
def test_reductions_and_scans_of_a_simdgroup(dtype: mx.Dtype, lanes: int) -> None:
    x = mx.array(np.random.default_rng(4).integers(1, 4, lanes)).astype(dtype)
    calls = ["simd_sum(v)", "simd_max(v)", "simd_min(v)", "simd_product(v)", "simd_prefix_inclusive_sum(v)"]
    calls += ["simd_prefix_exclusive_sum(v)", "simd_prefix_inclusive_product(v)", "simd_prefix_exclusive_product(v)"]
    calls += ["simd_and(v)", "simd_or(v)", "simd_xor(v)"] if dtype in (mx.int32, mx.uint8) else []
    source = I + f"{_metal(dtype)} v = x[i];\n"
    source += "\n".join(f"out[{n} * {lanes} + i] = {call};" for n, call in enumerate(calls))
    shape = (len(calls), lanes)
    (got,) = run_source(source, {"x": x}, {"out": (shape, dtype)}, grid=(lanes, 1, 1))
    v = np.array(x.astype(mx.int32)).astype(object)
    totals = [sum(v), max(v), min(v), math.prod(v)]
    scans = [np.cumsum(v), np.cumsum(v) - v, np.cumprod(v), np.cumprod(v) // v]
    bitwise = [np.bitwise_and.reduce(v), np.bitwise_or.reduce(v), np.bitwise_xor.reduce(v)][: len(calls) - 8]
    expected = np.array([[t] * lanes for t in totals] + [list(s) for s in scans] + [[t] * lanes for t in bitwise])
    if dtype in (mx.int32, mx.uint8):
        modulus = 1 << 8 * dtype.size
        np.testing.assert_array_equal(bits(got).astype(object), expected % modulus)
    else:
        with np.errstate(over="ignore"):
            rounded = np.minimum(expected.astype(np.float64), 65536 if dtype == mx.float16 else np.inf)
        np.testing.assert_allclose(np.minimum(wide(got), rounded.max()), rounded, rtol={2: 0.1, 4: 1e-6}[dtype.size])


SHUFFLES: dict[str, Callable[[int], int]] = {
    "simd_shuffle(v, (lane * 7 + 3) % 32)": lambda lane: (lane * 7 + 3) % 32,
    "simd_shuffle_xor(v, 5)": lambda lane: lane ^ 5,
    "simd_shuffle_up(v, 3)": lambda lane: lane - 3 if lane >= 3 else lane,
    "simd_shuffle_down(v, 3)": lambda lane: lane + 3 if lane + 3 < 32 else lane,
    "simd_shuffle_rotate_up(v, 3)": lambda lane: (lane - 3) % 32,
    "simd_shuffle_rotate_down(v, 3)": lambda lane: (lane + 3) % 32,
    "simd_broadcast(v, 9)": lambda lane: 9,
    "simd_broadcast_first(v)": lambda lane: 0,
    "quad_broadcast(v, 2)": lambda lane: lane // 4 * 4 + 2,
    "quad_shuffle_xor(v, 1)": lambda lane: lane ^ 1,
    "quad_shuffle_down(v, 1)": lambda lane: lane + 1 if lane % 4 < 3 else lane,
    "quad_shuffle_up(v, 1)": lambda lane: lane - 1 if lane % 4 else lane,
    "simd_shuffle_and_fill_up(v, T(100 + lane), 2)": lambda lane: lane - 2 if lane >= 2 else 130 + lane,
    "simd_shuffle_and_fill_down(v, T(100 + lane), 2)": lambda lane: lane + 2 if lane < 30 else 100 + lane - 30,
    "simd_shuffle_and_fill_up(v, T(100 + lane), 2, 8)": lambda lane: lane - 2 if lane % 8 >= 2 else 100 + lane + 6,
}


@pytest.mark.parametrize("kind", ["float", "half", "bfloat", "int", "ushort"])
def test_shuffles(kind: str) -> None:
    calls = [call for call in SHUFFLES if kind != "bfloat" or ("quad" not in call and "first" not in call)]
    source = "uint lane = thread_index_in_simdgroup; T v = T(lane);\n"
    source += "\n".join(f"out[{n} * 32 + lane] = float({call});" for n, call in enumerate(calls))
    shape = (len(calls), LANES)
    (got,) = run_source(source.replace("T", kind), {}, {"out": (shape, mx.float32)})
    np.testing.assert_array_equal(np.array(got), [[SHUFFLES[call](lane) for lane in range(LANES)] for call in calls])


def test_shuffles_of_vectors_and_of_64_bits() -> None:
    source = """
        ushort lane = thread_index_in_simdgroup;
        float4 v = simd_shuffle_xor(float4(lane, lane + 1, lane + 2, lane + 3), 1);
        uint64_t w = simd_shuffle(uint64_t(lane) << 40, ushort(31 - lane));
        out[lane] = v.w + float(w >> 40) * 100;
    """
    (got,) = run_source(source, {}, {"out": ((32,), mx.float32)})
    assert got.tolist() == [(lane ^ 1) + 3 + (31 - lane) * 100 for lane in range(LANES)]


def test_votes() -> None:
    source = """
        uint lane = thread_index_in_simdgroup;
        out[lane] = uint(simd_vote::vote_t(simd_ballot(lane % 3 == 0)));
        out[32 + lane] = simd_all(lane < 32) + 2 * simd_any(lane == 5);
        out[32 + lane] += 4 * simd_all(lane > 0) + 8 * simd_any(lane > 40);
        out[64 + lane] = quad_sum(lane) + (simd_is_first() ? 1000 : 0);
    """
    (got,) = run_source(source, {}, {"out": ((3, 32), mx.uint32)})
    assert got[0].tolist() == [sum(1 << lane for lane in range(0, 32, 3))] * LANES
    assert got[1].tolist() == [3] * LANES
    assert got[2].tolist() == [lane // 4 * 16 + 6 + (1000 if lane == 0 else 0) for lane in range(LANES)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
def test_matrices_of_a_simdgroup_multiply(dtype: mx.Dtype, transpose: bool) -> None:
    rng = np.random.default_rng(5)
    a, b = (mx.array(rng.integers(-4, 5, (16, 24)).astype(np.float32)).astype(dtype) for _ in range(2))
    source = f"""
        simdgroup_matrix<{_metal(dtype)}, 8, 8> left, right;
        simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        for (uint k = 0; k < 24; k += 8) {{
            simdgroup_load(left, a + k, 24, ulong2(0, 8));
            simdgroup_load(right, b, 24, ulong2(k, 0), {str(transpose).lower()});
            simdgroup_multiply_accumulate(sum, left, right, sum);
        }}
        threadgroup float tile[64];
        simdgroup_store(sum, tile, 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_float8x8 twice = simdgroup_float8x8(2.0f), doubled, read;
        simdgroup_load(read, (threadgroup const float*)tile, 8, ulong2(0, 0));
        simdgroup_multiply(doubled, twice, read);
        simdgroup_store(doubled, out, 8);
    """
    (got,) = run_source(source, {"a": a, "b": b}, {"out": ((8, 8), mx.float32)})
    left, right = wide(a)[8:16], wide(b)[:8]
    blocks = [right[:, k : k + 8].T if transpose else right[:, k : k + 8] for k in range(0, 24, 8)]
    expected = 2 * (1 + sum(left[:, 8 * n : 8 * n + 8] @ block for n, block in enumerate(blocks)))
    np.testing.assert_array_equal(wide(got), expected)


def test_atomics() -> None:
    source = """
        uint i = thread_position_in_grid.x;
        threadgroup atomic_uint counts[4];
        uint t = thread_position_in_threadgroup.x;
        if (t < 4) { atomic_store_explicit(&counts[t], 0, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&counts[x[i] % 4], 1u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        device atomic_uint* total = (device atomic_uint*)out;
        if (t < 4) {
            uint n = atomic_load_explicit(&counts[t], memory_order_relaxed);
            atomic_fetch_add_explicit(&total[t], n, memory_order_relaxed);
        }
        atomic_fetch_max_explicit(&total[4], x[i], memory_order_relaxed);
        atomic_fetch_xor_explicit(&total[5], x[i], memory_order_relaxed);
        device atomic<float>* sum = (device atomic<float>*)(out + 6);
        atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);
        uint old = atomic_load_explicit(&total[7], memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(&total[7], &old, old * 3 + 1, memory_order_relaxed,
                                                      memory_order_relaxed)) {}
    """
    x = np.random.default_rng(6).integers(0, 1 << 20, 200).astype(np.uint32)
    (got,) = run_source(
        source, {"x": mx.array(x)}, {"out": ((8,), mx.uint32)}, grid=(200, 1, 1), threadgroup=(64, 1, 1), init_value=0
    )
    repeated = 0
    for _ in x:
        repeated = (repeated * 3 + 1) % (1 << 32)
    half_of_them = int(np.float32(100).view(np.uint32))
    expected = [*np.bincount(x % 4), x.max(), np.bitwise_xor.reduce(x), half_of_them, repeated]
    assert got.tolist() == [int(value) for value in expected]
