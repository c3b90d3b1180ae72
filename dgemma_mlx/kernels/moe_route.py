"""Routing of rows to experts: the choice of K experts for each row, their weights, and the sorting of the work.

The K largest probabilities belong to the K largest logits. Renormalised to sum 1, they equal a softmax over these K
logits alone, so the other probabilities are not computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.kernels._common import SIMD
from dgemma_mlx.kernels.dispatch import DispatchedOperation


class Route(NamedTuple):
    """The assignment of N rows to K experts each.

    A row and one of its experts form a piece of work. The N * K pieces are sorted by expert, and by row for the same
    expert. A slot is a place in this order.

    Attributes:
        weights: Weight of each expert in its row's sum, (N, K) float32.
        indices: The experts of each row, the most probable first, (N, K) uint32.
        experts: The expert of each slot, ascending, (N * K,) uint32.
        rows: The row of each slot, (N * K,) uint32.
        slots: The slot of each row and expert, (N, K) uint32.
    """

    weights: mx.array
    indices: mx.array
    experts: mx.array
    rows: mx.array
    slots: mx.array


_MAX_EXPERTS = 4096  # the limit of threadgroup memory; above it, and for top_k > 32, the reference runs
_BLOCK = 32  # rows per threadgroup: each row is one bit of a mask
_TOP_K_THREADS = 512
_SORT_THREADS = 256

# Both kernels run one threadgroup for each block of 32 rows. The first kernel chooses the K experts of each row and
# writes a mask for each block and expert, with a bit for each row of the block that uses the expert. The second kernel
# counts bits in the masks of all blocks, which gives the number of pieces before a given one, that is, its slot. The
# result does not depend on the order in which threads run, and the sort is stable.
_HEADER = """
// Keys have the same order as the logits. Key 0 marks an expert that is already chosen. Key 1 is NaN, below -inf.
inline uint key_of(float logit) {
    if (metal::isnan(logit)) {
        return 1;
    }
    uint bits = logit == 0.0f ? 0u : as_type<uint>(logit);  // -0 and 0 are equal
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float logit_of(uint key) {
    return as_type<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}
"""

_TOP_K_SOURCE = """
    constexpr int R = (E + 31) / 32;  // a lane holds the experts lane, lane + 32, ...
    threadgroup atomic_uint mask[E];
    uint t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint block = threadgroup_position_in_grid.x;
    uint N = logits_shape[0];

    for (uint e = t; e < E; e += THREADS) {
        atomic_store_explicit(&mask[e], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint r = simdgroup_index_in_threadgroup; r < 32; r += THREADS / 32) {
        size_t row = size_t(block) * 32 + r;
        if (row >= N) {
            break;
        }
        uint keys[R];
        for (int i = 0; i < R; i++) {
            uint e = lane + 32 * i;
            keys[i] = e < E ? key_of(static_cast<float>(logits[row * E + e])) : 0;
        }

        // Lane k keeps the k-th choice of the row.
        uint first = 0, key = 0, expert = 0;
        for (uint k = 0; k < K; k++) {
            uint best = 0, best_e = E;
            for (int i = 0; i < R; i++) {
                if (keys[i] > best) {
                    best = keys[i];
                    best_e = lane + 32 * i;
                }
            }
            uint top = simd_max(best);
            uint winner = simd_min(best == top ? best_e : uint(E));
            for (int i = 0; i < R; i++) {
                keys[i] = lane + 32 * i == winner ? 0 : keys[i];
            }
            first = k == 0 ? top : first;
            if (lane == k) {
                key = top;
                expert = winner;
            }
        }

        float p = lane < K ? metal::precise::exp(logit_of(key) - logit_of(first)) : 0.0f;
        float total = simd_sum(p);
        if (lane < K) {
            weights[row * K + lane] = p / total * static_cast<float>(per_expert_scale[expert]);
            indices[row * K + lane] = expert;
            atomic_fetch_or_explicit(&mask[expert], 1u << r, memory_order_relaxed);
        }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < E; e += THREADS) {
        masks[size_t(block) * E + e] = atomic_load_explicit(&mask[e], memory_order_relaxed);
    }
"""

_SORT_SOURCE = """
    threadgroup uint totals[E];  // number of rows of each expert
    threadgroup uint start[E];   // slot of each expert's first row in this block
    uint t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint block = threadgroup_position_in_grid.x;
    uint blocks = masks_shape[0];
    uint pieces = indices_shape[0] * K;

    for (uint e = t; e < E; e += THREADS) {
        uint total = 0, before = 0;
        for (uint b = 0; b < blocks; b++) {
            uint count = popcount(masks[size_t(b) * E + e]);
            total += count;
            before += b < block ? count : 0;
        }
        totals[e] = total;
        start[e] = before;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (simdgroup_index_in_threadgroup == 0) {
        uint base = 0;
        for (uint e = lane; e < (E + 31) / 32 * 32; e += 32) {
            uint count = e < E ? totals[e] : 0;
            uint before = simd_prefix_exclusive_sum(count);
            if (e < E) {
                start[e] += base + before;
            }
            base += simd_sum(count);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint i = t; i < 32 * K; i += THREADS) {
        uint piece = block * 32 * K + i;
        if (piece >= pieces) {
            break;
        }
        uint r = i / K;
        uint expert = indices[piece];
        uint earlier = masks[size_t(block) * E + expert] & ((1u << r) - 1);
        uint slot = start[expert] + popcount(earlier);
        slots[piece] = slot;
        experts[slot] = expert;
        rows[slot] = block * 32 + r;
    }
"""

_top_k_kernel: Any = mx.fast.metal_kernel(
    name="moe_route_top_k",
    input_names=["logits", "per_expert_scale"],
    output_names=["weights", "indices", "masks"],
    source=_TOP_K_SOURCE,
    header=_HEADER,
)

_sort_kernel: Any = mx.fast.metal_kernel(
    name="moe_route_sort",
    input_names=["indices", "masks"],
    output_names=["experts", "rows", "slots"],
    source=_SORT_SOURCE,
)


def moe_route_kernel(router_logits: mx.array, per_expert_scale: mx.array, top_k: int) -> Route:
    """Compute ``moe_route_reference`` in two launches: one chooses the experts, one sorts the work.

    Shapes and dtypes are those of the reference. Above 4,096 experts or 32 experts per row the reference itself runs.
    """
    N, E = router_logits.shape
    if E > _MAX_EXPERTS or top_k > SIMD:
        return moe_route_reference(router_logits, per_expert_scale, top_k)
    blocks = -(-N // _BLOCK)
    weights, indices, masks = _top_k_kernel(
        inputs=[router_logits, per_expert_scale],
        template=[("E", E), ("K", top_k), ("THREADS", _TOP_K_THREADS)],
        grid=(blocks * _TOP_K_THREADS, 1, 1),
        threadgroup=(_TOP_K_THREADS, 1, 1),
        output_shapes=[(N, top_k), (N, top_k), (blocks, E)],
        output_dtypes=[mx.float32, mx.uint32, mx.uint32],
    )
    experts, rows, slots = _sort_kernel(
        inputs=[indices, masks],
        template=[("E", E), ("K", top_k), ("THREADS", _SORT_THREADS)],
        grid=(blocks * _SORT_THREADS, 1, 1),
        threadgroup=(_SORT_THREADS, 1, 1),
        output_shapes=[(N * top_k,), (N * top_k,), (N, top_k)],
        output_dtypes=[mx.uint32] * 3,
    )
    return Route(weights, indices, experts, rows, slots)


def moe_route_reference(router_logits: mx.array, per_expert_scale: mx.array, top_k: int) -> Route:
    """Choose ``top_k`` experts for each row, compute their weights, and sort the work by expert.

    The weights are the softmax over the row's K largest logits in float32, times ``per_expert_scale`` of each expert.
    Gradients flow through the weights only.

    Of experts with equal logits, the one with the lower index comes first. NaN is below every other logit, so that a
    row always gets K different experts. The weights of a row are NaN if one of its K logits is NaN or +inf.

    Reference: transformers ``DiffusionGemmaTextRouter``.

    Args:
        router_logits: Logits of the router, (N, E).
        per_expert_scale: Factor on the weight of each expert, (E,).
        top_k: Number of experts per row (K).
    """
    indices = mx.stop_gradient(mx.argsort(-router_logits, axis=-1)[..., :top_k])  # argsort is stable
    chosen = mx.take_along_axis(router_logits, indices, axis=-1)
    weights = mx.softmax(chosen.astype(mx.float32), axis=-1) * per_expert_scale[indices]
    flat = indices.flatten()
    order = mx.argsort(flat)
    return Route(weights, indices, flat[order], order // top_k, mx.argsort(order).reshape(indices.shape))


def _example(dtype: mx.Dtype) -> tuple[mx.array, mx.array, int]:
    """Return arguments for a canvas of 256 rows and the published model's router: 8 of 128 experts."""
    key = mx.random.key(0)
    return mx.random.normal((256, 128), dtype, key=key), mx.ones(128, dtype), 8


moe_route = DispatchedOperation(
    "moe_route", moe_route_kernel, moe_route_reference,
    examples=[_example], source=_HEADER + _TOP_K_SOURCE + _SORT_SOURCE,
)
