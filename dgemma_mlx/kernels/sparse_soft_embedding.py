"""The expected embedding of a short list of tokens: the sum of p[i] * table[ids[i]] over the list.

The lists are those of ``canvas_sampler``. Over all V tokens, the sum would be a matrix product as large as the
vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.kernels.dispatch import DispatchedOperation
from dgemma_mlx.kernels.operation import DTYPES

# One thread per word, that is, per WORD values of a row of the table. A list with more tokens than its S places is
# incomplete, and its sum is 0.
_HEADER = """
inline int complete(int count, int places) {
    return count > places ? 0 : count;
}
"""

_DENSE = """
    int column = thread_position_in_grid.x * WORD;
    size_t row = thread_position_in_grid.y;
    int n = complete(counts[row], S);
    float sum[WORD] = {0.0f};
    for (int i = 0; i < n; i++) {
        float p = weights[row * S + i];
        auto e = table + size_t(ids[row * S + i]) * M + column;
        for (int j = 0; j < WORD; j++) {
            sum[j] += M % WORD == 0 || column + j < M ? p * static_cast<float>(e[j]) : 0.0f;
        }
    }
    for (int j = 0; j < WORD && column + j < M; j++) {
        soft[row * M + column + j] = sum[j];
    }
"""

# A value is scale * q + bias with one scale and one bias per GROUP_SIZE values, or scale * q where q and the scale are
# small floats. The values of a row form one string of bits, the first in the lowest bits of the first word. A thread
# reads the WORDS words that hold VALUES whole values.
_PACKED_HEADER = """
constant constexpr int AFFINE = 0;  // q is an integer; scale and bias have the dtype of the model
constant constexpr int MX = 1;      // q is a small float, and the scale a power of two (E8M0)
constant constexpr int NV = 2;      // q is a small float, and the scale is E4M3

// A float with a sign, then 2 bits of exponent and 1 of mantissa (E2M1, 4 bits), or 4 and 3 (E4M3, 8 bits).
template <int BITS>
inline float small_float(uint q) {
    constexpr int SHIFT = BITS == 8 ? 7 : 9;  // moves exponent and mantissa to those of a half
    constexpr float BIAS = BITS == 8 ? 256.0f : 16384.0f;  // 2^(15 - 7) and 2^(15 - 1)
    constexpr uint SIGN = 1u << (BITS - 1);
    float value = static_cast<float>(as_type<half>(ushort((q & (SIGN - 1)) << SHIFT))) * BIAS;
    return q & SIGN ? -value : value;
}

inline float power_of_two(uint e) {
    return as_type<float>(e == 0 ? 0x00400000u : e << 23);  // 2^(e - 127)
}
""" + _HEADER

_PACKED = """
    constexpr int WORDS = BITS % 2 == 1 ? BITS : BITS == 6 ? 3 : 1;
    constexpr int VALUES = 32 * WORDS / BITS;
    constexpr int ROW = M / VALUES * WORDS;
    constexpr int GROUPS = M / GROUP_SIZE;
    int part = thread_position_in_grid.x;
    size_t row = thread_position_in_grid.y;
    int group = part * VALUES / GROUP_SIZE;
    int n = complete(counts[row], S);
    float sum[VALUES] = {0.0f};
    float offset = 0.0f;
    for (int i = 0; i < n; i++) {
        float p = weights[row * S + i];
        size_t id = ids[row * S + i];
        uint words[WORDS];
        for (int w = 0; w < WORDS; w++) {
            words[w] = packed[id * ROW + part * WORDS + w];
        }
        float s = static_cast<float>(scales[id * GROUPS + group]);
        float scale = p * (KIND == AFFINE ? s : KIND == MX ? power_of_two(uint(s)) : small_float<8>(uint(s)));
        offset += KIND == AFFINE ? p * static_cast<float>(biases[id * GROUPS + group]) : 0.0f;
        for (int j = 0; j < VALUES; j++) {
            int w = BITS * j / 32;
            int shift = BITS * j % 32;
            uint q = words[w] >> shift;
            if (shift + BITS > 32) {
                q |= words[metal::min(w + 1, WORDS - 1)] << (32 - shift);  // the rest of it is in the next word
            }
            q &= (1u << BITS) - 1;
            sum[j] += scale * (KIND == AFFINE ? static_cast<float>(q) : small_float<BITS>(q));
        }
    }
    for (int j = 0; j < VALUES; j++) {
        soft[row * M + part * VALUES + j] = sum[j] + offset;
    }
