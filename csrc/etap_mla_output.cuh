/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * From accumulator fragments of O^T to rows of the output, and the softmax statistics of a row.
 * Shared by the math and the merge.
 */
#pragma once

#include <cutlass/arch/memory.h>
#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm75.hpp>

#include "etap_mla_traits.cuh"

namespace etap {

// What a thread holds of 16 columns of d_v x 8 rows of an O^T accumulator (d = lane / 4,
// r = 2 * (lane % 4)): (d, r), (d, r + 1), (d + 8, r), (d + 8, r + 1).
struct OutputFragment {
  float value[4];
};

// Over an fp8 cache, columns d and d + 8 of a fragment are columns 2 d and 2 d + 1 of the 16.
template <class Traits>
constexpr bool kHasColumnPairs = Traits::kKvCache != KvCache::kSame;

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

// A fragment by rows, which takes one instruction a half: columns 2 * (lane % 4), and the next, of
// row lane / 4, and the same of the 8 columns behind.
template <typename DType>
__device__ __forceinline__ uint2 transpose_fragment(OutputFragment const& fragment,
                                                    float scale_row_0, float scale_row_1) {
  float const* const value = fragment.value;
  uint2 by_row;
  SM75_U32x1_MOVM_T::copy(pack<DType>(value[0] * scale_row_0, value[1] * scale_row_1), by_row.x);
  SM75_U32x1_MOVM_T::copy(pack<DType>(value[2] * scale_row_0, value[3] * scale_row_1), by_row.y);
  return by_row;
}

// The same of a fragment that has column pairs: columns 4 * (lane % 4) to 4 * (lane % 4) + 3.
__device__ __forceinline__ uint2 interleave_columns(uint2 by_row) {
  return {__byte_perm(by_row.x, by_row.y, 0x5410), __byte_perm(by_row.x, by_row.y, 0x7632)};
}

// Word j of lane i of every four lanes becomes word i of lane j: with a word from each of four
// blocks of 8 columns, a lane gets the 16 bytes that one row has in one block.
__device__ __forceinline__ void transpose_over_quad(uint32_t (&words)[4]) {
  auto swap = [](uint32_t& first, uint32_t& second, uint32_t distance, bool is_upper) {
    uint32_t const received = __shfl_xor_sync(0xffffffff, is_upper ? first : second, distance);
    (is_upper ? first : second) = received;
  };
  bool const is_odd = threadIdx.x & 1, is_upper_pair = threadIdx.x & 2;
  swap(words[0], words[1], 1, is_odd);
  swap(words[2], words[3], 1, is_odd);
  swap(words[0], words[2], 2, is_upper_pair);
  swap(words[1], words[3], 2, is_upper_pair);
}

// 16 bytes of a row.
__device__ __forceinline__ void store_words(uint32_t const (&words)[4], void* target, bool exists) {
  using Words = cutlass::Array<uint32_t, 4>;
  cutlass::arch::global_store<Words, sizeof(Words)>(reinterpret_cast<Words const&>(words), target,
                                                    exists);
}

// Two fragments as 8 rows of the output: a lane writes, of row lane / 4, the 8 columns that belong
// to half lane % 2 of fragment lane % 4 / 2.
template <typename DType>
__device__ __forceinline__ void write_fragments(OutputFragment const& first,
                                                OutputFragment const& second, float scale_row_0,
                                                float scale_row_1, void* target, bool exists) {
  uint2 const a = transpose_fragment<DType>(first, scale_row_0, scale_row_1);
  uint2 const b = transpose_fragment<DType>(second, scale_row_0, scale_row_1);
  uint32_t words[4] = {a.x, a.y, b.x, b.y};
  transpose_over_quad(words);
  store_words(words, target, exists);
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
