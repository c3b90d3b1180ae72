"""All that a denoising step wants to know of its vocabulary logits, in one pass over them.

For a row of V logits x: z = softcap * tanh(x / softcap) / temperature, p = softmax(z). Wanted are the entropy of p, the
argmax, a categorical sample, and the list of tokens that carry nearly all of p, for sparse self-conditioning.

Why the sample is an inverse CDF (the first index whose cumulative probability exceeds one uniform number a row) and not
argmax(z + Gumbel noise), counted for each of the V values of a row: noise is half a 20-round threefry block (about 50
integer operations) and two logarithms, more than the tanh and the exp of all the rest; in plain operations it is also
written and read again several times, 4 bytes each. The sums that the inverse CDF needs are there for the normaliser
already: it draws one number a row and reads 1,024 values (kernel) or four times 32 (reference) once more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.kernels._common import SIMD, scalar
from dgemma_mlx.kernels.canvas_sampler_source import CHUNKS, HEADER, MERGE
from dgemma_mlx.kernels.dispatch import DispatchedOperation

MAX_KEPT = 512  # tokens in a row's list
KEPT_NATS = 10.0  # a token is kept if its log-probability is within this of the largest


class CanvasSample(NamedTuple):
    """Of logits (..., V). A row of +inf, NaN or nothing but -inf has no softmax: entropy NaN, nothing kept, sample 0.

    Kept is a token with p >= e^-KEPT_NATS of the largest p. A row that has more than ``MAX_KEPT`` of them says
    MAX_KEPT + 1, and lists the first; what it keeps may then be little.
    """

    entropy: mx.array
    """(...) float32, nats"""
    argmax: mx.array
    """(...) int32; the lowest index wins ties"""
    sample: mx.array
    """(...) int32"""
    kept_count: mx.array
    """(...) int32, 0 to MAX_KEPT + 1"""
    kept_ids: mx.array
    """(..., MAX_KEPT) int32, ascending; 0 from the count on"""
    kept_weights: mx.array
    """(..., MAX_KEPT) float32: their p, of the full softmax; 0 from the count on"""
    kept_mass: mx.array
    """(...) float32: the sum of the weights"""


_CHUNK = 1024  # values of a SIMD group
_GROUPS = 8  # SIMD groups of a threadgroup, where there are as many chunks
_HEADER = f"constant constexpr float KEPT_NATS = {KEPT_NATS}f;\n" + HEADER

_chunks_kernel: Any = mx.fast.metal_kernel(
    name="canvas_sampler_chunks",
    input_names=["logits", "softcap", "inverse_temperature"],
    output_names=["tops", "firsts", "sums", "dots"],
    source=CHUNKS,
    header=_HEADER,
)
_merge_kernel: Any = mx.fast.metal_kernel(
    name="canvas_sampler_merge",
    input_names=["logits", "uniforms", "softcap", "inverse_temperature", "tops", "firsts", "sums", "dots"],
    output_names=list(CanvasSample._fields),
    source=MERGE,
    header=_HEADER,
)


def canvas_sampler_kernel(
    logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float
) -> CanvasSample:
    """Logits (..., V) in any floating dtype, read once and in some chunks once or twice more; two launches."""
    shape, V = logits.shape[:-1], logits.shape[-1]
    N, K = uniforms.size, -(-V // _CHUNK)
    threads = SIMD * min(_GROUPS, K)
    constants = [scalar(1.0 if softcap is None else softcap), scalar(1 / temperature)]
    template = [("T", logits.dtype), ("V", V), ("K", K), ("CHUNK", _CHUNK), ("CAPPED", softcap is not None)]
    chunks = _chunks_kernel(
        inputs=[logits, *constants],
        template=[*template, ("READS", 16 // logits.itemsize)],
        grid=(SIMD * K, N, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(N, K)] * 4,
        output_dtypes=[mx.float32, mx.int32, mx.float32, mx.float32],
    )
    return CanvasSample(*_merge_kernel(
        inputs=[logits, uniforms, *constants, *chunks],
        template=[*template, ("MAX_KEPT", MAX_KEPT), ("THREADS", threads)],
        grid=(threads, N, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape, shape, shape, shape, (*shape, MAX_KEPT), (*shape, MAX_KEPT), shape],
        output_dtypes=[mx.float32, mx.int32, mx.int32, mx.int32, mx.int32, mx.float32, mx.float32],
    ))


_CPU_BLOCK = 1 << 20  # values that the reference goes through at a time: they stay in a processor's cache
_GPU_BLOCK = 1 << 24  # fewer launches
_FAN = 32


def canvas_sampler_reference(
    logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float
) -> CanvasSample:
    """In plain operations, some rows after the other."""
    shape, V = logits.shape[:-1], logits.shape[-1]
    rows, targets = logits.reshape(-1, V), uniforms.reshape(-1, 1)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    step = max(1, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // V)
    blocks: list[CanvasSample] = []
    for i in range(0, len(rows), step):
        block = rows[i : i + step]
        if blocks:  # else MLX might take all blocks through one operation, then all through the next
            [block] = mx.depends([block], list(blocks[-1]))
        blocks.append(_sample(block, targets[i : i + step], softcap, temperature))
    parts = (mx.concatenate(list(part)) for part in zip(*blocks, strict=True))
    return CanvasSample(*(part.reshape(*shape, *part.shape[1:]) for part in parts))


def _sample(logits: mx.array, uniforms: mx.array, softcap: float | None, temperature: float) -> CanvasSample:
    """Logits (N, V), uniforms (N, 1)."""
    y = logits.astype(mx.float32)
    if softcap is not None:
        y = softcap * mx.tanh(y * (1 / softcap))
    argmax = mx.argmax(y, axis=-1, keepdims=True)
    z = (y - mx.take_along_axis(y, argmax, axis=-1)) * (1 / temperature)
    least = mx.array(-87.0)  # e^-87 is about the smallest float32; from there down e is 0, and not slow or 0 * -inf
    z = mx.maximum(z, least)
    e = mx.power(math.e, z) - mx.power(math.e, least)  # on x86 less than half the time of mx.exp, and as accurate
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
    """(N, V) -> (N, ., F), filled up with zeros."""
    N, V = leaves.shape
    if V % _FAN:
        leaves = mx.pad(leaves, [(0, 0), (0, -V % _FAN)])
    return leaves.reshape(N, -1, _FAN)


def _tree(leaves: mx.array) -> list[mx.array]:
    """Sums of leaves (N, V), coarse to fine: (N, 1, <= F), (N, ., F) ...; each value is the sum of F in the next."""
    if leaves.shape[1] <= _FAN:
        return [leaves[:, None]]
    level = _groups(leaves)
    return [*_tree(level.sum(axis=-1)), level]


def _first_above(tree: list[mx.array], target: mx.array) -> mx.array:
    """The first leaf up to which the sum exceeds target (N, 1); where rounding leaves none, the last that is not 0."""
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
    """The indices of the first ``MAX_KEPT`` that are marked, (N, V) bool -> (N, MAX_KEPT); V where there is none."""
    N, V = marked.shape
    index = mx.arange(V)
    if V > 2 * MAX_KEPT * _FAN:  # they are in the first MAX_KEPT groups in which something is marked
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


def _example(dtype: mx.Dtype) -> tuple[mx.array, mx.array, float, float]:
    """A canvas of the published model: rows from flat, with too many tokens to list, to certain."""
    keys = mx.random.split(mx.random.key(0), 3)
    peaks = mx.random.randint(0, 262_144, (256, 1), key=keys[0])
    logits = 3 * mx.random.normal((256, 262_144), key=keys[1])
    logits = mx.put_along_axis(logits, peaks, mx.linspace(0, 40, 256)[:, None], axis=-1)
    return logits.astype(dtype), mx.random.uniform(shape=(256,), key=keys[2]), 30.0, 0.6


def _agree(found: CanvasSample, expected: CanvasSample) -> bool:
    """In a few rows rounding may decide the sample, or whether a token is just in the list."""
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
    examples=[_example], source=_HEADER + CHUNKS + MERGE, agree=_agree,
)
