/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA leaves in the workspace of a row tile that it shares with others: O^T of its part, in
 * accumulator fragments (16 columns of d_v x 8 rows), four numbers a lane.
 *
 * Next to a result of bf16 they are fp16: writing and reading them takes longer than what is
 * computed from them, and their error is an eighth of that of rounding the result. A warp stores
 * its numbers as they are before it knows whether fp16 has them all, as it nearly always does; if
 * not, it stores them again, over a power of two of their own, and the CTA says so when it comes to
 * the merge: looking at powers that are all 1 would take as long as fp16 saves. Next to a result of
 * fp16, and where parts are folded, they are float32.
 */
#pragma once

#include <cuda_fp16.h>

#include "etap_mla_output.cuh"

namespace etap {

// Numbers of a partial result before those of lane `lane` in fragment (box of d_v, 8-row block,
// warp).
template <int kRowTile>
__device__ __forceinline__ int32_t place_in_partial(int32_t box, int32_t row_block, int32_t warp,
                                                    int32_t lane) {
  int32_t const fragment = (box * (kRowTile / 8) + row_block) * 4 + warp;
  return (fragment * 32 + lane) * 4;
}

// A slot of the workspace, which has room for float32. Numbers of fp16 take the first half of it,
// and the powers of the warps that wrote them begin the second.
template <int kRowTile>
class Partial {
  static constexpr int32_t kNumbers = kHeadDimCkv * kRowTile;

 public:
  __device__ __forceinline__ Partial(Params const& params, int32_t slot)
      : begin_(params.partial_out + slot * kNumbers) {}

  // From a place on.
  __device__ __forceinline__ float* floats(int32_t place) const { return begin_ + place; }
  __device__ __forceinline__ uint32_t* pairs_of_halves(int32_t place) const {
    return reinterpret_cast<uint32_t*>(begin_) + place / 2;
  }

  __device__ __forceinline__ float* power(int32_t math_warp) const {
    return begin_ + kNumbers / 2 + math_warp;
  }

 private:
  float* const begin_;
};

// The larger magnitude of each half of two words of fp16; NaN do not count.
__device__ __forceinline__ __half2 larger_magnitudes(__half2 largest, uint32_t numbers) {
  return __hmax2(largest, __habs2(reinterpret_cast<__half2 const&>(numbers)));
}

// Whether a warp's numbers, of which these are the largest, may be stored as they are. fp16 has
// those below 2^16; of small ones no more than 2^-25 is lost, which is little beside a largest one
// of 2^-8 or more.
__device__ __forceinline__ bool suit_fp16(__half2 largest) {
  constexpr uint32_t kInfinity = 0x7c00, kLeast = (15 - 8) << 10;  // 2^-8
  uint32_t const bits = reinterpret_cast<uint32_t const&>(largest);
  uint32_t const of_warp = __reduce_max_sync(0xffffffff, max(bits & 0xffff, bits >> 16));
  return of_warp - kLeast < kInfinity - kLeast;
}

// Over this power of two, the largest magnitude of a warp is at least 2^14 and less than 2^15,
// unless it is next to nothing. Infinities and NaN do not count, and stay what they are.
// for_each(f) calls f(value) for all that a thread has.
template <class ForEach>
__device__ __forceinline__ float find_power(ForEach const& for_each) {
  float largest = 0.f;
  for_each([&](float value) {
    if (fabsf(value) < INFINITY) largest = fmaxf(largest, fabsf(value));
  });
  uint32_t const bits = __reduce_max_sync(0xffffffff, __float_as_uint(largest));
  return __uint_as_float((max(bits >> 23, 15u) - 14) << 23);
}

// Exactly.
__device__ __forceinline__ float inverse_of_power(float power) {
  return __uint_as_float((254u << 23) - __float_as_uint(power));
}

// Stores what a warp has. store(scale) stores all that a thread has, each number as scale(number),
// and returns the largest magnitudes that it stored.
template <int kRowTile, class Store, class ForEach>
__device__ __forceinline__ void store_halves(Partial<kRowTile> const& partial, int32_t math_warp,
                                             MergeWork& merge, Store const& store,
                                             ForEach const& for_each) {
  float power = 1.f;
  __half2 const largest = store([](float value) { return value; });
  if (__builtin_expect(!suit_fp16(largest), 0)) {
    power = find_power(for_each);
    float const factor = inverse_of_power(power);
    store([factor](float value) { return value * factor; });
    merge.has_powers = true;
  }
  if (threadIdx.x % 32 == 0) *partial.power(math_warp) = power;
}

// Where a lane finds a fragment in every slot, and its power.
template <class Traits>
struct FragmentPlace {
  int32_t place;
  int32_t math_warp;
  int32_t row;  // the first of its two

  __device__ FragmentPlace(int32_t box, int32_t row_block, int32_t warp, int32_t lane)
      : place(place_in_partial<Traits::kRowTile>(box, row_block, warp, lane)),
        math_warp(Traits::kHasRowsOnM ? box / kBoxesPerWarpgroup * 4 + row_block / 2
                                      : box % kMathWarpgroups * 4 + warp),
        row(row_block * 8 + 2 * (lane % 4)) {}
};

// Neighbouring fragments as they lie in memory, so that no load waits for what is made of another.
// Of each a lane has, in columns d = lane / 4 and d + 8, (d, row), (d, row + 1), (d + 8, row),
// (d + 8, row + 1).
template <int kFragments>
struct FloatFragments {
  using Lane = float4;
  Lane numbers[kFragments];

  __device__ __forceinline__ void load(Lane const* source) {
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) numbers[i] = __ldcg(source + i * 32);
  }

  __device__ __forceinline__ float4 fragment(int32_t i) const { return numbers[i]; }
};

template <int kFragments>
struct HalfFragments {
  using Lane = uint2;
  Lane numbers[kFragments];

  __device__ __forceinline__ void load(Lane const* source) {
#pragma unroll
    for (int32_t i = 0; i < kFragments; ++i) numbers[i] = __ldcg(source + i * 32);
  }

  __device__ __forceinline__ float4 fragment(int32_t i) const {
    float2 const first = unpack<cutlass::half_t>(numbers[i].x);
    float2 const second = unpack<cutlass::half_t>(numbers[i].y);
    return {first.x, first.y, second.x, second.y};
  }
};

template <class Traits, int kFragments>
using PartialFragments = std::conditional_t<Traits::kHasHalfPartials, HalfFragments<kFragments>,
                                            FloatFragments<kFragments>>;

// Of neighbouring fragments, which one warp wrote or four.
template <class Traits, int kFragments>
struct Powers {
  static constexpr int kPowers = Traits::kHasRowsOnM ? 1 : kFragments;
  cutlass::AlignedArray<float, kPowers> powers;

  __device__ __forceinline__ void load(Partial<Traits::kRowTile> const& partial,
                                       FragmentPlace<Traits> const& first) {
    float const* const source = partial.power(first.math_warp);
    if constexpr (kPowers == 1) {
      powers[0] = __ldcg(source);
    } else {
      static_assert(kPowers == 4, "a box of four");
      reinterpret_cast<float4&>(powers) = __ldcg(reinterpret_cast<float4 const*>(source));
    }
  }

  __device__ __forceinline__ float of(int32_t fragment) const {
    return powers[kPowers == 1 ? 0 : fragment];
  }
};

}  // namespace etap