"""

_dense_kernel: Any = mx.fast.metal_kernel(
    name="sparse_soft_embedding",
    input_names=["table", "ids", "weights", "counts"],
    output_names=["soft"],
    source=_DENSE,
    header=_HEADER,
)
_packed_kernel: Any = mx.fast.metal_kernel(
    name="sparse_soft_embedding_packed",
    input_names=["packed", "scales", "biases", "ids", "weights", "counts"],
    output_names=["soft"],
    source=_PACKED,
    header=_PACKED_HEADER,
)
_KINDS = {"affine": 0, "mxfp4": 1, "mxfp8": 1, "nvfp4": 2}  # the constant KIND of each quantization mode
_WORD = 4  # values per thread for a plain table
_THREADS = 128  # most threads in a threadgroup


def dense_soft_embedding_kernel(table: mx.array, ids: mx.array, weights: mx.array, counts: mx.array) -> mx.array:
    """Compute ``dense_soft_embedding_reference`` in one launch, with the same shapes and dtypes."""
    (N, S), M = ids.shape, table.shape[1]
    soft: mx.array = _dense_kernel(
        inputs=[table, ids, weights, counts],
        template=[("M", M), ("S", S), ("WORD", _WORD)],
        grid=(-(-M // _WORD), N, 1),
        threadgroup=(min(_THREADS, -(-M // _WORD)), 1, 1),
        output_shapes=[(N, M)],
        output_dtypes=[mx.float32],
    )[0]
    return soft


def dense_soft_embedding_reference(table: mx.array, ids: mx.array, weights: mx.array, counts: mx.array) -> mx.array:
    """Compute ``sparse_soft_embedding`` with a plain table and return (N, M) float32.

    Args:
        table: Embedding table, (V, M), in any floating-point dtype.
        ids: Token ids of each list, (N, S) int32.
        weights: Weights of these tokens, (N, S) float32.
        counts: Number of tokens in each list, (N,) int32. A list with more than S is incomplete, and its result is 0.
    """
    return _sum_of_rows(lambda some: table[some], ids, weights, counts)


def packed_soft_embedding_kernel(
    packed: mx.array, scales: mx.array, biases: mx.array | None, ids: mx.array, weights: mx.array, counts: mx.array,
    group_size: int, bits: int, mode: str = "affine",
) -> mx.array:
    """Compute ``packed_soft_embedding_reference`` in one launch, with the same shapes and dtypes.

    The packing must be one of those of ``packed_soft_embedding``.
    """
    (N, S), words = ids.shape, packed.shape[1]
    M = words * 32 // bits
    threads = words // (bits if bits % 2 else 3 if bits == 6 else 1)  # a thread reads words that hold whole values
    soft: mx.array = _packed_kernel(
        inputs=[packed, scales, scales if biases is None else biases, ids, weights, counts],
        template=[("M", M), ("S", S), ("BITS", bits), ("GROUP_SIZE", group_size), ("KIND", _KINDS[mode])],
        grid=(threads, N, 1),
        threadgroup=(min(_THREADS, threads), 1, 1),
        output_shapes=[(N, M)],
        output_dtypes=[mx.float32],
    )[0]
    return soft


def packed_soft_embedding_reference(
    packed: mx.array, scales: mx.array, biases: mx.array | None, ids: mx.array, weights: mx.array, counts: mx.array,
    group_size: int, bits: int, mode: str = "affine",
) -> mx.array:
    """Compute ``sparse_soft_embedding`` with a packed table in any MLX quantization mode and return (N, M) float32.

    Args:
        packed: Packed embedding table, (V, M * bits / 32) uint32.
        scales: Scales, (V, M / group_size).
        biases: Offsets, (V, M / group_size), in affine mode; None in the other modes.
        ids: Token ids of each list, (N, S) int32.
        weights: Weights of these tokens, (N, S) float32.
        counts: Number of tokens in each list, (N,) int32. A list with more than S is incomplete, and its result is 0.
        group_size: Number of values that share a scale.
        bits: Bits per value.
        mode: MLX quantization mode.
    """

    def rows(some: mx.array) -> mx.array:
        if biases is None:
            return mx.dequantize(packed[some], scales[some], None, group_size, bits, mode)
        scale, bias = (part[some].astype(mx.float32) for part in (scales, biases))  # keeps MLX from rounding each value
        return mx.dequantize(packed[some], scale, bias, group_size, bits, mode)

    return _sum_of_rows(rows, ids, weights, counts)


_PLACES = 8  # places of each list that are processed at once: 23 MB of embeddings for 256 lists of the published model


def _sum_of_rows(
    rows: Callable[[mx.array], mx.array], ids: mx.array, weights: mx.array, counts: mx.array
) -> mx.array:
    """Return the weighted sums (N, M) float32 of the table's rows that ``rows`` returns for an array of ids.

    The loop ends after the longest list, so ``counts`` is evaluated here.
    """
    counts = mx.where(counts > ids.shape[1], 0, counts)
    weights = mx.where(mx.arange(ids.shape[1]) < counts[:, None], weights, 0)
    soft = mx.array(0.0)
    longest: Any = counts.max().item()
    for i in range(0, max(1, longest), _PLACES):
        some = ids[:, i : i + _PLACES]
        if i:  # otherwise MLX might fetch the rows of all places first
            [some] = mx.depends([some], [soft])
        part = rows(some).astype(mx.float32)  # (N, PLACES, M)
        soft = soft + (weights[:, None, i : i + _PLACES] @ part)[:, 0]
    return soft


# Sizes in the examples, which keep their memory small: the published model has V = 262,144 and a canvas 256 lists. The
# time depends on the number of rows that are read.
_EXAMPLE_VOCAB_SIZE = 1024
_EXAMPLE_LISTS = 24


def _example_lists() -> tuple[mx.array, mx.array, mx.array]:
    """Return ids, weights and counts of random lists with up to 64 tokens in 512 places."""
    keys = mx.random.split(mx.random.key(0), 3)
    shape = (_EXAMPLE_LISTS, 512)
    counts = mx.random.randint(0, 65, shape[:1], key=keys[0])
    weights = mx.random.uniform(0, 1 / 32, shape, key=keys[1])
    return mx.random.randint(0, _EXAMPLE_VOCAB_SIZE, shape, key=keys[2]), weights, counts


def _example_table(dtype: mx.Dtype) -> mx.array:
    """Return a plain table of the published model's hidden size."""
    return mx.random.normal((_EXAMPLE_VOCAB_SIZE, 2816), dtype, key=mx.random.key(1))


