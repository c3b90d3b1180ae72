// <metal_simdgroup>, <metal_quadgroup> and barriers. A SIMD-group has 32 lanes.
#pragma once

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = msl_flag_device,
  mem_threadgroup = msl_flag_threadgroup,
  mem_texture = 4
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_FN void threadgroup_barrier(mem_flags flags) {
  msl_barrier(0, int(flags));
}
MSL_FN void simdgroup_barrier(mem_flags flags) {
  msl_barrier(1, int(flags));
}

struct msl_sum {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a + b); }
};
struct msl_product {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a * b); }
};
struct msl_max {
  template <class T> MSL_FN static T apply(T a, T b) { return max(a, b); }
};
struct msl_min {
  template <class T> MSL_FN static T apply(T a, T b) { return min(a, b); }
};
struct msl_and {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a & b); }
};
struct msl_or {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a | b); }
};
struct msl_xor {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a ^ b); }
};

template <class T>
MSL_FN T msl_value(thread msl_lanes* lanes, uint lane) {
  return *(thread const T*)(lanes->values[lane]);
}

// Reduces the lanes of `mask` in pairs, the pairs in pairs, and so on. The order of the lanes does not matter.
template <class Op, class T>
MSL_FN T msl_join(thread msl_lanes* lanes, uint mask) {
  T part[32];
  uint n = 0;
  for (uint i = 0; i < 32; i++) {
    if (mask >> i & 1) part[n++] = msl_value<T>(lanes, i);
  }
  for (; n > 1; n = (n + 1) / 2) {
    for (uint i = 0; i < n; i += 2) part[i / 2] = i + 1 < n ? Op::apply(part[i], part[i + 1]) : part[i];
  }
  return part[0];
}

template <class Op, class T>
MSL_FN T msl_reduce(T x) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  if (!lanes->reduced) {
    *(thread T*)(lanes->result) = msl_join<Op, T>(lanes, lanes->active);
    lanes->reduced = 1;
  }
  return *(thread T*)(lanes->result);
}

template <class Op, class T>
MSL_FN T msl_quad_reduce(T x) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  return msl_join<Op, T>(lanes, lanes->active & 15u << (lanes->self & ~3u));
}

template <class Op, class T>
MSL_FN T msl_scan(T x, bool inclusive, T first) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  T sum = first;
  for (uint i = 0; i < lanes->self + (inclusive ? 1 : 0); i++) {
    if (lanes->active >> i & 1) sum = Op::apply(sum, msl_value<T>(lanes, i));
  }
  return sum;
}

template <class T>
MSL_FN T msl_take(thread msl_lanes* lanes, uint lane) {
  if (lane > 31 || !(lanes->active >> lane & 1)) {
    msl_lane_missing(lane);
  }
  return msl_value<T>(lanes, lane & 31);
}

// The lane to read from, given the own lane, an offset and the width of the shuffled group.
struct msl_at {
  MSL_FN static uint from(uint self, uint n, uint width) { return (self & ~(width - 1)) + n; }
};
struct msl_up {
  MSL_FN static uint from(uint self, uint n, uint width) { return (self & (width - 1)) < n ? self : self - n; }
};
struct msl_down {
  MSL_FN static uint from(uint self, uint n, uint width) { return (self & (width - 1)) + n < width ? self + n : self; }
};
struct msl_flip {
  MSL_FN static uint from(uint self, uint n, uint) { return self ^ n; }
};
struct msl_rotate_up {
  MSL_FN static uint from(uint self, uint n, uint width) { return (self & ~(width - 1)) + ((self - n) & (width - 1)); }
};
struct msl_rotate_down {
  MSL_FN static uint from(uint self, uint n, uint width) { return (self & ~(width - 1)) + ((self + n) & (width - 1)); }
};
template <class From, uint Width, class T>
MSL_FN T msl_shuffle(T x, uint n) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  return msl_take<T>(lanes, From::from(lanes->self, n, Width));
}

