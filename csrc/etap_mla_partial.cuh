/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA leaves in the workspace of a row tile that it shares with others: O^T of its part, in
 * accumulator fragments (16 columns of d_v x 8 rows of a warp), four numbers a lane.
 *
 * These are float32 or, of kernels with rows on WGMMA's M and a result of bf16, fp16: writing and
 * reading them takes longer than whatever is computed from them, and their error is an eighth of
 * that of rounding the result. A power of two for each row and half of d_v, its unit, brings the
 * largest of them near fp16's largest number: none overflows, and small ones keep their bits.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

// A slot of the workspace, which has room for float32. Numbers of fp16 take the first half of it,
// and units begin the second.
template <int kRowTile>
class HalfPartial {
  static constexpr int32_t kNumbers = kHeadDimCkv * kRowTile;

 public:
  __device__ __forceinline__ HalfPartial(Params const& params, int32_t slot)
      : begin_(params.partial_out + slot * kNumbers) {}

  // A lane's four of a fragment; `index` is its place in slot 0.
  __device__ __forceinline__ uint2* numbers(int32_t index) const {
    return reinterpret_cast<uint2*>(begin_) + index / 4;
  }

  __device__ __forceinline__ float* unit(int32_t half, int32_t row) const {
    return begin_ + kNumbers / 2 + half * kRowTile + row;
  }

 private:
  float* const begin_;
};

// A row's unit, from the largest of its magnitudes: a power of two, of which that is at least 2^14
// and less than 2^15 or, if it is next to nothing, less.
__device__ __forceinline__ float unit_of(float largest) {
  uint32_t const exponent = max(__float_as_uint(largest) >> 23, 15u);
  return __uint_as_float((exponent - 14) << 23);
}

// 1 / unit, exactly.
__device__ __forceinline__ float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// The largest magnitudes of a warp's rows, of which a thread has kRows, and four lanes each:
// for_each(f) calls f(i, value) for the values of row i. Infinities and NaN do not count.
template <int kRows, class ForEach>
__device__ __forceinline__ void find_largest(float (&largest)[kRows], ForEach const& for_each) {
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) largest[i] = 0.f;
  for_each([&](int32_t i, float value) { largest[i] = fmaxf(largest[i], fabsf(value)); });
  bool is_finite = true;
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) is_finite &= largest[i] < INFINITY;
  if (__builtin_expect(!__all_sync(0xffffffff, is_finite), 0)) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) largest[i] = 0.f;
    for_each([&](int32_t i, float value) {
      if (fabsf(value) < INFINITY) largest[i] = fmaxf(largest[i], fabsf(value));
    });
  }
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) {
    largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 1));
    largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 2));
  }
}

// Where a lane finds a fragment in every slot.
template <class Traits>
struct FragmentPlace {
  int32_t index;
  int32_t half;  // of d_v
  int32_t row;   // the first of its two

  __device__ FragmentPlace(int32_t box, int32_t row_block, int32_t warp, int32_t lane)
      : index(partial_index<Traits::kRowTile>(0, box, row_block, warp, lane)),
        half(box / kBoxesPerWarpgroup),
        row(row_block * 8 + 2 * (lane % 4)) {}
};

// Neighbouring fragments of fp16 as they lie in memory, so that no load waits for what is made of
// another.
template <int kFragments>
struct HalfFragments {
  uint2 numbers[kFragments];
  float2 unit;

  template <class Traits>
  __device__ __forceinline__ void load(Params const& params, int32_t slot,
                                       FragmentPlace<Traits> const& first) {
    HalfPartial<Traits::kRowTile> const partial(params, slot);
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) {
      numbers[i] = __ldcg(partial.numbers(first.index + i * 32 * 4));
    }
    unit = __ldcg(reinterpret_cast<float2 const*>(partial.unit(first.half, first.row)));
  }

  // Columns lane / 4 and lane / 4 + 8: (d, row), (d, row + 1), (d + 8, row), (d + 8, row + 1).
  __device__ __forceinline__ float4 fragment(int32_t i) const {
    float2 const first = unpack<cutlass::half_t>(numbers[i].x);
    float2 const second = unpack<cutlass::half_t>(numbers[i].y);
    return {first.x * unit.x, first.y * unit.y, second.x * unit.x, second.y * unit.y};
  }
};

}  // namespace etap
