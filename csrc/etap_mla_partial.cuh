/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA leaves in the workspace of a row tile that it shares with others: O^T of its part, in
 * accumulator fragments (16 columns of d_v x 8 rows), four numbers a lane.
 *
 * These are float32 or, of kernels with rows on WGMMA's M and a result of bf16, fp16: writing and
 * reading them takes longer than what is computed from them, and their error is an eighth of that
 * of rounding the result. A power of two for each warp that wrote some, its unit, brings the
 * largest of them near fp16's largest number, so that none overflows and small ones keep their
 * bits. With 8 to 32 rows, finding units takes as long as it saves (scripts/TUNING.md).
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

  // A lane's four of a fragment; `index` is their place in slot 0.
  __device__ __forceinline__ uint2* numbers(int32_t index) const {
    return reinterpret_cast<uint2*>(begin_) + index / 4;
  }

  __device__ __forceinline__ float* unit(int32_t math_warp) const {
    return begin_ + kNumbers / 2 + math_warp;
  }

 private:
  float* const begin_;
};

// 1 / unit, exactly.
__device__ __forceinline__ float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// This warp's unit: for_each(f) calls f(value) for all that a thread has. The largest magnitude is
// at least 2^14 units and less than 2^15, unless it is next to nothing. Infinities and NaN do not
// count, and stay what they are.
template <class ForEach>
__device__ __forceinline__ float find_unit(ForEach const& for_each) {
  float largest = 0.f;
  for_each([&](float value) { largest = fmaxf(largest, fabsf(value)); });
  uint32_t bits = __reduce_max_sync(0xffffffff, __float_as_uint(largest));
  if (__builtin_expect(bits == __float_as_uint(INFINITY), 0)) {
    largest = 0.f;
    for_each([&](float value) {
      if (fabsf(value) < INFINITY) largest = fmaxf(largest, fabsf(value));
    });
    bits = __reduce_max_sync(0xffffffff, __float_as_uint(largest));
  }
  return __uint_as_float((max(bits >> 23, 15u) - 14) << 23);
}

// Where a lane finds a fragment in every slot and, if rows are on M, the warp that wrote it.
template <int kRowTile>
struct FragmentPlace {
  int32_t index;
  int32_t math_warp;
  int32_t row;  // the first of its two

  __device__ FragmentPlace(int32_t box, int32_t row_block, int32_t warp, int32_t lane)
      : index(partial_index<kRowTile>(0, box, row_block, warp, lane)),
        math_warp(box / kBoxesPerWarpgroup * 4 + row_block / 2),
        row(row_block * 8 + 2 * (lane % 4)) {}
};

// Neighbouring fragments of fp16 as they lie in memory, so that no load waits for what is made of
// another.
template <int kFragments>
struct HalfFragments {
  uint2 numbers[kFragments];
  float unit;

  template <int kRowTile>
  __device__ __forceinline__ void load(Params const& params, int32_t slot,
                                       FragmentPlace<kRowTile> const& first) {
    HalfPartial<kRowTile> const partial(params, slot);
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) {
      numbers[i] = __ldcg(partial.numbers(first.index + i * 32 * 4));
    }
    unit = __ldcg(partial.unit(first.math_warp));
  }

  // Columns lane / 4 and lane / 4 + 8: (d, row), (d, row + 1), (d + 8, row), (d + 8, row + 1).
  __device__ __forceinline__ float4 fragment(int32_t i) const {
    float2 const first = unpack<cutlass::half_t>(numbers[i].x);
    float2 const second = unpack<cutlass::half_t>(numbers[i].y);
    return {first.x * unit, first.y * unit, second.x * unit, second.y * unit};
  }
};

}  // namespace etap