// Only the result of the last operation has a valid `self`.
template <class T>
MSL_FN T msl_fill_up(T x, T fill, uint n, uint width) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  thread msl_lanes* fills = msl_exchange(&fill, sizeof(T), 0);
  uint at = fills->self % width;
  return at < n ? msl_take<T>(fills, fills->self + width - n) : msl_take<T>(lanes, fills->self - n);
}
template <class T>
MSL_FN T msl_fill_down(T x, T fill, uint n, uint width) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  thread msl_lanes* fills = msl_exchange(&fill, sizeof(T), 0);
  uint at = fills->self % width;
  return at + n >= width ? msl_take<T>(fills, fills->self + n - width) : msl_take<T>(lanes, fills->self + n);
}
template <class T>
MSL_FN T msl_broadcast_first(T x) {
  thread msl_lanes* lanes = msl_exchange(&x, sizeof(T), 0);
  return msl_value<T>(lanes, __builtin_ctz(lanes->active));
}

// MLX's bf16_math.h builds its overloads for bfloat from the names with the prefix __metal_.
#define MSL_MOVES(P, T)                                                                                  \
  MSL_FN T P##simd_broadcast(T x, ushort lane) { return msl_shuffle<msl_at, 32>(x, lane); }              \
  MSL_FN T P##simd_broadcast_first(T x) { return msl_broadcast_first(x); }                               \
  MSL_FN T P##simd_shuffle(T x, ushort lane) { return msl_shuffle<msl_at, 32>(x, lane); }                \
  MSL_FN T P##simd_shuffle_xor(T x, ushort mask) { return msl_shuffle<msl_flip, 32>(x, mask); }          \
  MSL_FN T P##simd_shuffle_up(T x, ushort n) { return msl_shuffle<msl_up, 32>(x, n); }                   \
  MSL_FN T P##simd_shuffle_down(T x, ushort n) { return msl_shuffle<msl_down, 32>(x, n); }               \
  MSL_FN T P##simd_shuffle_rotate_up(T x, ushort n) { return msl_shuffle<msl_rotate_up, 32>(x, n); }     \
  MSL_FN T P##simd_shuffle_rotate_down(T x, ushort n) { return msl_shuffle<msl_rotate_down, 32>(x, n); } \
  MSL_FN T P##simd_shuffle_and_fill_up(T x, T fill, ushort n, ushort width = 32) {                       \
    return msl_fill_up(x, fill, n, width);                                                               \
  }                                                                                                      \
  MSL_FN T P##simd_shuffle_and_fill_down(T x, T fill, ushort n, ushort width = 32) {                     \
    return msl_fill_down(x, fill, n, width);                                                             \
  }
#define MSL_QUADS(T)                                                                         \
  MSL_FN T quad_broadcast(T x, ushort lane) { return msl_shuffle<msl_at, 4>(x, lane); }      \
  MSL_FN T quad_shuffle(T x, ushort lane) { return msl_shuffle<msl_at, 4>(x, lane); }        \
  MSL_FN T quad_shuffle_xor(T x, ushort mask) { return msl_shuffle<msl_flip, 4>(x, mask); }  \
  MSL_FN T quad_shuffle_up(T x, ushort n) { return msl_shuffle<msl_up, 4>(x, n); }           \
  MSL_FN T quad_shuffle_down(T x, ushort n) { return msl_shuffle<msl_down, 4>(x, n); }       \
  MSL_FN T quad_sum(T x) { return msl_quad_reduce<msl_sum>(x); }                             \
  MSL_FN T quad_max(T x) { return msl_quad_reduce<msl_max>(x); }                             \
  MSL_FN T quad_min(T x) { return msl_quad_reduce<msl_min>(x); }                             \
  MSL_FN T quad_product(T x) { return msl_quad_reduce<msl_product>(x); }
