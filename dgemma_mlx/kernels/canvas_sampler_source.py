"""The Metal source of ``canvas_sampler``: a first pass over chunks of the logits, and a second pass over rows.

The first pass (``CHUNKS``) computes sums for each chunk of a row, and the second pass (``MERGE``) merges them.

Template constants:

* T: dtype of the logits
* V: vocabulary size
* K: number of chunks in a row
* CHUNK: number of values in a chunk
* CAPPED: whether there is a softcap
* BIASED: whether there is a bias
* READS: number of consecutive values that a lane of the first pass reads at once
* THREADS: number of threads in a threadgroup of the second pass
* MAX_KEPT: length of a row's token list

In the comments, y is a logit after the softcap and with its bias, and z = y / temperature.
"""

from __future__ import annotations

from dgemma_mlx.kernels._common import BLOCK_SUM

HEADER = BLOCK_SUM + """
template <bool CAPPED>
inline float capped(float x, float softcap) {
    return CAPPED ? softcap * metal::precise::tanh(x * (1.0f / softcap)) : x;
}

// Returns to every thread the minimum over a threadgroup. As with block_sum, the caller must place a barrier before it
// uses partial again.
template <int THREADS, typename N>
inline N block_min(N value, threadgroup N* partial, uint lane, uint group) {
    value = simd_min(value);
    if (lane == 0) {
        partial[group] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_min(partial[lane % (THREADS / 32)]);
}

// Returns the sum over the threads before this one, and sets total to the sum over all threads.
template <int THREADS, typename N>
inline N block_scan(N value, threadgroup N* partial, uint lane, uint group, thread N& total) {
    N before = simd_prefix_exclusive_sum(value);
    if (lane == 31) {
        partial[group] = before + value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    N sum = lane < THREADS / 32 ? partial[lane] : N(0);
    total = simd_sum(sum);
    return before + simd_shuffle(simd_prefix_exclusive_sum(sum), ushort(group));
}
"""

# Pass 1, with one SIMD group per chunk: the maximum of y, its first index, and the sums of e^d and d e^d, where d is z
# minus the chunk's maximum of z.
CHUNKS = """
    constexpr int PER_LANE = CHUNK / 32;
    int chunk = thread_position_in_grid.x / 32;
    int lane = thread_index_in_simdgroup;
    size_t row = thread_position_in_grid.y;
    auto x = logits + row * V;
    auto b = bias + (BIASED ? size_t(bias_rows[row]) * V : 0);

    float y[PER_LANE];  // READS consecutive values, then those 32 * READS further, and so on
    float top = -INFINITY;
    int begin = chunk * CHUNK + lane * READS;
    for (int i = 0; i < PER_LANE; i++) {
        int index = begin + i / READS * 32 * READS + i % READS;
        y[i] = V % CHUNK == 0 || index < V ? capped<CAPPED>(static_cast<float>(x[index]), softcap) : -INFINITY;
        y[i] += BIASED && index < V ? b[index] : 0.0f;
        top = metal::max(top, y[i]);
    }
    top = simd_max(top);

    float sum = 0.0f;
    float dot = 0.0f;
    int first = V - 1;
    for (int i = 0; i < PER_LANE; i++) {
        float d = (y[i] - top) * inverse_temperature;
        float e = y[i] == -INFINITY ? 0.0f : metal::precise::exp(d);
        sum += e;
        dot += e == 0.0f ? 0.0f : d * e;
        if (y[i] == top) {
            first = metal::min(first, begin + i / READS * 32 * READS + i % READS);
        }
    }
    sum = simd_sum(sum);
    dot = simd_sum(dot);
    first = simd_min(first);
    if (lane == 0) {
        size_t out = row * K + chunk;
        tops[out] = top;
        firsts[out] = first;
        sums[out] = sum;
        dots[out] = dot;
    }
"""

# Pass 2, with one threadgroup per row. A thread merges R neighbouring chunks. A lane reads PER_LANE values of a chunk.
#
# This part computes the row's maximum, its first index, the softmax's normaliser, and the sum of d e^d for the entropy.
_TOTALS = """
    constexpr int R = (K + THREADS - 1) / THREADS;
    constexpr int GROUPS = THREADS / 32;
    constexpr int PER_LANE = CHUNK / 32;
    threadgroup float floats[4][GROUPS];  // one row for each sum or minimum over the threadgroup
    threadgroup int ints[4][GROUPS];
    int t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    size_t row = threadgroup_position_in_grid.y;
    auto x = logits + row * V;
    auto b = bias + (BIASED ? size_t(bias_rows[row]) * V : 0);
    int begin = t * R;
    int end = metal::min(begin + R, K);

    float highest = -INFINITY;
    for (int k = begin; k < end; k++) {
        highest = metal::max(highest, tops[row * K + k]);
    }
    highest = -block_min<THREADS>(-highest, floats[0], lane, group);

    float mass[R];  // sum of e^(z - max z) of each chunk
    float own = 0.0f;
    float dot = 0.0f;
    int first = V - 1;
    int near = 0;  // number of chunks that may hold a token to keep
    for (int r = 0; r < R; r++) {
        mass[r] = 0.0f;
        if (begin + r < end) {
            size_t k = row * K + begin + r;
            float d = (tops[k] - highest) * inverse_temperature;
            float scale = metal::precise::exp(d);
            mass[r] = sums[k] == 0.0f ? 0.0f : scale * sums[k];
            dot += sums[k] == 0.0f ? 0.0f : scale * (dots[k] + d * sums[k]);
            first = tops[k] == highest ? metal::min(first, firsts[k]) : first;
            near += d >= -KEPT_NATS;
        }
        own += mass[r];
    }
    float total;
    float before = block_scan<THREADS>(own, floats[1], lane, group, total);
    dot = block_sum<THREADS>(dot, floats[2], lane, group);
    first = block_min<THREADS>(first, ints[0], lane, group);
    bool valid = total > 0.0f && total < INFINITY;
"""

