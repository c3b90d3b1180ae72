"""The step from the projections to attention: the norms of q, k and v, the rotary embedding, and the layout.

Each head's D values are normed in float32 and rounded, then rotated in float32 and rounded again. Every row has its own
position instead of an offset for all rows, so that one call serves a batch with left padding. The reference passes each
row to ``mx.fast.rope`` as a batch row of its own, which costs no more threads or bytes than an offset does.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.kernels._common import SIMD, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation

QKV = tuple[mx.array, mx.array, mx.array]
_THREADS = 8 * SIMD

# A threadgroup processes one position. It computes the position's angles once. Each SIMD group processes some heads.
_SOURCE = """
    constexpr int PAIRS = D / 2;
    constexpr int N = (PAIRS + 31) / 32;  // neighbouring pairs per lane
    constexpr int HEADS = SHARED ? H + HK : H + 2 * HK;
    threadgroup float cosines[PAIRS];
    threadgroup float sines[PAIRS];
    int lane = thread_index_in_simdgroup;
    int group = simdgroup_index_in_threadgroup;
    size_t row = threadgroup_position_in_grid.x;  // b * L + l
    size_t L = positions_shape[1];
    size_t b = row / L;
    size_t l = row % L;

    float position = static_cast<float>(positions[b * positions_strides[0] + l * positions_strides[1]]);
    for (int i = thread_position_in_threadgroup.x; i < PAIRS; i += THREADS) {
        float angle = position * (1.0f / periods[i * periods_strides[0]]);
        cosines[i] = metal::precise::cos(angle);
        sines[i] = metal::precise::sin(angle);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float cosine[N], sine[N];
    for (int n = 0; n < N; n++) {
        int i = lane * N + n;
        cosine[n] = i < PAIRS ? cosines[i] : 1.0f;
        sine[n] = i < PAIRS ? sines[i] : 0.0f;
    }

    // Heads are in the order q, k, v. Where v is computed from k, there are no heads of v.
    for (int head = group; head < HEADS; head += THREADS / 32) {
        bool is_q = head < H;
        bool is_v = head >= H + HK;
        int count = is_q ? H : HK;
        int h = is_q ? head : (head - H) % HK;
        const device T* x = is_q ? queries : is_v ? values : keys;
        const constant int64_t* strides = is_q ? queries_strides : is_v ? values_strides : keys_strides;
        x += b * strides[0] + l * strides[1] + h * D * strides[2];
        int64_t next = strides[2];
        size_t out = ((b * count + h) * L + l) * D;

        float low[N], high[N];
        float sum = 0.0f;
        for (int n = 0; n < N; n++) {
            int i = lane * N + n;
            low[n] = i < PAIRS ? static_cast<float>(x[i * next]) : 0.0f;
            high[n] = i < PAIRS ? static_cast<float>(x[(i + PAIRS) * next]) : 0.0f;
            sum += low[n] * low[n] + high[n] * high[n];
        }
        float scale = metal::precise::rsqrt(simd_sum(sum) / D + eps);

        for (int n = 0; n < N; n++) {
            int i = lane * N + n;
            if (i >= PAIRS) {
                break;
            }
            float first = low[n] * scale;
            float second = high[n] * scale;
            if (is_v || (SHARED && !is_q)) {
                v[out + i] = static_cast<T>(first);
                v[out + i + PAIRS] = static_cast<T>(second);
            }
            if (!is_v) {
                int64_t low_at = i * (is_q ? q_weight_strides[0] : k_weight_strides[0]);
                int64_t high_at = (i + PAIRS) * (is_q ? q_weight_strides[0] : k_weight_strides[0]);
                float first_weight = is_q ? q_weight[low_at] : k_weight[low_at];
                float second_weight = is_q ? q_weight[high_at] : k_weight[high_at];
                first = static_cast<T>(first * first_weight);
                second = static_cast<T>(second * second_weight);
                device T* rotated = is_q ? q : k;
                rotated[out + i] = static_cast<T>(first * cosine[n] - second * sine[n]);
                rotated[out + i + PAIRS] = static_cast<T>(first * sine[n] + second * cosine[n]);
            }
        }
    }
"""

_kernel: Any = mx.fast.metal_kernel(
    name="qk_norm_rope",
    input_names=["queries", "keys", "values", "q_weight", "k_weight", "periods", "positions", "eps"],
    output_names=["q", "k", "v"],
    source=_SOURCE,
    ensure_row_contiguous=False,  # slices of a joined product would be copied
)


def qk_norm_rope_kernel(
    q: mx.array, k: mx.array, v: mx.array | None, q_weight: mx.array, k_weight: mx.array,
    periods: mx.array, positions: mx.array, eps: float,
) -> QKV:
    """Compute ``qk_norm_rope_reference`` in one launch, with one threadgroup per position.

    Shapes and dtypes are those of the reference, and results are rounded where the reference rounds them. D must be at
    least 8. Where v is None, k is read only once. Projections that are slices of one product are read in place.
    """
    B, L, _ = q.shape
    D = q_weight.size
    H, Hk = q.shape[-1] // D, k.shape[-1] // D
    q, k, v = _kernel(
        inputs=[q, k, k if v is None else v, q_weight, k_weight, periods, positions, scalar(eps)],
        template=[("T", q.dtype), ("D", D), ("H", H), ("HK", Hk), ("SHARED", v is None), ("THREADS", _THREADS)],
        grid=(B * L * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, H, L, D), (B, Hk, L, D), (B, Hk, L, D)],
        output_dtypes=[q.dtype] * 3,
    )
    return q, k, v


def qk_norm_rope_reference(
    q: mx.array, k: mx.array, v: mx.array | None, q_weight: mx.array, k_weight: mx.array,
    periods: mx.array, positions: mx.array, eps: float,
) -> QKV:
    """Norm the heads of q, k and v, rotate q and k by their positions, and move the heads before the positions.

    q and k are normed with weights and rotated; v is normed without a weight and not rotated. The values i and i + D/2
    of a head form a pair, which turns by the angle ``positions[b, l] / periods[i]``. Returns q (B, H, L, D), k and v
    (B, Hk, L, D), in q's dtype. This takes at most five launches, and up to three more to copy projections that are
    slices of one product.

    Reference: transformers ``DiffusionGemmaDecoderTextAttention``. Rotations: Su et al., arXiv 2104.09864.

    Args:
        q: Projected queries, (B, L, H * D).
        k: Projected keys, (B, L, Hk * D).
        v: Projected values, (B, L, Hk * D). None in layers without a value projection, where v is computed from k.
        q_weight: Weight of the queries' norm, (D,).
        k_weight: Weight of the keys' norm, (D,).
        periods: Periods of the pairs, (D/2,) float32; infinity for a pair that is not rotated.
        positions: Position of each row, (B, L) int32.
        eps: Constant added to the mean square.
    """
    B, L, _ = q.shape
    D = q_weight.size

    def attention_layout(y: mx.array) -> mx.array:  # -> (B, H, L, D)
        return y.reshape(B, L, -1, D).swapaxes(1, 2)

    def rotated(y: mx.array, weight: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(y.reshape(B * L, -1, 1, D), weight, eps)
        return attention_layout(
            mx.fast.rope(
                normed, D, traditional=False, base=None, scale=1.0, offset=positions.flatten(), freqs=periods
            )
        )

    values = mx.fast.rms_norm((k if v is None else v).reshape(B, L, -1, D), None, eps)
    return rotated(q, q_weight), rotated(k, k_weight), values.swapaxes(1, 2)


def _sliding_example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """Return arguments of a sliding-window layer: 256 positions, 16 query and 8 key/value heads of 256 values.

    q, k and v are slices of one product, as they are in a model loaded for Metal.
    """
    C, H, Hk, D = 256, 16, 8, 256
    joined, q_weight, k_weight = (
        mx.random.normal(shape, dtype, key=mx.random.key(i))
        for i, shape in enumerate([(1, C, (H + 2 * Hk) * D), (D,), (D,)])
    )
    q, k, v = mx.split(joined, [H * D, (H + Hk) * D], axis=-1)
    periods = 10_000.0 ** (mx.arange(D // 2, dtype=mx.float32) / (D // 2))
    return q, k, v, q_weight, k_weight, periods, mx.arange(100, 100 + C)[None], 1e-6


def _full_example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """Return arguments of a full-attention layer: 256 positions, 16 query and 2 key/value heads of 512 values.

    There is no v, and a quarter of the pairs is rotated. q and k are slices of one product, as they are in a model
    loaded for Metal.
    """
    C, H, Hk, D = 256, 16, 2, 512
    joined, q_weight, k_weight = (
        mx.random.normal(shape, dtype, key=mx.random.key(i))
        for i, shape in enumerate([(1, C, (H + Hk) * D), (D,), (D,)])
    )
    q, k = mx.split(joined, [H * D], axis=-1)
    pairs = mx.arange(D // 2, dtype=mx.float32)
    periods = mx.where(pairs < D // 8, 1e6 ** (pairs / (D // 2)), mx.inf)
    return q, k, None, q_weight, k_weight, periods, mx.arange(100, 100 + C)[None], 1e-6


qk_norm_rope = DispatchedOperation(
    "qk_norm_rope", qk_norm_rope_kernel, qk_norm_rope_reference,
    examples=[_sliding_example, _full_example], source=_SOURCE,
)