def _dense_example(dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Return arguments with a plain table."""
    return (_example_table(dtype), *_example_lists())


def _packed_example(dtype: mx.Dtype, group_size: int, bits: int, mode: str) -> tuple[Any, ...]:
    """Return arguments with a packed table. Its rows are repeated, because packing takes memory."""
    table = _example_table(dtype)[: _EXAMPLE_VOCAB_SIZE // 16]
    packed, scales, *biases = (mx.tile(part, (16, 1)) for part in mx.quantize(table, group_size, bits, mode))
    return packed, scales, biases[0] if biases else None, *_example_lists(), group_size, bits, mode


def _packed_operation(group_size: int, bits: int, mode: str) -> DispatchedOperation[..., mx.array]:
    """Return the operation for tables of one packing. ``group_size`` is that of the example."""
    return DispatchedOperation(
        f"sparse_soft_embedding_{f'{bits}bit' if mode == 'affine' else mode}",
        packed_soft_embedding_kernel, packed_soft_embedding_reference,
        examples=[partial(_packed_example, group_size=group_size, bits=bits, mode=mode)],
        source=_PACKED_HEADER + _PACKED,
        dtypes=DTYPES if mode == "affine" else (mx.float32,),  # the other modes have scales of one byte
    )  # fmt: skip


dense_soft_embedding = DispatchedOperation(
    "sparse_soft_embedding", dense_soft_embedding_kernel, dense_soft_embedding_reference,
    examples=[_dense_example], source=_HEADER + _DENSE,
)
packed_soft_embedding = {  # by mode and bits per value
    **{("affine", bits): _packed_operation(64, bits, "affine") for bits in (1, 2, 3, 4, 5, 6, 8)},
    ("mxfp4", 4): _packed_operation(32, 4, "mxfp4"),
    ("mxfp8", 8): _packed_operation(32, 8, "mxfp8"),
    ("nvfp4", 4): _packed_operation(16, 4, "nvfp4"),
}


def sparse_soft_embedding(
    table: nn.Embedding | nn.QuantizedEmbedding, ids: mx.array, weights: mx.array, counts: mx.array
) -> mx.array:
    """Return the sum of weights[..., i] * table[ids[..., i]] over i < counts[...], (..., M) float32.

    A list whose count is larger than S is incomplete, and its result is 0. There are kernels for plain tables and for
    every packing of MLX 0.32; other packings would use the reference.

    Args:
        table: Embedding table with V rows of M values.
        ids: Token ids of each list, (..., S) int32.
        weights: Weights of these tokens, (..., S) float32.
        counts: Number of tokens in each list, (...) int32.
    """
    lists = (ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1]), counts.reshape(-1))
    if not isinstance(table, nn.QuantizedEmbedding):
        soft = dense_soft_embedding(table.weight, *lists)
    else:
        run = packed_soft_embedding.get((table.mode, table.bits), packed_soft_embedding_reference)
        soft = run(table.weight, table.scales, table.get("biases"), *lists, table.group_size, table.bits, table.mode)
    return soft.reshape(*counts.shape, soft.shape[-1])
