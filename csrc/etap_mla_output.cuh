/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * From accumulator fragments of O^T to rows of the output, and the softmax statistics of a row.
 * Shared by the attention kernel and the merge kernel.
 */
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm75.hpp>

#include "etap_mla_traits.cuh"

namespace etap {

// What a thread holds of 16 columns of d_v x 8 rows of an O^T accumulator (d = lane / 4,
// r = 2 * (lane % 4)): (d, r), (d, r + 1), (d + 8, r), (d + 8, r + 1).
struct OutputFragment {
  float value[4];
};

template <typename DType>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  cutlass::Array<float, 2> pair;
  pair[0] = low;
  pair[1] = high;
  auto const packed = cutlass::NumericArrayConverter<DType, float, 2>{}(pair);
  return reinterpret_cast<uint32_t const&>(packed);
}

template <typename DType>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  auto const pair = cutlass::NumericArrayConverter<float, DType, 2>{}(
      reinterpret_cast<cutlass::Array<DType, 2> const&>(packed));
  return {pair[0], pair[1]};
}

// Address of the output row `packed_row`, where packed_row = query * num_heads + head.
template <typename DType>
__device__ __forceinline__ DType* output_row(Params const& params, int32_t packed_row) {
  int32_t query, head;
  params.divide_by_heads(query, head, packed_row);
  return static_cast<DType*>(params.out) + query * params.out_stride_token +
         head * params.out_stride_head;
}

// Writes a fragment whose first column is `column`. The transposition of 8 x 8 values takes one
// instruction a half; afterwards a thread owns two neighbouring columns of row lane / 4, whose
// address is `row` (ignored unless row_exists). Called by whole warps.
template <typename DType>
__device__ __forceinline__ void store_fragment(OutputFragment const& fragment, float scale_row_0,
                                               float scale_row_1, DType* row, int32_t column,
                                               bool row_exists) {
  int32_t const lane = threadIdx.x % 32;
#pragma unroll
  for (int32_t half = 0; half < 2; ++half) {
    uint32_t const by_column = pack<DType>(fragment.value[2 * half] * scale_row_0,
                                           fragment.value[2 * half + 1] * scale_row_1);
    uint32_t by_row;
    SM75_U32x1_MOVM_T::copy(by_column, by_row);
    if (row_exists) {
      *reinterpret_cast<uint32_t*>(row + column + 8 * half + 2 * (lane % 4)) = by_row;
    }
  }
}

// Where lane `lane` of fragment (box of d_v, 8-row block, warp) lies in a partial result.
template <int kRowTile>
__device__ __forceinline__ int32_t partial_index(int32_t slot, int32_t box, int32_t row_block,
                                                 int32_t warp, int32_t lane) {
  int32_t const fragment = (box * (kRowTile / 8) + row_block) * 4 + warp;
  return slot * (kHeadDimCkv * kRowTile) + (fragment * 32 + lane) * 4;
}

// 1 / sum, with 0 for a row that saw no token; NaN stays NaN.
__device__ __forceinline__ float normalizer(float row_sum) {
  return row_sum == 0.f ? 0.f : 1.f / row_sum;
}

// The row's maximum and sum are in powers of two; a row that saw no token has LSE -inf.
__device__ __forceinline__ float log_sum_exp(Params const& params, float row_max, float row_sum) {
  return row_sum == 0.f ? -INFINITY : (row_max + log2f(row_sum)) * params.lse_factor;
}

// exp2(from - to) for running maxima, where -inf means that no token was seen yet.
__device__ __forceinline__ float rescale_factor(float from, float to) {
  return exp2f(from - (to == -INFINITY ? 0.f : to));
}

}  // namespace etap