# This part draws the sample: first the chunk, then the token in it, for which the variable rest holds the remaining
# target. Wanted is the first entry whose cumulative sum exceeds the target or, if rounding leaves none, the last entry
# with a weight. Both are found as one minimum: over the index of entries that exceed the target, and over
# 2 * length - index of the other entries.
_DRAW = """
    threadgroup float rest;
    float target = uniforms[row] * total;
    float left = INFINITY;
    int chosen = 2 * K;
    for (int r = 0; r < R && begin + r < end; r++) {
        if (mass[r] > 0.0f) {
            bool hit = before + mass[r] > target;
            if (hit && chosen >= K) {
                left = target - before;
            }
            chosen = metal::min(chosen, hit ? begin + r : 2 * K - begin - r);
            before += mass[r];
        }
    }
    chosen = block_min<THREADS>(chosen, ints[1], lane, group);
    chosen = chosen < K ? chosen : 2 * K - chosen;
    if (chosen >= begin && chosen < end) {
        rest = left;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (group == 0) {
        int index = chosen * CHUNK + lane * PER_LANE;
        float e[PER_LANE];
        float sum = 0.0f;
        for (int i = 0; i < PER_LANE; i++) {
            float y = index + i < V ? capped<CAPPED>(static_cast<float>(x[index + i]), softcap) : -INFINITY;
            y += BIASED && index + i < V ? b[index + i] : 0.0f;
            e[i] = metal::precise::exp((y - highest) * inverse_temperature);
            sum += e[i];
        }
        float so_far = simd_prefix_exclusive_sum(sum);
        int pick = 2 * V;
        for (int i = 0; i < PER_LANE; i++) {
            so_far += e[i];
            if (e[i] > 0.0f) {
                pick = metal::min(pick, so_far > rest ? index + i : 2 * V - index - i);
            }
        }
        pick = simd_min(pick);
        if (lane == 0) {
            entropy[row] = valid ? metal::precise::log(total) - dot / total : NAN;
            argmax[row] = first;
            sample[row] = valid ? (pick < V ? pick : 2 * V - pick) : 0;
        }
    }
"""

# This part lists the kept tokens. It collects the chunks that may hold one, in order, and then reads GROUPS of these
# chunks at a time until the list is full.
_LIST = """
    threadgroup int candidates[K];
    int candidate_count;
    int slot = block_scan<THREADS>(near, ints[2], lane, group, candidate_count);
    for (int k = begin; k < end; k++) {
        if ((tops[row * K + k] - highest) * inverse_temperature >= -KEPT_NATS) {
            candidates[slot++] = k;
        }
    }
    candidate_count = valid ? candidate_count : 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    int found = 0;
    float sum = 0.0f;
    size_t out = row * MAX_KEPT;
    for (int c = 0; c < candidate_count && found <= MAX_KEPT; c += GROUPS) {
        uint bits = 0;
        int index = 0;
        if (c + int(group) < candidate_count) {
            index = candidates[c + group] * CHUNK + lane * PER_LANE;
            for (int i = 0; i < PER_LANE; i++) {
                float y = index + i < V ? capped<CAPPED>(static_cast<float>(x[index + i]), softcap) : -INFINITY;
                y += BIASED && index + i < V ? b[index + i] : 0.0f;
                bits |= uint((y - highest) * inverse_temperature >= -KEPT_NATS) << i;
            }
        }
        int more;
        int position = found + block_scan<THREADS>(int(metal::popcount(bits)), ints[3], lane, group, more);
        for (; bits != 0 && position < MAX_KEPT; bits &= bits - 1) {
            int id = index + int(metal::ctz(bits));
            float y = capped<CAPPED>(static_cast<float>(x[id]), softcap) + (BIASED ? b[id] : 0.0f);
            float p = metal::precise::exp((y - highest) * inverse_temperature) / total;
            kept_ids[out + position] = id;
            kept_weights[out + position] = p;
            sum += p;
            position++;
        }
        found += more;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = found + t; i < MAX_KEPT; i += THREADS) {
        kept_ids[out + i] = 0;
        kept_weights[out + i] = 0.0f;
    }
    sum = block_sum<THREADS>(sum, floats[3], lane, group);
    if (t == 0) {
        kept_count[row] = metal::min(found, MAX_KEPT + 1);
        kept_mass[row] = sum;
    }
"""

MERGE = _TOTALS + _DRAW + _LIST
