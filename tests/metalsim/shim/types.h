// Address spaces, scalars, vectors and their constructors.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define thread __private
#define kernel
#define vertex
#define fragment
#define METAL_FUNC inline __attribute__((always_inline, nodebug))  // nodebug: a finding names the line of the caller
#define MSL_FN inline __attribute__((always_inline, nodebug))
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

// Keywords of OpenCL that have no meaning in Metal.
#define local local_
#define global global_
#define generic generic_
#define pipe pipe_
#define read_only read_only_
#define write_only write_only_
#define read_write read_write_

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class V>
struct vector_traits {
  using element = V;
  enum { size = 1 };
};
template <class T, int N>
struct vector_traits<vec<T, N>> {
  using element = T;
  enum { size = N };
};

// Type(arguments...), which Clang's vectors lack: one scalar fills all elements, scalars and vectors are joined.
template <class V, class A>
MSL_FN constexpr void msl_fill(thread V& out, thread int& at, A a) {
  using T = typename vector_traits<V>::element;
  if constexpr (vector_traits<A>::size == 1) {
    out[at++] = T(a);
  } else {
    for (int i = 0; i < vector_traits<A>::size; i++) {
      out[at++] = T(a[i]);
    }
  }
}

template <class V>
MSL_FN constexpr V msl_make() {
  return V{};
}

template <class V, class... A>
MSL_FN constexpr V msl_make(A... arguments) {
  if constexpr (vector_traits<V>::size == 1) {
    return V(arguments...);
  } else {
    constexpr int given = (0 + ... + int(vector_traits<A>::size));
    V out{};
    int at = 0;
    if constexpr (sizeof...(A) == 1 && given == 1) {
      for (int i = 0; i < vector_traits<V>::size; i++) {
        (msl_fill(out, at, arguments), ...);
      }
    } else {
      static_assert(given == vector_traits<V>::size, "a vector is made of exactly as many elements as it has");
      (msl_fill(out, at, arguments), ...);
    }
    return out;
  }
}

template <class T, class U>
MSL_FN constexpr T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type is between types of one size");
  return __builtin_bit_cast(T, value);
}

}  // namespace metal

// There are no packed vectors of 3, because Clang has none of that size.
#define MSL_VECTORS(T)                                            \
  typedef metal::vec<T, 2> T##2;                                  \
  typedef metal::vec<T, 3> T##3;                                  \
  typedef metal::vec<T, 4> T##4;                                  \
  typedef T##2 packed_##T##2 __attribute__((aligned(sizeof(T)))); \
  typedef T##4 packed_##T##4 __attribute__((aligned(sizeof(T)))); \
  namespace metal {                                               \
  using ::T##2;                                                   \
  using ::T##3;                                                   \
  using ::T##4;                                                   \
  }
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS
typedef char2 bool2;  // Clang's OpenCL has no vectors of bool
typedef char3 bool3;
typedef char4 bool4;

using metal::as_type;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1.0p-126f
#define FLT_EPSILON 0x1.0p-23f
#define HALF_MAX 65504.0h
#define MAXHALF 65504.0h
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LOG10E_F 0.434294481903251827651128918916605082f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_2_F 1.57079632679489661923132169163975144f
#define M_PI_4_F 0.785398163397448309615660845819875721f
#define M_1_PI_F 0.318309886183790671537767526745028724f
#define M_2_PI_F 0.636619772367581343075535053490057448f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
#define CHAR_BIT 8
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul
