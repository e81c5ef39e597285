/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Partial results: what a CTA leaves in the workspace of a row tile that it shares with others. O^T
 * of a part lies there in fragments, 16 columns of d_v x 8 rows of a warp, four numbers a lane.
 *
 * Next to a result of bf16 these are fp16: they are written and read again, which takes longer than
 * what is computed from them, and their error is an eighth of that of rounding the result. A power
 * of two for each row of some columns, the unit, brings the largest of them near fp16's largest
 * number, so that none overflows and small ones keep their bits. Next to a result of fp16 they are
 * float32.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

template <class Traits>
constexpr bool kHasHalfPartials = std::is_same_v<typename Traits::DType, cutlass::bfloat16_t>;

// Place of lane `lane` of a fragment, in numbers of a slot.
template <int kRowTile>
__device__ __forceinline__ int32_t partial_index(int32_t box, int32_t row_block, int32_t warp,
                                                 int32_t lane) {
  int32_t const fragment = (box * (kRowTile / 8) + row_block) * 4 + warp;
  return (fragment * 32 + lane) * 4;
}

// A slot of the workspace: room for O^T in float32. Numbers of fp16 take the first half of it, and
// units begin the second.
template <int kRowTile>
class PartialSlot {
  static constexpr int32_t kNumbers = kHeadDimCkv * kRowTile;

 public:
  __device__ __forceinline__ PartialSlot(Params const& params, int32_t slot)
      : begin_(params.partial_out + slot * kNumbers) {}

  __device__ __forceinline__ float* floats(int32_t index) const { return begin_ + index; }

  // Numbers index and index + 1.
  __device__ __forceinline__ uint32_t* halves(int32_t index) const {
    return reinterpret_cast<uint32_t*>(begin_) + index / 2;
  }

  // Of the columns that have one unit a row.
  __device__ __forceinline__ float* unit(int32_t columns, int32_t row) const {
    return begin_ + kNumbers / 2 + columns * kRowTile + row;
  }

 private:
  float* const begin_;
};

// 1 / unit, exactly.
__device__ __forceinline__ float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// Finds units for this thread's values of kRows rows: for_each(f) calls f(i, value) for those of
// row i. A row lies in lanes kFirstDistance, and its doubles to kLastDistance, apart. Values are
// less than 2^15 units, the largest at least 2^14; infinities and NaN stay what they are, and do
// not count.
template <int kFirstDistance, int kLastDistance, int kRows, class ForEach>
__device__ __forceinline__ void find_units(float (&unit)[kRows], ForEach const& for_each) {
  constexpr uint32_t kSmallestExponent = 15;  // of a float32 that has a unit
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) unit[i] = 0.f;
  bool is_finite = true;
  for_each([&](int32_t i, float value) { unit[i] = fmaxf(unit[i], fabsf(value)); });
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) is_finite &= unit[i] < INFINITY;
  if (__builtin_expect(!__all_sync(0xffffffff, is_finite), 0)) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) unit[i] = 0.f;
    for_each([&](int32_t i, float value) {
      if (fabsf(value) < INFINITY) unit[i] = fmaxf(unit[i], fabsf(value));
    });
  }
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
    for (int32_t distance = kFirstDistance; distance <= kLastDistance; distance *= 2) {
      unit[i] = fmaxf(unit[i], __shfl_xor_sync(0xffffffff, unit[i], distance));
    }
    uint32_t const exponent = max(__float_as_uint(unit[i]) >> 23, kSmallestExponent);
    unit[i] = __uint_as_float((exponent - (kSmallestExponent - 1)) << 23);
  }
}

// Of a warp whose lanes have two neighbouring rows in every eight.
template <int kRowTile, int kRows>
__device__ __forceinline__ void write_units_of_warp(PartialSlot<kRowTile> const& partial,
                                                    int32_t columns, int32_t lane,
                                                    float const (&unit)[kRows]) {
  if (lane >= 4) return;
#pragma unroll
  for (int32_t i = 0; i < kRows; i += 2) {
    *reinterpret_cast<float2*>(partial.unit(columns, i / 2 * 8 + 2 * lane)) =
        make_float2(unit[i], unit[i + 1]);
  }
}

// Where a lane finds a fragment in every slot.
template <class Traits>
struct FragmentPlace {
  int32_t index;
  int32_t row;      // the first of its two
  int32_t columns;  // whose unit its rows have

  __device__ FragmentPlace(int32_t box, int32_t row_block, int32_t warp, int32_t lane)
      : index(partial_index<Traits::kRowTile>(box, row_block, warp, lane)),
        row(row_block * 8 + 2 * (lane % 4)),
        columns(Traits::kPartialUnits == 2 ? box / kBoxesPerWarpgroup : box % 2 * 4 + warp) {}
};

// Neighbouring fragments of a part, as they lie in memory, so that no load waits for what is made
// of another.
template <class Traits, int kFragments>
class LoadedPartial {
 public:
  // From here on.
  __device__ __forceinline__ void load(Params const& params, int32_t slot,
                                       FragmentPlace<Traits> const& place) {
    PartialSlot<Traits::kRowTile> const source(params, slot);
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) {
      int32_t const index = place.index + i * 32 * 4;
      void const* const numbers = kIsHalf ? static_cast<void*>(source.halves(index))
                                          : static_cast<void*>(source.floats(index));
      numbers_[i] = __ldcg(static_cast<Numbers const*>(numbers));
    }
#pragma unroll
    for (int32_t i = 0; i < kUnits; ++i) {
      unit_[i] = __ldcg(reinterpret_cast<float2 const*>(source.unit(place.columns + i, place.row)));
    }
  }

  // Columns lane / 4 and lane / 4 + 8: (d, row), (d, row + 1), (d + 8, row), (d + 8, row + 1).
  __device__ __forceinline__ float4 fragment(int32_t i) const {
    if constexpr (kIsHalf) {
      float2 const unit = unit_[kUnits == 1 ? 0 : i];
      float2 const first = unpack<cutlass::half_t>(numbers_[i].x);
      float2 const second = unpack<cutlass::half_t>(numbers_[i].y);
      return {first.x * unit.x, first.y * unit.y, second.x * unit.x, second.y * unit.y};
    } else {
      return numbers_[i];
    }
  }

 private:
  static constexpr bool kIsHalf = kHasHalfPartials<Traits>;
  static constexpr int kUnits = !kIsHalf ? 0 : Traits::kPartialUnits == 2 ? 1 : kFragments;
  using Numbers = std::conditional_t<kIsHalf, uint2, float4>;

  Numbers numbers_[kFragments] = {};
  float2 unit_[kUnits == 0 ? 1 : kUnits] = {};
};

}  // namespace etap
