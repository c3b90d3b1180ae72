"""Tests with faults that are planted one at a time into correct kernels. Each report must name the fault and its line.

The correct kernels are not reported, so that a report is about the planted fault.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from tests.metalsim.published import believe_in_metal, load, normal
from tests.metalsim.simulate import SimulationError, simulate
from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]

NAMES = """
    uint i = thread_position_in_grid.x;
    uint t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
"""
# Two threadgroups of 64 threads: x and out have 128 elements.
REVERSE = """
    threadgroup float buf[64];
    buf[t] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = buf[63 - t];
"""
TWICE = """
    threadgroup float part[2];
    float v = simd_sum(x[i]);
    if (lane == 0) {
        part[t / 32] = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = part[0] + part[1];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // part is used again
    if (lane == 0) {
        part[t / 32] = 2 * v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = sum + part[0] + part[1];
"""
NEIGHBOURS = """
    out[i] = x[i];
    threadgroup_barrier(mem_flags::mem_device);
    float other = out[i ^ 1];
    threadgroup_barrier(mem_flags::mem_device);
    out[i] = other;
"""
LOCAL = """
    float a[4];
    for (int j = 0; j < 4; j++) {
        a[j] = x[i] * j;
    }
    out[i] = a[i % 4];
"""
BUTTERFLY = """
    float v = x[i];
    for (ushort m = 16; m > 0; m /= 2) {
        v += simd_shuffle_xor(v, m);
    }
    out[i] = v;
"""
COUNT = """
    threadgroup atomic_uint counts[4];
    if (t < 4) {
        atomic_store_explicit(&counts[t], 0, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&counts[i % 4], 1, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = atomic_load_explicit(&counts[i % 4], memory_order_relaxed);
"""
HELPERS = """
struct Scale {
    float factor;
    float times(float v) const device { return factor * v; }
};
constant float weights[2] = {2.0f, 3.0f};
inline float twice(const device float* p) { return 2 * *p; }
inline float square(const thread float& v) { return v * v; }
inline float down(float v, int n) { return n == 0 ? v : v - 1; }
"""
HELPED = """
    float w = weights[1];
    float v = twice(x + i) + square(w) + down(1.0f, int(i % 2));
    bfloat narrow = static_cast<bfloat>(v);
    auto scale = (const device Scale*)(x + i);
    float4 wide = float4(v, 1.0f, v, 2.0f);
    if (all(wide == v)) {
        v = 0;
    }
    v += 7 / int(i + 1);
    out[i] = scale->times(v) + narrow;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ADD = "atomic_fetch_add_explicit(&counts[i % 4], 1, memory_order_relaxed)"
NOT_ATOMIC = "((threadgroup uint*)counts)[i % 4] += 1"


class Fault(NamedTuple):
    """A fault that is planted by replacing a part of a correct source.

    Attributes:
        source: The correct source.
        right: The part to replace.
        wrong: The replacement, which is the fault.
        report: Regular expression that the report matches.
        where: Text in the line that the report shows; by default ``wrong``.
    """

    source: str
    right: str
    wrong: str
    report: str
    where: str = ""


READ = "out[i] = buf[63 - t]"
RACE = "race: .* buf"

FAULTS = {
    # threadgroup memory and barriers
    "no barrier": Fault(REVERSE, BARRIER, "", RACE, "buf["),
    "memory used again too early": Fault(TWICE, f"{BARRIER}  // part is used again", "", "race: .* part", "part["),
    "atomics read too early": Fault(COUNT, f"{BARRIER}\n    out", "out", "depends on the order", "race"),
    "a barrier for other memory": Fault(REVERSE, "mem_threadgroup", "mem_device", RACE, "buf["),
    "one of a SIMD-group": Fault(REVERSE, "threadgroup_barrier", "simdgroup_barrier", RACE, "buf["),
    "64 lanes in a SIMD-group": Fault(REVERSE, BARRIER, "simd_sum(1.0f);", RACE, "buf["),
    "a barrier in a branch": Fault(REVERSE, READ, f"if (t < 32) {BARRIER} {READ}", "waits at a threadgroup_barrier"),
    "a return before a barrier": Fault(REVERSE, BARRIER, f"if (t == 40) return; {BARRIER}", "never reached"),
    "not all of it written": Fault(REVERSE, "buf[t] =", "if (t != 5) buf[t] =", "buf.5.*nobody has written", READ),
    "read beyond threadgroup": Fault(REVERSE, "63 - t", "64 - t", "array index out of bounds"),
    "read before threadgroup": Fault(REVERSE, "63 - t", "62 - int(t)", "array index out of bounds"),
    "write beyond threadgroup": Fault(REVERSE, "buf[t]", "buf[t + 1]", "array index out of bounds"),
    "by a pointer": Fault(REVERSE, "buf[t]", "(&buf[t])[1]", "writes out of bounds.*beyond the end of buf"),
    "over 32 KB": Fault(REVERSE, "float buf[64]", "float buf[8193]", "32772 bytes of threadgroup memory"),
    "no atomics": Fault(COUNT, ADD, NOT_ATOMIC, "race: .*counts"),
    # buffers
    "read beyond a buffer": Fault(REVERSE, "x[i]", "x[i + 1]", r"reads out of bounds: x\[128\]"),
    "read before a buffer": Fault(REVERSE, "x[i]", "x[int(i) - 1]", r"reads out of bounds: x\[-1\]"),
    "write beyond a buffer": Fault(LOCAL, "out[i]", "out[2 * i + 2]", r"writes out of bounds: out\[128\]"),
    "an element never written": Fault(LOCAL, "out[i]", "if (i != 7) out[i]", r"out\[7\] was never written", "planted"),
    "two threadgroups write": Fault(LOCAL, "out[i]", "out[t]", r"race: .*writes out\[0\].*another threadgroup"),
    "two threads write": Fault(LOCAL, "out[i] =", "out[i / 2 * 2] = i % 2 ? 0 :", "race: .*writes out"),
    "no barrier for the device": Fault(NEIGHBOURS, "mem_device", "mem_threadgroup", "race: .* out", "out[i"),
    # a thread's own memory
    "a loop too far": Fault(LOCAL, "j < 4", "j <= 4", "array index out of bounds", "a[j]"),
    "a vector between": Fault(LOCAL, "= a[i % 4]", "= ((const device float4*)(x + 1))[0].x", "address that its type"),
    "an index too far": Fault(LOCAL, "i % 4", "i % 5", "array index out of bounds"),
    "division by zero": Fault(HELPED, "7 / int(i + 1)", "7 / int(i)", "division by zero"),
    # SIMD-groups
    "a mask too wide": Fault(BUTTERFLY, "m = 16", "m = 32", "lane (3[2-9]|[4-6][0-9]) ", "simd_shuffle_xor"),
    "no such lane": Fault(BUTTERFLY, "simd_shuffle_xor(v, m)", "simd_shuffle(v, lane + m)", "lane 3[2-9] "),
    # faults that Metal's compiler would refuse
    "double": Fault(LOCAL, "float a[4]", "double a[4]", "double"),
    "one memory for another": Fault(REVERSE, "x[i]", "*(threadgroup const float*)&(x[i])", "address space"),
    "a write to an input": Fault(REVERSE, "out[i] =", "x[i] = out[i] =", "read-only"),
    "recursion": Fault(HELPED, "v - 1;", "down(v, n - 1);", "recursion: down"),
    "device is missing": Fault(HELPED, "const device float* p", "const float* p", "pointer without .*: p"),
    "thread is missing": Fault(HELPED, "const thread float& v", "const float& v", "reference without .*: v"),
    "a pointer without": Fault(LOCAL, "out[i] =", "float* p = a; out[i] = p[0] +", "pointer without .*: p"),
    "a global": Fault(HELPED, "constant float weights", "float weights", "weights is global or static"),
    "a static": Fault(LOCAL, "float a[4]", "static float a[4]", "a is global or static"),
    "goto": Fault(LOCAL, "out[i] =", "goto end; end: out[i] =", "goto"),
    "a lambda": Fault(LOCAL, "a[i % 4]", "[](float v) { return v; }(a[i % 4])", "lambda"),
    "bfloat without a cast": Fault(HELPED, "static_cast<bfloat>(v)", "v", "float becomes bfloat", "bfloat narrow = v"),
    "a method elsewhere": Fault(HELPED, "const device { return", "const { return", "method .* device", "times(v)"),
    "a kept comparison": Fault(HELPED, "if (all(wide == v))", "int4 e = wide == v; if (e.x)", "comparing vectors"),
    "threadgroup elsewhere": Fault(HELPED, "{ return 2", "{ threadgroup int b; return 2", "variable outside"),
}


def kernel(source: str, header: str = HELPERS) -> Any:
    source = NAMES + source
    return mx.fast.metal_kernel(name="planted", input_names=["x"], output_names=["out"], header=header, source=source)


def run(made: Any, grid: int = 128, threadgroup: int = 64, **options: Any) -> mx.array:
    x = mx.arange(1, grid + 1).astype(mx.float32)
    return simulate(
        made, inputs=[x], grid=(grid, 1, 1), threadgroup=(threadgroup, 1, 1), output_shapes=[(grid,)],
        output_dtypes=[mx.float32], **options,
    )[0]


@pytest.mark.parametrize("source", [REVERSE, TWICE, NEIGHBOURS, LOCAL, BUTTERFLY, COUNT, HELPED])
def test_a_correct_kernel_is_not_reported(source: str) -> None:
    assert np.isfinite(np.array(run(kernel(source)))).all()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    source, right, wrong, report, where = FAULTS[name]
    assert right in HELPERS + source
    made = kernel(source.replace(right, wrong), HELPERS.replace(right, wrong))
    with pytest.raises(SimulationError, match=report) as error:
        run(made)
    assert (where or wrong) in str(error.value).splitlines()[-1]


def test_more_threads_than_a_threadgroup_has() -> None:
    assert run(kernel(LOCAL), 1024, 1024).shape == (1024,)
    with pytest.raises(SimulationError, match="1025"):
        run(kernel(LOCAL), 1025, 1025)


def test_an_endless_loop_is_reported() -> None:
    spin = COUNT + "while (atomic_load_explicit(&counts[0], memory_order_relaxed) != 0) {}"
    with pytest.raises(SimulationError, match="still running"):
        run(kernel(spin), timeout=2)


def call(module: str, edit: Any = str) -> list[mx.array]:
    """Run a published kernel with a shape that leaves some of its threads without work."""
    loaded = load(module, edit)
    x, weight = normal(2, 1000), normal(1000, seed=1)
    match module.rpartition(".")[2]:
        case "expert_routing":
            factors = {"multiplier": 1.0, "score_eps": 0.0, "route_scale": 1.0}
            return list(loaded.expert_routing(normal(3, 100), normal(100), top_k=4, **factors))
        case "norm_add_norm":
            weights = dict.fromkeys(("alpha", "beta", "post_weight"), weight)
            return list(loaded.norm_add_norm(x, x, **weights, post_eps=1e-5, next_norm=nn.RMSNorm(1000)))
        case "post_expert_norm_combine":
            return [loaded.post_expert_norm_combine(normal(2, 3, 1000), normal(2, 3), norm_weight=weight, eps=1e-5)]
        case "qk_norm":
            return list(loaded.qk_norm(normal(3, 480), n_heads=2, n_kv_heads=1, head_dim=80, eps=1e-5, query_scale=1.0))
        case "rms_norm_sigmoid_gate":
            return [loaded.rms_norm_sigmoid_gate(normal(1, 2, 3, 100), normal(1, 3, 200), eps=1e-5)]
        case "gated_delta":
            q, state = normal(1, 2, 1, 32), normal(1, 1, 32, 32)
            return list(loaded.gated_delta_kernel_xtree(q, q, q, normal(1, 2, 1), normal(1, 2, 1), state))
        case _:
            blocks = loaded.ResidualBlocks(1e-6)
            blocks.append(x)
            with pytest.MonkeyPatch.context() as patch:
                believe_in_metal(patch)
                return [loaded._attn_res_mix(blocks, x, weight, 1e-6)]


KERNELS, MODELS = "mlx_lm.kernels.", "mlx_lm.models."
BARRIERS = [
    (KERNELS + "norm_add_norm", 0), (KERNELS + "post_expert_norm_combine", 0),
    (MODELS + "kimi_k3", 0), (MODELS + "kimi_k3", 1),
]


@pytest.mark.parametrize(("module", "number"), BARRIERS)
def test_each_barrier_of_the_published_kernels_is_needed(module: str, number: int) -> None:
    """Without any one of the barriers there is a race. With all barriers, no fault is reported."""
    call(module)
    texts = []

    def drop(text: str) -> str:
        parts = text.split(BARRIER)
        texts.extend(parts[1:])
        return BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :])

    with pytest.raises(SimulationError, match="race: "):
        call(module, drop)
    assert texts


@pytest.mark.parametrize(
    ("module", "right", "wrong", "report"),
    [
        (KERNELS + "expert_routing", "e < E", "e <= E", "reads out of bounds.*bias"),
        (KERNELS + "norm_add_norm", "d < D", "d <= D", "out of bounds|race"),
        (KERNELS + "post_expert_norm_combine", "d < D ?", "d <= D ?", "reads out of bounds"),
        (KERNELS + "qk_norm", "if (d < D)", "if (d <= D)", "out of bounds|race"),
        (KERNELS + "qk_norm", "} else {", "} else if (n > 0) {", r"k\[0\] was never written"),
        (KERNELS + "rms_norm_sigmoid_gate", "if (d < D)", "if (d <= D)", "out of bounds|race"),
        (KERNELS + "rms_norm_sigmoid_gate", "grid.x / 32", "grid.x / 64", "race|never written"),
        (MODELS + "kimi_k3", "d < D", "d <= D", "reads out of bounds"),
        (MODELS + "kimi_k3", "THREADS / 32", "THREADS / 64", "out of bounds|race"),
        (MODELS + "kimi_k3", "NACC * NSIMD]", "NACC * NSIMD - 1]", "out of bounds"),
        (MODELS + "gated_delta", "simd_shuffle_xor(out, 16)", "simd_shuffle_xor(out, 32)", "lane 32 "),
    ],
)
def test_a_fault_in_a_published_kernel_is_reported(module: str, right: str, wrong: str, report: str) -> None:
    changed = []

    def plant(text: str) -> str:
        changed.append(right in text)
        return text.replace(right, wrong)

    with pytest.raises(SimulationError, match=report):
        call(module, plant)
    assert any(changed)
