// <metal_atomic>, with relaxed order as in Metal: 32 bits, and max and min of 64 bits. Also an empty <metal_logging>.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(is_any<T, int, uint, float, bool, ulong>::value, "Metal has no atomic of this type");
  T value;
};

template <class T>
MSL_FN T msl_bits_to(ulong bits) {
  if constexpr (sizeof(T) == 8) return as_type<T>(bits);
  else if constexpr (sizeof(T) == 4) return as_type<T>(uint(bits));
  else return T(bits);
}
template <class T>
MSL_FN ulong msl_to_bits(T value) {
  if constexpr (sizeof(T) == 8) return as_type<ulong>(value);
  else if constexpr (sizeof(T) == 4) return as_type<uint>(value);
  else return ulong(value);
}

struct msl_set {
  template <class T> MSL_FN static T apply(T, T b) { return b; }
};
struct msl_difference {
  template <class T> MSL_FN static T apply(T a, T b) { return T(a - b); }
};

template <class Op, class T>
MSL_FN T msl_update(thread void* p, T operand) {
  msl_atomic_access(p, sizeof(T), msl_atomic_update);
  T old = msl_bits_to<T>(msl_atomic_read(p, sizeof(T)));
  msl_atomic_write(p, sizeof(T), msl_to_bits<T>(Op::apply(old, operand)));
  return old;
}

#define MSL_ATOMIC_UPDATE(space, name, op, ...)                                                              \
  template <class T>                                                                                         \
  MSL_FN T name(volatile space atomic<T>* p, type_identity_t<T> operand, memory_order) {                     \
    static_assert(is_any<T, __VA_ARGS__>::value, #name " does not exist for this type in Metal");            \
    return msl_update<op, T>((thread void*)ulong(p), operand);                                                      \
  }
#define MSL_ATOMICS(space, ...)                                                                              \
  template <class T>                                                                                         \
  MSL_FN T atomic_load_explicit(const volatile space atomic<T>* p, memory_order) {                           \
    msl_atomic_access((thread void*)ulong(p), sizeof(T), msl_atomic_load);                                          \
    return msl_bits_to<T>(msl_atomic_read((thread void*)ulong(p), sizeof(T)));                                      \
  }                                                                                                          \
  template <class T>                                                                                         \
  MSL_FN void atomic_store_explicit(volatile space atomic<T>* p, type_identity_t<T> value, memory_order) {   \
    msl_atomic_access((thread void*)ulong(p), sizeof(T), msl_atomic_store);                                         \
    msl_atomic_write((thread void*)ulong(p), sizeof(T), msl_to_bits<T>(value));                                     \
  }                                                                                                          \
  template <class T>                                                                                         \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* p, thread T* expected,         \
                                                    type_identity_t<T> desired, memory_order, memory_order) { \
    msl_atomic_access((thread void*)ulong(p), sizeof(T), msl_atomic_update);                                        \
    ulong old = msl_atomic_read((thread void*)ulong(p), sizeof(T));                                                 \
    if (old == msl_to_bits<T>(*expected)) {                                                                  \
      msl_atomic_write((thread void*)ulong(p), sizeof(T), msl_to_bits<T>(desired));                                 \
      return true;                                                                                           \
    }                                                                                                        \
    *expected = msl_bits_to<T>(old);                                                                         \
    return false;                                                                                            \
  }                                                                                                          \
  MSL_ATOMIC_UPDATE(space, atomic_exchange_explicit, msl_set, int, uint, bool, float)                        \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_add_explicit, msl_sum, int, uint, __VA_ARGS__)                       \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_sub_explicit, msl_difference, int, uint, __VA_ARGS__)                \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_max_explicit, msl_max, int, uint)                                    \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_min_explicit, msl_min, int, uint)                                    \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_and_explicit, msl_and, int, uint)                                    \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_or_explicit, msl_or, int, uint)                                      \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_xor_explicit, msl_xor, int, uint)
MSL_ATOMICS(device, float)
MSL_ATOMICS(threadgroup, int)  // float only in device memory

#define MSL_ATOMIC_WIDE(name, op)                                                 \
  MSL_FN void name(volatile device atomic<ulong>* p, ulong value, memory_order) { \
    msl_update<op, ulong>((thread void*)ulong(p), value);                                \
  }
MSL_ATOMIC_WIDE(atomic_max_explicit, msl_max)
MSL_ATOMIC_WIDE(atomic_min_explicit, msl_min)
#undef MSL_ATOMICS
#undef MSL_ATOMIC_UPDATE
#undef MSL_ATOMIC_WIDE

struct os_log {
  constexpr os_log(constant char*, constant char*) constant {}
  template <class... A>
  void log_debug(constant char*, A...) const constant {}
  template <class... A>
  void log_debug(constant char*, A...) const thread {}
};

}  // namespace metal

// OpenCL has types with these names.
#define atomic_int metal::atomic<int>
#define atomic_uint metal::atomic<uint>
#define atomic_bool metal::atomic<bool>
#define atomic_float metal::atomic<float>
#define atomic_ulong metal::atomic<ulong>
