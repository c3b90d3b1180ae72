// <metal_math>, <metal_common>, <metal_relational>, <metal_geometric>. float uses the C library, half uses float.
// Overloads are exact, so that a call with mixed types is ambiguous, as it is in Metal.
#pragma once

namespace metal {

MSL_FN float msl_fract(float x) {
  float f = x - __builtin_floorf(x);
  return f < 1.0f ? f : 0x1.fffffep-1f;
}
MSL_FN float msl_sinpi(float x) {
  float r = x - 2.0f * __builtin_rintf(x * 0.5f);
  return __builtin_sinf(3.14159265358979f * (__builtin_fabsf(r) <= 0.5f ? r : __builtin_copysignf(1.0f, r) - r));
}
MSL_FN float msl_cospi(float x) {
  return msl_sinpi(0.5f - __builtin_fabsf(x - 2.0f * __builtin_rintf(x * 0.5f)));
}
MSL_FN float msl_tanpi(float x) {
  return msl_sinpi(x) / msl_cospi(x);
}
MSL_FN float msl_rsqrt(float x) {
  return 1.0f / __builtin_sqrtf(x);
}
MSL_FN float msl_exp10(float x) {
  return __builtin_powf(10.0f, x);
}
MSL_FN float msl_divide(float x, float y) {
  return x / y;
}
MSL_FN float msl_fmax3(float x, float y, float z) {
  return __builtin_fmaxf(x, __builtin_fmaxf(y, z));
}
MSL_FN float msl_fmin3(float x, float y, float z) {
  return __builtin_fminf(x, __builtin_fminf(y, z));
}
MSL_FN float msl_fmedian3(float x, float y, float z) {
  return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
MSL_FN float msl_sign(float x) {
  return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == x ? x : 0.0f;
}
MSL_FN float msl_saturate(float x) {
  return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f);
}
MSL_FN float msl_mix(float x, float y, float a) {
  return x + (y - x) * a;
}
MSL_FN float msl_clamp(float x, float low, float high) {
  return __builtin_fminf(__builtin_fmaxf(x, low), high);
}
MSL_FN float msl_step(float edge, float x) {
  return x < edge ? 0.0f : 1.0f;
}
MSL_FN float msl_smoothstep(float low, float high, float x) {
  float t = msl_saturate((x - low) / (high - low));
  return t * t * (3.0f - 2.0f * t);
}

// X(name, float function)
#define MSL_MATH_1(X)                                                                                    \
  X(acos, __builtin_acosf) X(acosh, __builtin_acoshf) X(asin, __builtin_asinf) X(asinh, __builtin_asinhf) \
  X(atan, __builtin_atanf) X(atanh, __builtin_atanhf) X(ceil, __builtin_ceilf) X(cos, __builtin_cosf)     \
  X(cosh, __builtin_coshf) X(cospi, msl_cospi) X(exp, __builtin_expf) X(exp2, __builtin_exp2f)            \
  X(exp10, msl_exp10) X(fabs, __builtin_fabsf) X(floor, __builtin_floorf) X(fract, msl_fract)             \
  X(log, __builtin_logf) X(log2, __builtin_log2f) X(log10, __builtin_log10f) X(rint, __builtin_rintf)     \
  X(round, __builtin_roundf) X(rsqrt, msl_rsqrt) X(sin, __builtin_sinf) X(sinh, __builtin_sinhf)          \
  X(sinpi, msl_sinpi) X(sqrt, __builtin_sqrtf) X(tan, __builtin_tanf) X(tanh, __builtin_tanhf)            \
  X(tanpi, msl_tanpi) X(trunc, __builtin_truncf)
#define MSL_MATH_2(X)                                                                                      \
  X(atan2, __builtin_atan2f) X(copysign, __builtin_copysignf) X(divide, msl_divide) X(fdim, __builtin_fdimf) \
  X(fmax, __builtin_fmaxf) X(fmin, __builtin_fminf) X(fmod, __builtin_fmodf) X(pow, __builtin_powf)          \
  X(powr, __builtin_powf)
#define MSL_MATH_3(X) \
  X(fma, __builtin_fmaf) X(fmax3, msl_fmax3) X(fmin3, msl_fmin3) X(fmedian3, msl_fmedian3)
#define MSL_COMMON_1(X) X(abs, __builtin_fabsf) X(sign, msl_sign) X(saturate, msl_saturate)
#define MSL_COMMON_2(X) X(max, __builtin_fmaxf) X(min, __builtin_fminf) X(step, msl_step)
#define MSL_COMMON_3(X)                                                                      \
  X(clamp, msl_clamp) X(mix, msl_mix) X(smoothstep, msl_smoothstep) X(max3, msl_fmax3)       \
  X(min3, msl_fmin3) X(median3, msl_fmedian3)

#define MSL_SCALARS_1(name, f) \
  MSL_FN float name(float x) { return f(x); } \
  MSL_FN half name(half x) { return half(f(float(x))); }
#define MSL_SCALARS_2(name, f) \
  MSL_FN float name(float x, float y) { return f(x, y); } \
  MSL_FN half name(half x, half y) { return half(f(float(x), float(y))); }
#define MSL_SCALARS_3(name, f) \
  MSL_FN float name(float x, float y, float z) { return f(x, y, z); } \
  MSL_FN half name(half x, half y, half z) { return half(f(float(x), float(y), float(z))); }
MSL_MATH_1(MSL_SCALARS_1) MSL_COMMON_1(MSL_SCALARS_1)
MSL_MATH_2(MSL_SCALARS_2) MSL_COMMON_2(MSL_SCALARS_2)
MSL_MATH_3(MSL_SCALARS_3) MSL_COMMON_3(MSL_SCALARS_3)

// Elementwise functions of the vectors of a type. They are not templates, so that a scalar argument becomes a vector.
#define MSL_EACH(V, e) \
  V r; \
  for (int i = 0; i < vector_traits<V>::size; i++) r[i] = e; \
  return r
#define MSL_LANES_1(V, name) MSL_FN V name(V x) { MSL_EACH(V, name(x[i])); }
#define MSL_LANES_2(V, name) MSL_FN V name(V x, V y) { MSL_EACH(V, name(x[i], y[i])); }
#define MSL_LANES_3(V, name) MSL_FN V name(V x, V y, V z) { MSL_EACH(V, name(x[i], y[i], z[i])); }
#define MSL_FLOATS(L, name) \
  L(float2, name) L(float3, name) L(float4, name) L(half2, name) L(half3, name) L(half4, name)
#define MSL_FLOATS_1(name, f) MSL_FLOATS(MSL_LANES_1, name)
#define MSL_FLOATS_2(name, f) MSL_FLOATS(MSL_LANES_2, name)
#define MSL_FLOATS_3(name, f) MSL_FLOATS(MSL_LANES_3, name)
MSL_MATH_1(MSL_FLOATS_1) MSL_COMMON_1(MSL_FLOATS_1)
MSL_MATH_2(MSL_FLOATS_2) MSL_COMMON_2(MSL_FLOATS_2)
MSL_MATH_3(MSL_FLOATS_3) MSL_COMMON_3(MSL_FLOATS_3)

MSL_FN float frexp(float x, thread int& e) {
  return __builtin_frexpf(x, &e);
}
MSL_FN half frexp(half x, thread int& e) {
  return half(__builtin_frexpf(float(x), &e));
}
MSL_FN float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
MSL_FN half ldexp(half x, int k) {
  return half(__builtin_ldexpf(float(x), k));
}
MSL_FN float modf(float x, thread float& whole) {
  whole = __builtin_truncf(x);
  return __builtin_copysignf(__builtin_isinf(x) ? 0.0f : x - whole, x);
}
MSL_FN float sincos(float x, thread float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
MSL_FN int ilogb(float x) {
  return __builtin_ilogbf(x);
}
MSL_FN float nextafter(float x, float y) {
  return __builtin_nextafterf(x, y);
}

// MLX's bf16_math.h builds its overloads from these names. The mode (fast or precise) is ignored.
#define MSL_INTRINSIC_1(name, f) MSL_FN float __metal_##name(float x, int) { return f(x); }
#define MSL_INTRINSIC_2(name, f) MSL_FN float __metal_##name(float x, float y, int) { return f(x, y); }
#define MSL_INTRINSIC_3(name, f) MSL_FN float __metal_##name(float x, float y, float z, int = 0) { return f(x, y, z); }
MSL_MATH_1(MSL_INTRINSIC_1)
MSL_MATH_2(MSL_INTRINSIC_2)
MSL_MATH_3(MSL_INTRINSIC_3)
MSL_FN float __metal_frexp(float x, thread int* e) {
  return __builtin_frexpf(x, e);
}
MSL_FN float __metal_ldexp(float x, int k, int) {
  return __builtin_ldexpf(x, k);
}
MSL_FN float __metal_nextafter(float x, float y) {
  return __builtin_nextafterf(x, y);
}

// A comparison of vectors gives 0 or -1 in each element. A condition may be any integer vector.
#define MSL_TESTS(T)                                                                                        \
  MSL_FN bool isnan(T x) { return __builtin_isnan(float(x)); }                                              \
  MSL_FN bool isinf(T x) { return __builtin_isinf(float(x)); }                                              \
  MSL_FN bool isfinite(T x) { return __builtin_isfinite(float(x)); }                                        \
  MSL_FN bool isnormal(T x) { return isfinite(x) && __builtin_fabsf(float(x)) >= float(numeric_limits<T>::min()); } \
  MSL_FN bool signbit(T x) { return __builtin_signbit(float(x)) != 0; }                                     \
  MSL_FN bool isunordered(T x, T y) { return isnan(x) || isnan(y); }                                        \
  template <int N>                                                                                          \
  MSL_FN vec<char, N> isnan(vec<T, N> x) { vec<char, N> r; for (int i = 0; i < N; i++) r[i] = isnan(x[i]); return r; } \
  template <int N>                                                                                          \
  MSL_FN vec<char, N> isinf(vec<T, N> x) { vec<char, N> r; for (int i = 0; i < N; i++) r[i] = isinf(x[i]); return r; }
MSL_TESTS(float)
MSL_TESTS(half)
MSL_TESTS(bfloat)

MSL_FN bool all(bool x) {
  return x;
}
MSL_FN bool any(bool x) {
  return x;
}
template <class T, int N>
MSL_FN bool all(vec<T, N> x) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && x[i] != 0;
  return r;
}
template <class T, int N>
MSL_FN bool any(vec<T, N> x) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || x[i] != 0;
  return r;
}
template <class T, enable_if_t<vector_traits<T>::size == 1, bool> = true>
MSL_FN T select(T no, T yes, bool which) {
  return which ? yes : no;
}
template <class T, class C, int N>
MSL_FN vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<C, N> which) {
  MSL_EACH(decltype(no), (which[i] != 0 ? yes[i] : no[i]));
}

