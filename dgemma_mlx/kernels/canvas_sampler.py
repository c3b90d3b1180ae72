"""The statistics and the sample that a denoising step needs from its vocabulary logits.

For a row of V logits x, let z = (softcap * tanh(x / softcap) + bias) / temperature and p = softmax(z). The operation
computes the entropy of p, the argmax, a categorical sample, and the list of tokens that carry nearly all of p, which
serves sparse self-conditioning.

The sample is drawn by inverting the CDF: it is the first index whose cumulative probability exceeds a uniform random
number. The alternative, argmax(z + Gumbel noise), is slower. For each of the V values of a row, the noise takes half of
a 20-round threefry block (about 50 integer operations) and two logarithms, which is more than the tanh and the exp of
everything else. In plain operations the noise is also written and read several times, 4 bytes each. The inverse CDF
needs one random number per row and the partial sums that the softmax computes anyway. It reads 1,024 values (kernel) or
four times 32 values (reference) again.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.kernels._common import SIMD, scalar
from dgemma_mlx.kernels.canvas_sampler_source import CHUNKS, HEADER, MERGE
from dgemma_mlx.kernels.dispatch import DispatchedOperation

MAX_KEPT = 512  # length of a row's token list
KEPT_NATS = 10.0  # a token is kept if its log-probability is at most this far below the largest one of the row


class CanvasSample(NamedTuple):
    """The statistics, the sample and the probable tokens of each row of logits (..., V).

    A token is kept if p is at least e^-KEPT_NATS times the row's largest p. If more than ``MAX_KEPT`` tokens of a row
    qualify, the list holds the ``MAX_KEPT`` of them with the lowest ids, which may carry little of the probability.

    A row that contains NaN or +inf, or only -inf, has no softmax. Its entropy is NaN, its sample 0, and its list empty.

    Attributes:
        entropy: Entropy of p in nats, (...) float32.
        argmax: Id of the largest logit, (...) int32. The lowest id wins ties.
        sample: Id drawn from p, (...) int32.
        kept_count: Number of kept tokens, (...) int32; ``MAX_KEPT + 1`` if more than ``MAX_KEPT`` qualify.
        kept_ids: Ids of the kept tokens, ascending, (..., MAX_KEPT) int32; 0 after the last one.
        kept_weights: Probabilities p of the kept tokens, (..., MAX_KEPT) float32; 0 after the last one.
        kept_mass: Sum of ``kept_weights`` of a row, (...) float32.
    """

    entropy: mx.array
    argmax: mx.array
    sample: mx.array
    kept_count: mx.array
    kept_ids: mx.array
    kept_weights: mx.array
    kept_mass: mx.array


class LogitBias(NamedTuple):
    """A bias on logits (..., V), added after the softcap and before the temperature; -inf bars an id.

    Attributes:
        table: The different biases, (R, V) float32.
        rows: The row of ``table`` that each row of logits gets, (...) int32.
    """

    table: mx.array
    rows: mx.array


_CHUNK = 1024  # values that one SIMD group processes
_GROUPS = 8  # most SIMD groups in a threadgroup
_HEADER = f"constant constexpr float KEPT_NATS = {KEPT_NATS}f;\n" + HEADER

_chunks_kernel: Any = mx.fast.metal_kernel(
    name="canvas_sampler_chunks",
    input_names=["logits", "bias", "bias_rows", "softcap", "inverse_temperature"],
    output_names=["tops", "firsts", "sums", "dots"],
    source=CHUNKS,
    header=_HEADER,
)
_merge_kernel: Any = mx.fast.metal_kernel(
    name="canvas_sampler_merge",
    input_names=[
        "logits", "bias", "bias_rows", "softcap", "inverse_temperature", "uniforms", "tops", "firsts", "sums", "dots",
    ],
    output_names=list(CanvasSample._fields),
    source=MERGE,
    header=_HEADER,
)


@cache
def _no_bias() -> LogitBias:
    """Return the arrays that a kernel without a bias receives and does not read."""
    return LogitBias(mx.array([0.0]), mx.array([0]))


def canvas_sampler_kernel(
    logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float, bias: LogitBias | None = None
) -> CanvasSample:
    """Compute ``canvas_sampler_reference`` in two launches, with the same shapes and dtypes.

    The first launch computes the sums of each chunk of 1,024 logits. The second one merges the chunks of a row, and
    reads again the chunk with the sample and the chunks with kept tokens.
    """
    shape, V = logits.shape[:-1], logits.shape[-1]
    N, K = uniforms.size, -(-V // _CHUNK)
    threads = SIMD * min(_GROUPS, K)
    inputs = [logits, *(bias or _no_bias()), scalar(1.0 if softcap is None else softcap), scalar(1 / temperature)]
    template = [
        ("T", logits.dtype), ("V", V), ("K", K), ("CHUNK", _CHUNK), ("CAPPED", softcap is not None),
        ("BIASED", bias is not None),
    ]  # fmt: skip
    chunks = _chunks_kernel(
        inputs=inputs,
        template=[*template, ("READS", 16 // logits.itemsize)],
        grid=(SIMD * K, N, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(N, K)] * 4,
        output_dtypes=[mx.float32, mx.int32, mx.float32, mx.float32],
    )
    return CanvasSample(*_merge_kernel(
        inputs=[*inputs, uniforms, *chunks],
        template=[*template, ("MAX_KEPT", MAX_KEPT), ("THREADS", threads)],
        grid=(threads, N, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, shape, shape, shape, (*shape, MAX_KEPT), (*shape, MAX_KEPT), shape],
        output_dtypes=[mx.float32, mx.int32, mx.int32, mx.int32, mx.int32, mx.float32, mx.float32],
    ))


_CPU_BLOCK = 1 << 20  # values that the reference processes at a time on a CPU, so that they stay in its cache
_GPU_BLOCK = 1 << 24  # the same on a GPU, where larger blocks need fewer launches
_FAN = 32  # values that are summed into one value of the next coarser level of a tree


def canvas_sampler_reference(
    logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float, bias: LogitBias | None = None
) -> CanvasSample:
    """Compute the statistics, a sample and the probable tokens of each row of logits, as a ``CanvasSample``.

    All arithmetic is float32. The sample is the first index whose cumulative probability exceeds the row's uniform
    number. The rows are processed in blocks, one after the other, which bounds the memory.

    Args:
        logits: Raw logits in any floating-point dtype, (..., V).
        uniforms: A random number from 0 to 1 for each row, (...) float32.
        softcap: Bound c of the softcap c * tanh(x / c); None leaves the logits as they are.
        temperature: Divisor of the logits after the softcap and with the bias; above 0.
        bias: Bias on the logits, or None.
    """
    shape, V = logits.shape[:-1], logits.shape[-1]
    rows, targets = logits.reshape(-1, V), uniforms.reshape(-1, 1)
    bias_rows = None if bias is None else bias.rows.flatten()
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    step = max(1, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // V)
    blocks: list[CanvasSample] = []
    for i in range(0, len(rows), step):
        block = rows[i : i + step]
        if blocks:  # otherwise MLX might run one operation for all blocks before the next operation
            [block] = mx.depends([block], list(blocks[-1]))
        some = None if bias is None or bias_rows is None else bias.table[bias_rows[i : i + step]]
        blocks.append(_sample(block, targets[i : i + step], softcap, temperature, some))
    parts = (mx.concatenate(list(part)) for part in zip(*blocks, strict=True))
    return CanvasSample(*(part.reshape(*shape, *part.shape[1:]) for part in parts))


def _sample(
    logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float, bias: mx.array | None
) -> CanvasSample:
    """Compute the ``CanvasSample`` of logits (N, V) with uniforms (N, 1) and a bias (N, V) or None."""
    y = logits.astype(mx.float32)
    if softcap is not None:
        y = softcap * mx.tanh(y * (1 / softcap))
    if bias is not None:
        y = y + bias
    argmax = mx.argmax(y, axis=-1, keepdims=True)
    z = (y - mx.take_along_axis(y, argmax, axis=-1)) * (1 / temperature)
    # e^-87 is about the smallest normal float32. Below it e becomes 0, which avoids slow denormals and 0 * -inf.
    least = mx.array(-87.0)
    z = mx.maximum(z, least)
    e = mx.power(math.e, z) - mx.power(math.e, least)  # as accurate as mx.exp, in less than half the time on x86
    mass, dot = _tree(e), _tree(e * z)
    total = mass[0].sum(axis=-1)  # (N, 1)
    valid = total > 0
    entropy = mx.log(total) - dot[0].sum(axis=-1) / total
    sample = mx.where(valid, _first_above(mass, uniforms * total), 0)

    near = z >= -KEPT_NATS
    count = mx.where(valid, near.sum(axis=-1, keepdims=True), 0)
    listed = mx.arange(MAX_KEPT) < count  # (N, MAX_KEPT)
    ids = mx.where(listed, _first_of(near), 0)
    weights = mx.where(listed, mx.take_along_axis(e, ids, axis=-1) / total, 0)
    return CanvasSample(
        entropy[:, 0], argmax[:, 0].astype(mx.int32), sample[:, 0],
        mx.minimum(count, MAX_KEPT + 1)[:, 0], ids, weights, weights.sum(axis=-1),
    )


def _groups(leaves: mx.array) -> mx.array:
    """Reshape (N, V) to (N, ceil(V / F), F) with F = ``_FAN``, padded with zeros."""
    N, V = leaves.shape
    if V % _FAN:
        leaves = mx.pad(leaves, [(0, 0), (0, -V % _FAN)])
    return leaves.reshape(N, -1, _FAN)


def _tree(leaves: mx.array) -> list[mx.array]:
    """Return partial sums of leaves (N, V) as levels from coarse to fine, with F = ``_FAN``.

    The first level is (N, 1, at most F), the others (N, groups, F). Each value is the sum of a group of the next level,
    and the last level holds the leaves.
    """
    if leaves.shape[1] <= _FAN:
        return [leaves[:, None]]
    level = _groups(leaves)
    return [*_tree(level.sum(axis=-1)), level]


def _first_above(tree: list[mx.array], target: mx.array) -> mx.array:
    """Return the index (N, 1) of the first leaf at which the cumulative sum exceeds ``target`` (N, 1).

    If rounding leaves no such leaf, return the last leaf that is not 0.
    """
    index = mx.zeros(target.shape, mx.int32)
    for level in tree:
        part = mx.take_along_axis(level, index[..., None], axis=1)[:, 0]  # (N, F)
        F = part.shape[-1]
        order = mx.arange(F)
        cumulative = mx.cumsum(part, axis=-1)
        preference = mx.where(cumulative > target, 2 * F - order, order)
        pick = mx.argmax(mx.where(part > 0, preference, -1), axis=-1, keepdims=True)
        target = target - mx.take_along_axis(cumulative - part, pick, axis=-1)
        index = index * F + pick.astype(mx.int32)
    return index


def _first_of(marked: mx.array) -> mx.array:
    """Return the indices (N, MAX_KEPT) of the first true values in each row of ``marked`` (N, V) bool, ascending.

    After a row's last true value, the result is V.
    """
    N, V = marked.shape
    index = mx.arange(V)
    if V > 2 * MAX_KEPT * _FAN:  # for speed, search only the first MAX_KEPT groups that contain a true value
        groups = _groups(marked)
        G = groups.shape[1]
        first = _first_of(groups.sum(axis=-1) > 0)[..., None]  # (N, MAX_KEPT, 1)
        marked = mx.take_along_axis(groups, mx.minimum(first, G - 1), axis=1) & (first < G)
        marked, index = marked.reshape(N, -1), (first * _FAN + mx.arange(_FAN)).reshape(N, -1)
    index = mx.where(marked, index, V)
    if index.shape[1] > MAX_KEPT:
        index = mx.partition(index, MAX_KEPT - 1, axis=-1)[:, :MAX_KEPT]
    index = mx.sort(index, axis=-1)
    return mx.pad(index, [(0, 0), (0, MAX_KEPT - index.shape[1])], constant_values=V)


_EXAMPLE_ROWS = 10  # of 256 in a canvas: the reference has float32 arrays of 1 MB per row, and one row may differ


def _example(dtype: mx.Dtype, biased: bool) -> tuple[Any, ...]:
    """Return arguments with the vocabulary of the published model.

    The rows range from a flat distribution, with too many tokens to list, to a certain token. ``biased`` bars half of
    the tokens in every second row.
    """
    N, V = _EXAMPLE_ROWS, 262_144
    keys = mx.random.split(mx.random.key(0), 3)
    peaks = mx.random.randint(0, V, (N, 1), key=keys[0])
    logits = 3 * mx.random.normal((N, V), key=keys[1])
    logits = mx.put_along_axis(logits, peaks, mx.linspace(0, 40, N)[:, None], axis=-1)
    barred = mx.array([0, -mx.inf])[mx.arange(V) % 2]
    bias = LogitBias(mx.stack([mx.zeros(V), barred]), mx.arange(N) % 2) if biased else None
    return logits.astype(dtype), mx.random.uniform(shape=(N,), key=keys[2]), 30.0, 0.6, bias


def _agree(found: CanvasSample, expected: CanvasSample) -> bool:
    """Return whether a kernel's result agrees with the reference's.

    In up to a tenth of the rows the integers may differ, because rounding may decide the sample or whether a token near
    the limit is kept.
    """
    same = mx.stack([(f == e).reshape(len(f), -1).all(axis=-1) for f, e in zip(found[1:5], expected[1:5], strict=True)])
    rows = same.all(axis=0)
    close = mx.stack([
        mx.abs(found.entropy - expected.entropy) <= 1e-3,
        mx.abs(found.kept_mass - expected.kept_mass) <= 1e-3,
        (mx.abs(found.kept_weights - expected.kept_weights) <= 1e-5).all(axis=-1) | ~rows,
    ])
    return bool((close.all() & (rows.mean() >= 0.9)).item())


canvas_sampler = DispatchedOperation(
    "canvas_sampler", canvas_sampler_kernel, canvas_sampler_reference,
    examples=[partial(_example, biased=False), partial(_example, biased=True)], source=_HEADER + CHUNKS + MERGE,
    agree=_agree,
)
