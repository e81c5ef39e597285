/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA leaves in the workspace of a row tile that it shares with others: O^T of its part, in
 * accumulator fragments (16 columns of d_v x 8 rows), four numbers a lane.
 *
 * Next to a result of bf16 they are fp16, for writing and reading them takes longer than what is
 * computed from them, and their error is an eighth of that of rounding the result. A power of two
 * for each warp that wrote some, its unit, brings the largest of these near fp16's largest number,
 * so that none overflows and small ones keep their bits. Next to a result of fp16, and where parts
 * are folded, they are float32.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

template <class Traits>
constexpr bool kHasHalfPartials = std::is_same_v<typename Traits::DType, cutlass::bfloat16_t>;

// A slot of the workspace, which has room for float32. Numbers of fp16 take the first half of it,
// and units begin the second.
template <int kRowTile>
class HalfPartial {
  static constexpr int32_t kNumbers = kHeadDimCkv * kRowTile;

 public:
  __device__ __forceinline__ HalfPartial(Params const& params, int32_t slot)
      : begin_(params.partial_out + slot * kNumbers) {}

  // Two of a lane's four of a fragment, and the next; `index` is their place in slot 0.
  __device__ __forceinline__ uint32_t* numbers(int32_t index) const {
    return reinterpret_cast<uint32_t*>(begin_) + index / 2;
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

// Where a lane finds a fragment in every slot, and its unit.
template <class Traits>
struct FragmentPlace {
  int32_t index;
  int32_t math_warp;
  int32_t row;  // the first of its two

  __device__ FragmentPlace(int32_t box, int32_t row_block, int32_t warp, int32_t lane)
      : index(partial_index<Traits::kRowTile>(0, box, row_block, warp, lane)),
        math_warp(Traits::kHasRowsOnM ? box / kBoxesPerWarpgroup * 4 + row_block / 2
                                      : box % kMathWarpgroups * 4 + warp),
        row(row_block * 8 + 2 * (lane % 4)) {}
};

// Neighbouring fragments of fp16 as they lie in memory, so that no load waits for what is made of
// another.
template <class Traits, int kFragments>
struct HalfFragments {
  // Neighbours are of one warp or of four.
  static constexpr int kUnits = Traits::kHasRowsOnM ? 1 : kFragments;
  using Units = cutlass::AlignedArray<float, kUnits>;

  uint2 numbers[kFragments];
  Units units;

  __device__ __forceinline__ void load(Params const& params, int32_t slot,
                                       FragmentPlace<Traits> const& first) {
    HalfPartial<Traits::kRowTile> const partial(params, slot);
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) {
      numbers[i] =
          __ldcg(reinterpret_cast<uint2 const*>(partial.numbers(first.index + i * 32 * 4)));
    }
    if constexpr (kUnits == 1) {
      units[0] = __ldcg(partial.unit(first.math_warp));
    } else {
      static_assert(kUnits == 4, "a box of four");
      reinterpret_cast<float4&>(units) =
          __ldcg(reinterpret_cast<float4 const*>(partial.unit(first.math_warp)));
    }
  }

  // Columns lane / 4 and lane / 4 + 8: (d, row), (d, row + 1), (d + 8, row), (d + 8, row + 1).
  __device__ __forceinline__ float4 fragment(int32_t i) const {
    float const unit = units[kUnits == 1 ? 0 : i];
    float2 const first = unpack<cutlass::half_t>(numbers[i].x);
    float2 const second = unpack<cutlass::half_t>(numbers[i].y);
    return {first.x * unit, first.y * unit, second.x * unit, second.y * unit};
  }
};

}  // namespace etap