#define MSL_GEOMETRY(T)                                                            \
  template <int N>                                                                 \
  MSL_FN T dot(vec<T, N> x, vec<T, N> y) {                                         \
    T r = x[0] * y[0];                                                             \
    for (int i = 1; i < N; i++) r = r + x[i] * y[i];                               \
    return r;                                                                      \
  }                                                                                \
  template <int N>                                                                 \
  MSL_FN T length_squared(vec<T, N> x) { return dot(x, x); }                       \
  template <int N>                                                                 \
  MSL_FN T length(vec<T, N> x) { return sqrt(dot(x, x)); }                         \
  template <int N>                                                                 \
  MSL_FN T distance(vec<T, N> x, vec<T, N> y) { return length(x - y); }            \
  template <int N>                                                                 \
  MSL_FN vec<T, N> normalize(vec<T, N> x) { return x * rsqrt(dot(x, x)); }         \
  MSL_FN vec<T, 3> cross(vec<T, 3> x, vec<T, 3> y) { return x.yzx * y.zxy - x.zxy * y.yzx; }
MSL_GEOMETRY(float)
MSL_GEOMETRY(half)

// fast:: and precise:: have declarations of their own, so that MLX can add bfloat to each.
#define MSL_ALSO(name, f) using metal::name;
#define MSL_MODES                                                   \
  MSL_MATH_1(MSL_ALSO) MSL_MATH_2(MSL_ALSO) MSL_MATH_3(MSL_ALSO)    \
  MSL_COMMON_1(MSL_ALSO) MSL_COMMON_2(MSL_ALSO) MSL_COMMON_3(MSL_ALSO) \
  MSL_ALSO(frexp, ) MSL_ALSO(ldexp, ) MSL_ALSO(modf, ) MSL_ALSO(sincos, ) MSL_ALSO(nextafter, )
namespace fast {
MSL_MODES
}
namespace precise {
MSL_MODES
}

}  // namespace metal
