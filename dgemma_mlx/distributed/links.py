"""How fast the links between the machines are, and whether a cut model gains by them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.distributed.collective import Collective

_RUNS = 5
_LARGE = 16 << 20  # bytes of a large sum


@dataclass(frozen=True)
class StepTraffic:
    """What a denoising step of one canvas puts into the collective operations.

    Attributes:
        messages: Number of operations.
        nbytes: Bytes of the arrays that one machine puts in.
    """

    messages: int
    nbytes: int


def step_traffic(config: TextConfig, canvas_length: int, itemsize: int) -> StepTraffic:
    """Return the traffic of a step. ``itemsize`` is the number of bytes of an activation.

    Each layer sums the attention's output (C, M), and the dense branch's together with the experts' (2, C, M). Two sums
    (C, M) serve self-conditioning, and two operations the statistics of the vocabulary: 1 and 6 values a position.
    """
    row = config.hidden_size * itemsize
    sums, facts = 3 * config.num_hidden_layers + 2, 7 * 4
    return StepTraffic(2 * config.num_hidden_layers + 4, canvas_length * (sums * row + facts))


def measured_link(collective: Collective, config: TextConfig, canvas_length: int, dtype: mx.Dtype) -> float:
    """Return the seconds that the sums of one step take, without any other work: the best of several runs.

    All machines must call this at the same time.
    """
    one = mx.zeros((canvas_length, config.hidden_size), dtype)
    two = mx.zeros((2, canvas_length, config.hidden_size), dtype)
    mx.eval(one, two)

    def step() -> None:
        x = one
        for _ in range(config.num_hidden_layers):
            x = collective.sum(x)
            x = collective.sum(mx.depends([two], [x])[0])[0]
        mx.eval(collective.sum(collective.sum(x)))

    step()  # the first one opens what is opened lazily
    return min(_seconds(step) for _ in range(_RUNS))


@dataclass(frozen=True)
class Sums:
    """What single sums over the machines take, measured.

    Attributes:
        latency: Seconds of a sum of one number.
        bandwidth: Bytes of a large array that are summed in a second.
    """

    latency: float
    bandwidth: float


def measured_sums(collective: Collective) -> Sums:
    """Measure a small and a large sum. All machines must call this at the same time."""
    small, large = mx.zeros(1), mx.zeros(_LARGE // 4)
    mx.eval(small, large)

    def seconds(array: mx.array, runs: int) -> float:
        mx.eval(collective.sum(array))
        return statistics.median(_seconds(lambda: mx.eval(collective.sum(array))) for _ in range(runs))

    return Sums(seconds(small, 7 * _RUNS), large.nbytes / seconds(large, _RUNS))


def step_flops(config: TextConfig, canvas_length: int) -> int:
    """Return the floating-point operations of the matrix products of a step, without attention scores."""
    M, C = config.hidden_size, canvas_length
    experts = config.top_k_experts * 3 * M * config.moe_intermediate_size
    dense = 3 * M * config.intermediate_size
    attention = sum(
        M * config.layer_head_dim(kind) * (2 * config.num_attention_heads + 2 * config.kv_heads(kind))
        for kind in config.layer_types
    )
    return 2 * C * (config.num_hidden_layers * (experts + dense) + attention + config.vocab_size * M + dense)


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second, measured by a sum and by a matrix product.

    Attributes:
        bandwidth: Bytes that it reads.
        flops: Floating-point operations in the dtype of the activations.
    """

    bandwidth: float
    flops: float


def measured_speed(dtype: mx.Dtype) -> Speed:
    """Measure this machine for about a tenth of a second."""
    size = 4096 if mx.metal.is_available() else 512  # on a GPU, long beside the time of a launch
    values = mx.zeros(1 << 25)
    matrix = mx.zeros((size, size), dtype)
    mx.eval(values, values.sum(), matrix @ matrix)
    reading = min(_seconds(lambda: mx.eval(values.sum())) for _ in range(_RUNS))
    product = min(_seconds(lambda: mx.eval(matrix @ matrix)) for _ in range(_RUNS))
    return Speed(values.nbytes / reading, 2 * size**3 / product)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Expectation:
    """What a step is expected to take, in seconds; a prediction.

    Attributes:
        alone: On the fastest machine, with the whole model.
        cut: On all machines, with the links.
        link: The part of ``cut`` that the links take, measured.
    """

    alone: float
    cut: float
    link: float

    @property
    def gains(self) -> bool:
        """Whether the cut model is expected to be faster than the whole one."""
        return self.cut < self.alone


def expectation(
    weight_bytes: int, flops: float, speeds: Sequence[Speed], shares: Sequence[float], link: float
) -> Expectation:
    """Predict a step: it reads all weights and computes, whichever takes longer, and then waits for the links.

    ``speeds`` and ``shares`` are those of the machines; each has its share of the bytes and of the operations. What is
    not divided (norms, routers, the graph) and what overlaps is left out.
    """
    def seconds(speed: Speed, part: float) -> float:
        return part * max(weight_bytes / speed.bandwidth, flops / speed.flops)

    parts = [share / sum(shares) for share in shares]
    slowest = max(seconds(speed, part) for speed, part in zip(speeds, parts, strict=True))
    return Expectation(min(seconds(speed, 1) for speed in speeds), slowest + link, link)
