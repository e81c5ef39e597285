/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * WGMMA's A operand from e4m3 codes, the order in which reading, converting and multiplying follow
 * one another, and what becomes of a product while others are made.
 */
#pragma once

#include <cute/tensor.hpp>

#include "etap_mla_traits.cuh"

namespace etap {

// Two e4m3 codes, the lower or the upper of four, as two fp16.
__device__ __forceinline__ uint32_t lower_codes_to_fp16(uint32_t codes) {
  uint32_t pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
      : "=r"(pair)
      : "r"(codes));
  return pair;
}

__device__ __forceinline__ uint32_t upper_codes_to_fp16(uint32_t codes) {
  uint32_t pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }"
      : "=r"(pair)
      : "r"(codes));
  return pair;
}

// Four 8 x 8 matrices of pairs of codes: A of two WGMMAs, of 16 columns or tokens each.
struct Fp8Codes {
  uint32_t matrix[4];
};
// A of a WGMMA.
using Fp8Fragment = decltype(make_tensor<cutlass::half_t>(Shape<_8>{}));

// Columns 4 q and 4 q + 1 become k = 2 q and 2 q + 1, columns 4 q + 2 and 4 q + 3 become those
// plus 8; the queries lie in the same order.
__device__ __forceinline__ void convert_keys(Fp8Codes const& codes, int32_t half,
                                             Fp8Fragment& fragment) {
  Tensor words = recast<uint32_t>(fragment);
  uint32_t const tokens_0 = codes.matrix[2 * half], tokens_8 = codes.matrix[2 * half + 1];
  words(0) = lower_codes_to_fp16(tokens_0);
  words(1) = lower_codes_to_fp16(tokens_8);
  words(2) = upper_codes_to_fp16(tokens_0);
  words(3) = upper_codes_to_fp16(tokens_8);
}

// The pair of columns becomes rows lane / 4 and lane / 4 + 8 of A, and so of O^T.
__device__ __forceinline__ void convert_values(Fp8Codes const& codes, int32_t half,
                                               Fp8Fragment& fragment) {
  Tensor words = recast<uint32_t>(fragment);
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    uint32_t const by_column = __byte_perm(codes.matrix[2 * half + i], 0, 0x3120);
    words(2 * i) = lower_codes_to_fp16(by_column);
    words(2 * i + 1) = upper_codes_to_fp16(by_column);
  }
}

// Runs kSteps WGMMAs in groups: load(n) reads the codes of steps 2 n and 2 n + 1, convert(codes,
// half, fragment) makes A of half of them, multiply(fragment, step) issues a WGMMA, release(n) is
// told the last n converted, finish(group) that every WGMMA before the group is done. While a group
// of kGroup runs, the next is converted, for which the codes were read before.
template <int kSteps, int kGroup, typename Load, typename Convert, typename Multiply,
          typename Release, typename Finish>
__device__ __forceinline__ void run_steps(Load load, Convert convert, Multiply multiply,
                                          Release release, Finish finish) {
  constexpr int32_t kGroups = kSteps / kGroup;
  Fp8Codes codes[2][kGroup / 2];
  Fp8Fragment fragment[2][kGroup];
  auto load_group = [&](int32_t group) {
#pragma unroll
    for (int32_t i = 0; i < kGroup / 2; ++i) {
      codes[group % 2][i] = load(group * (kGroup / 2) + i);
    }
  };
  load_group(0);
#pragma unroll
  for (int32_t group = 0; group < kGroups; ++group) {
    if (group + 1 < kGroups) load_group(group + 1);
#pragma unroll
    for (int32_t i = 0; i < kGroup; ++i) {
      convert(codes[group % 2][i / 2], i % 2, fragment[group % 2][i]);
    }
    warpgroup_arrive();
#pragma unroll
    for (int32_t i = 0; i < kGroup; ++i) multiply(fragment[group % 2][i], group * kGroup + i);
    warpgroup_commit_batch();
    release((group + 1) * (kGroup / 2) - 1);
    warpgroup_wait<1>();  // the group before, whose fragments the next one takes
    finish(group);
  }
  warpgroup_wait<0>();
}

// sum += product * factor, which stays behind the wait for the product. (A fence of its register,
// while other WGMMAs run, makes ptxas serialise all of them.)
__device__ __forceinline__ void add_product(float& sum, float product, float factor) {
  asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(sum) : "f"(product), "f"(factor));
}

}  // namespace etap
