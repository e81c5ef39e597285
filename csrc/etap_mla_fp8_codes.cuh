/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Operands of e4m3: P^T as a sum of codes, and V^T.
 */
#pragma once

#include <cutlass/numeric_conversion.h>

#include "etap_mla_fp8_operands.cuh"

namespace etap {

// What the largest P of a tile and row is stored as, log2: e4m3 ends at 448, and its normal numbers
// then reach down to 2^-14 of the largest.
constexpr float kLargestCodeLog2 = 8.f;

// Four numbers as e4m3, and `values` as what they leave, times 2^kShift.
template <int kShift>
__device__ __forceinline__ uint32_t take_codes(cutlass::Array<float, 4>& values) {
  using Code = cutlass::float_e4m3_t;
  auto const codes = cutlass::NumericArrayConverter<Code, float, 4>{}(values);
  auto const taken = cutlass::NumericArrayConverter<float, Code, 4>{}(codes);
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) values[i] = (values[i] - taken[i]) * float(1 << kShift);
  return reinterpret_cast<uint32_t const&>(codes);
}

// A of a WGMMA of e4m3: 16 columns of a warp, 32 tokens.
using ValueFragment = decltype(make_tensor<cutlass::float_e4m3_t>(Shape<_16>{}));

// Of pairs of columns, transposed: the pair becomes rows lane / 4 and lane / 4 + 8 of A, and so of
// O^T. Tokens t and t + 8 of each 16 become neighbours, as they are in P^T.
__device__ __forceinline__ void arrange_values(Fp8Codes const& codes, ValueFragment& fragment) {
  Tensor words = recast<uint32_t>(fragment);
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    uint32_t const tokens_0 = codes.matrix[2 * i], tokens_8 = codes.matrix[2 * i + 1];
    words(2 * i) = __byte_perm(tokens_0, tokens_8, 0x6240);
    words(2 * i + 1) = __byte_perm(tokens_0, tokens_8, 0x7351);
  }
  warpgroup_fence_operand(words);  // not behind the warpgroup_arrive() that follows
}

}  // namespace etap
