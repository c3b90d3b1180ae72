// <metal_simdgroup_matrix>: 8x8, with two neighbours of a row in each lane.
#pragma once

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has simdgroup matrices of 8x8 only");
  static_assert(is_floating_point_v<T>, "simdgroup matrices are of half, bfloat or float");
  using storage_type = vec<T, 2>;
  storage_type elements;

  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T diagonal);
  MSL_FN thread storage_type& thread_elements() thread { return elements; }
  MSL_FN const thread storage_type& thread_elements() const thread { return elements; }
};

typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

// Lane l holds [row, column] and [row, column + 1].
MSL_FN uint msl_row(uint lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
MSL_FN uint msl_column(uint lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}
MSL_FN uint msl_holder(uint row, uint column) {
  return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column / 2 & 1);
}
MSL_FN uint msl_whole_lane() {  // this lane's number; all 32 lanes must take part
  uint none = 0;
  return msl_exchange(&none, 4, 1)->self;
}

template <class T, int C, int R>
MSL_FN simdgroup_matrix<T, C, R>::simdgroup_matrix(T diagonal) {
  uint lane = msl_whole_lane();
  uint row = msl_row(lane), column = msl_column(lane);
  elements[0] = row == column ? diagonal : T(0.0f);
  elements[1] = row == column + 1 ? diagonal : T(0.0f);
}

template <class T, int C, int R>
MSL_FN simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, C, R> m;
  m.elements[0] = m.elements[1] = value;
  return m;
}

#define MSL_LOAD_STORE(space)                                                                                  \
  template <class T>                                                                                           \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const space T* p, ulong row_elements = 8,    \
                             ulong2 origin = 0, bool transpose = false) {                                      \
    uint lane = msl_whole_lane();                                                                              \
    for (uint i = 0; i < 2; i++) {                                                                             \
      ulong r = msl_row(lane), c = msl_column(lane) + i;                                                       \
      m.elements[i] = p[(origin.y + (transpose ? c : r)) * row_elements + origin.x + (transpose ? r : c)];     \
    }                                                                                                          \
  }                                                                                                            \
  template <class T>                                                                                           \
  MSL_FN void simdgroup_store(thread simdgroup_matrix<T, 8, 8>& m, space T* p, ulong row_elements = 8,         \
                              ulong2 origin = 0, bool transpose = false) {                                     \
    uint lane = msl_whole_lane();                                                                              \
    for (uint i = 0; i < 2; i++) {                                                                             \
      ulong r = msl_row(lane), c = msl_column(lane) + i;                                                       \
      p[(origin.y + (transpose ? c : r)) * row_elements + origin.x + (transpose ? r : c)] = m.elements[i];     \
    }                                                                                                          \
  }
MSL_LOAD_STORE(device)
MSL_LOAD_STORE(threadgroup)
#undef MSL_LOAD_STORE

template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                          thread simdgroup_matrix<B, 8, 8>& b, thread simdgroup_matrix<C, 8, 8>& c) {
  float4 both;
  both[0] = float(a.elements[0]);
  both[1] = float(a.elements[1]);
  both[2] = float(b.elements[0]);
  both[3] = float(b.elements[1]);
  thread msl_lanes* lanes = msl_exchange(&both, sizeof(both), 1);
  uint row = msl_row(lanes->self), column = msl_column(lanes->self);
  float sum[2] = {float(c.elements[0]), float(c.elements[1])};
  for (uint k = 0; k < 8; k++) {
    float left = msl_value<float4>(lanes, msl_holder(row, k))[k % 2];
    float4 right = msl_value<float4>(lanes, msl_holder(k, column));
    sum[0] += left * right[2];
    sum[1] += left * right[3];
  }
  d.elements[0] = D(sum[0]);
  d.elements[1] = D(sum[1]);
}

template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                               thread simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0.0f));
  simdgroup_multiply_accumulate(d, a, b, zero);
}

}  // namespace metal