#define MSL_REDUCTIONS(P, T)                                                                                      \
  MSL_FN T P##simd_sum(T x) { return msl_reduce<msl_sum>(x); }                                                    \
  MSL_FN T P##simd_product(T x) { return msl_reduce<msl_product>(x); }                                            \
  MSL_FN T P##simd_max(T x) { return msl_reduce<msl_max>(x); }                                                    \
  MSL_FN T P##simd_min(T x) { return msl_reduce<msl_min>(x); }                                                    \
  MSL_FN T P##simd_prefix_inclusive_sum(T x) { return msl_scan<msl_sum>(x, true, msl_make<T>(0)); }               \
  MSL_FN T P##simd_prefix_exclusive_sum(T x) { return msl_scan<msl_sum>(x, false, msl_make<T>(0)); }              \
  MSL_FN T P##simd_prefix_inclusive_product(T x) { return msl_scan<msl_product>(x, true, msl_make<T>(1)); }       \
  MSL_FN T P##simd_prefix_exclusive_product(T x) { return msl_scan<msl_product>(x, false, msl_make<T>(1)); }
#define MSL_BITS(T)                                          \
  MSL_FN T simd_and(T x) { return msl_reduce<msl_and>(x); } \
  MSL_FN T simd_or(T x) { return msl_reduce<msl_or>(x); }   \
  MSL_FN T simd_xor(T x) { return msl_reduce<msl_xor>(x); }

// Metal has these for types of up to 32 bits, and not for bfloat.
#define MSL_SIMD_ALL(T) MSL_MOVES(, T) MSL_REDUCTIONS(, T) MSL_QUADS(T)
#define MSL_SIMD(T) MSL_SIMD_ALL(T) MSL_SIMD_ALL(T##2) MSL_SIMD_ALL(T##3) MSL_SIMD_ALL(T##4)
#define MSL_SIMD_INTEGER(T) MSL_SIMD(T) MSL_BITS(T) MSL_BITS(T##2) MSL_BITS(T##3) MSL_BITS(T##4)
MSL_SIMD(float)
MSL_SIMD(half)
MSL_SIMD_INTEGER(char)
MSL_SIMD_INTEGER(uchar)
MSL_SIMD_INTEGER(short)
MSL_SIMD_INTEGER(ushort)
MSL_SIMD_INTEGER(int)
MSL_SIMD_INTEGER(uint)
MSL_MOVES(__metal_, ushort)
MSL_REDUCTIONS(__metal_, float)
MSL_FN float __metal_simd_xor(float x) {  // MLX declares this for bfloat, but a call is always a mistake
  return x;
}
MSL_FN ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}

class simd_vote {
 public:
  using vote_t = ulong;
  MSL_FN explicit simd_vote(vote_t bits = 0) : bits_(bits) {}
  MSL_FN explicit operator vote_t() const { return bits_; }
  MSL_FN bool all() const { return bits_ == 0xffffffff; }
  MSL_FN bool any() const { return bits_ != 0; }

 private:
  vote_t bits_;
};
MSL_FN simd_vote simd_ballot(bool x) {
  uint value = x;
  thread msl_lanes* lanes = msl_exchange(&value, 4, 0);
  ulong bits = 0;
  for (uint i = 0; i < 32; i++) {
    if ((lanes->active >> i & 1) && msl_value<uint>(lanes, i)) bits |= 1ul << i;
  }
  return simd_vote(bits);
}
MSL_FN bool simd_any(bool x) {
  return msl_reduce<msl_or>(uint(x)) != 0;
}
MSL_FN bool simd_all(bool x) {
  return msl_reduce<msl_and>(uint(x)) != 0;
}
MSL_FN bool quad_any(bool x) {
  return msl_quad_reduce<msl_or>(uint(x)) != 0;
}
MSL_FN bool quad_all(bool x) {
  return msl_quad_reduce<msl_and>(uint(x)) != 0;
}
MSL_FN bool simd_is_first() {
  uint none = 0;
  thread msl_lanes* lanes = msl_exchange(&none, 4, 0);
  return lanes->self == uint(__builtin_ctz(lanes->active));
}
MSL_FN simd_vote simd_active_threads_mask() {
  uint none = 0;
  return simd_vote(msl_exchange(&none, 4, 0)->active);
}

}  // namespace metal
