"""Measurement of the CPU time of simulations, in seconds: ``python -m tests.metalsim.measure``."""

from __future__ import annotations

import resource
from typing import Any

import mlx.core as mx

from tests.metalsim.simulate import simulate

THREADS = 1024
SUM = """
    threadgroup float part[32];
    uint t = thread_index_in_threadgroup;
    auto row = x + size_t(threadgroup_position_in_grid.x) * WIDTH;
    float sum = 0;
    for (uint i = t; i < WIDTH; i += 1024) {
        sum += row[i];
    }
    sum = simd_sum(sum);
    if (t % 32 == 0) {
        part[t / 32] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = simd_sum(part[t % 32]);
    for (uint i = t; i < WIDTH; i += 1024) {
        out[threadgroup_position_in_grid.x * WIDTH + i] = row[i] / sum;
    }
"""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children: compilers, and the process of the kernel."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(rows: int, width: int, **options: Any) -> float:
    """Return the CPU time of one simulation over ``rows`` rows of ``width`` values."""
    kernel: Any = mx.fast.metal_kernel(name="shares", input_names=["x"], output_names=["out"], source=SUM)
    x = mx.random.uniform(shape=(rows, width))
    mx.eval(x)
    began = cpu_seconds()
    simulate(
        kernel, inputs=[x], template=[("WIDTH", width)], grid=(rows * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape], output_dtypes=[mx.float32], **options,
    )
    return cpu_seconds() - began


def main() -> None:
    print("rows x width      checked   unchecked")
    for rows, width in ((1, 1000), (16, 32768), (128, 32768)):
        times = []
        for options in ({}, {"check": False}):
            measure(1, width, **options)  # compile first
            times.append(measure(rows, width, **options))
        print(f"{rows:4} x {width:7}  {times[0]:9.2f}  {times[1]:9.2f}")


if __name__ == "__main__":
    main()
