// The parts of <metal_type_traits> and <metal_limits> that kernels use.
#pragma once

namespace metal {

template <class T, T V>
struct integral_constant {
  static constexpr constant T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T>
struct type_identity {
  using type = T;
};
template <class T>
using type_identity_t = typename type_identity<T>::type;

#define MSL_REMOVE(name, pattern) \
  template <class T>              \
  struct name {                   \
    using type = T;               \
  };                              \
  template <class T>              \
  struct name<pattern> {          \
    using type = T;               \
  };                              \
  template <class T>              \
  using name##_t = typename name<T>::type;
MSL_REMOVE(remove_const, const T)
MSL_REMOVE(remove_volatile, volatile T)
#undef MSL_REMOVE
template <class T>
struct remove_cv {
  using type = remove_const_t<remove_volatile_t<T>>;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
struct remove_reference {
  using type = remove_reference_t<T>;
};
template <class T>
using decay_t = remove_cv_t<remove_reference_t<T>>;

template <class T, class U>
struct is_same : false_type {};
template <class T>
struct is_same<T, T> : true_type {};
template <class T, class U>
constexpr constant bool is_same_v = is_same<T, U>::value;

template <class T, class... U>
struct is_any : bool_constant<(is_same<T, U>::value || ...)> {};
template <class T>
struct is_integral
    : is_any<remove_cv_t<T>, bool, char, uchar, signed char, short, ushort, int, uint, long, ulong> {};
template <class T>
struct is_floating_point : is_any<remove_cv_t<T>, half, bfloat, float> {};
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_unsigned : is_any<remove_cv_t<T>, bool, uchar, ushort, uint, ulong> {};
template <class T>
struct is_signed : bool_constant<is_arithmetic<T>::value && !is_unsigned<T>::value> {};
template <class From, class To>
struct is_convertible : bool_constant<__is_convertible(From, To)> {};
template <class T>
struct is_pointer : bool_constant<__is_pointer(T)> {};

template <class T>
constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T>
constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <class T>
constexpr constant bool is_signed_v = is_signed<T>::value;
template <class From, class To>
constexpr constant bool is_convertible_v = is_convertible<From, To>::value;
template <class T>
constexpr constant bool is_pointer_v = is_pointer<T>::value;

template <class... B>
struct _disjunction : bool_constant<(B::value || ...)> {};
template <class... B>
struct _conjunction : bool_constant<(B::value && ...)> {};
template <class... B>
using disjunction = _disjunction<B...>;
template <class... B>
using conjunction = _conjunction<B...>;

template <class T>
struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, low, high)                       \
  template <>                                                  \
  struct numeric_limits<T> {                                   \
    static constexpr constant bool is_integer = true;          \
    static constexpr constant bool is_signed = T(low) < T(0);  \
    static constexpr constant int digits = sizeof(T) * 8 - (T(low) < T(0)); \
    static constexpr T min() { return low; }                   \
    static constexpr T lowest() { return low; }                \
    static constexpr T max() { return high; }                  \
  };
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, SHRT_MIN, SHRT_MAX)
MSL_INTEGER_LIMITS(ushort, 0, USHRT_MAX)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, LONG_MIN, LONG_MAX)
MSL_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
#undef MSL_INTEGER_LIMITS
template <>
struct numeric_limits<bool> {
  static constexpr bool min() { return false; }
  static constexpr bool lowest() { return false; }
  static constexpr bool max() { return true; }
};

#define MSL_FLOAT_LIMITS(T, smallest, largest, eps, denormal, bits)  \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr constant bool is_integer = false;               \
    static constexpr constant bool is_signed = true;                 \
    static constexpr constant int digits = bits;                     \
    static constexpr T min() { return T(smallest); }                 \
    static constexpr T max() { return T(largest); }                  \
    static constexpr T lowest() { return T(-largest); }              \
    static constexpr T epsilon() { return T(eps); }                  \
    static constexpr T denorm_min() { return T(denormal); }          \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
MSL_FLOAT_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f, 0x1p-149f, 24)
MSL_FLOAT_LIMITS(half, 0x1p-14f, 65504.0f, 0x1p-10f, 0x1p-24f, 11)
MSL_FLOAT_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f, 0x1p-133f, 8)
#undef MSL_FLOAT_LIMITS

}  // namespace metal
