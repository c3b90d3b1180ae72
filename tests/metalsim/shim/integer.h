// <metal_integer>, and min, max, clamp and abs of integers.
#pragma once

namespace metal {

#define MSL_INTEGERS(X) X(char, uchar) X(uchar, uchar) X(short, ushort) X(ushort, ushort) X(int, uint) X(uint, uint) \
  X(long, ulong) X(ulong, ulong)

#define MSL_INTEGER_FUNCTIONS(T, U)                                                            \
  MSL_FN T max(T x, T y) { return x > y ? x : y; }                                             \
  MSL_FN T min(T x, T y) { return x < y ? x : y; }                                             \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                        \
  MSL_FN T max3(T x, T y, T z) { return max(x, max(y, z)); }                                   \
  MSL_FN T min3(T x, T y, T z) { return min(x, min(y, z)); }                                   \
  MSL_FN T median3(T x, T y, T z) { return max(min(x, y), min(max(x, y), z)); }                \
  MSL_FN T abs(T x) { return x < T(0) ? T(-x) : x; }                                           \
  MSL_FN U absdiff(T x, T y) { return x > y ? U(x) - U(y) : U(y) - U(x); }                     \
  MSL_FN T popcount(T x) { return T(__builtin_popcountl(ulong(U(x)))); }                       \
  MSL_FN T clz(T x) { return T(x == 0 ? sizeof(T) * 8 : __builtin_clzl(ulong(U(x))) - (64 - sizeof(T) * 8)); } \
  MSL_FN T ctz(T x) { return T(x == 0 ? sizeof(T) * 8 : __builtin_ctzl(ulong(U(x)))); }        \
  MSL_FN T rotate(T x, T by) {                                                                 \
    constexpr uint bits = sizeof(T) * 8;                                                       \
    uint n = uint(by) % bits;                                                                  \
    return T(n == 0 ? U(x) : U(U(x) << n) | U(U(x) >> (bits - n)));                            \
  }                                                                                            \
  MSL_FN T reverse_bits(T x) {                                                                 \
    U r = 0;                                                                                   \
    for (uint i = 0; i < sizeof(T) * 8; i++) r = U(U(r << 1) | U((U(x) >> i) & 1));            \
    return T(r);                                                                               \
  }                                                                                            \
  MSL_FN T extract_bits(T x, uint offset, uint bits) {                                         \
    constexpr uint width = sizeof(T) * 8;                                                      \
    return bits == 0 ? T(0) : T(T(U(x) << (width - offset - bits)) >> (width - bits));         \
  }                                                                                            \
  MSL_FN T insert_bits(T base, T insert, uint offset, uint bits) {                             \
    U mask = bits >= sizeof(T) * 8 ? U(~U(0)) : U(((U(1) << bits) - 1) << offset);             \
    return T((U(base) & U(~mask)) | (U(U(insert) << offset) & mask));                          \
  }                                                                                            \
  MSL_FN T mulhi(T x, T y) {                                                                   \
    if constexpr (sizeof(T) == 8) {                                                            \
      return T(is_signed_v<T> ? ulong(((__int128)(x) * (__int128)(y)) >> 64)                   \
                              : ulong(((unsigned __int128)(x) * (unsigned __int128)(y)) >> 64)); \
    } else {                                                                                   \
      return T((long(x) * long(y)) >> (sizeof(T) * 8));                                        \
    }                                                                                          \
  }                                                                                            \
  MSL_FN T addsat(T x, T y) {                                                                  \
    T r;                                                                                       \
    return !__builtin_add_overflow(x, y, &r) ? r                                               \
        : is_signed_v<T> && x < T(0)         ? numeric_limits<T>::min() : numeric_limits<T>::max(); \
  }                                                                                            \
  MSL_FN T subsat(T x, T y) {                                                                  \
    T r;                                                                                       \
    return !__builtin_sub_overflow(x, y, &r) ? r                                               \
        : is_signed_v<T> && x >= T(0)        ? numeric_limits<T>::max() : numeric_limits<T>::min(); \
  }
MSL_INTEGERS(MSL_INTEGER_FUNCTIONS)

#define MSL_INTEGER_LANES(V) \
  MSL_LANES_1(V, abs) MSL_LANES_1(V, popcount) MSL_LANES_1(V, clz) MSL_LANES_1(V, ctz) MSL_LANES_2(V, max) \
  MSL_LANES_2(V, min) MSL_LANES_2(V, rotate) MSL_LANES_3(V, clamp)
#define MSL_INTEGER_VECTORS(T, U) MSL_INTEGER_LANES(T##2) MSL_INTEGER_LANES(T##3) MSL_INTEGER_LANES(T##4)
MSL_INTEGERS(MSL_INTEGER_VECTORS)

}  // namespace metal
