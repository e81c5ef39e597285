/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Queries for a cache of fp8: the loader copies them as they are, the math threads convert them to
 * fp16 in place; for a kpe of bf16 the part of pe is that, too.
 */
#pragma once

#include "etap_mla_fp8_traits.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_output.cuh"

namespace etap {

// The power of two that brings `largest` to [2^14, 2^15): as far up as fp16 goes, so that the small
// values of the row stay normal. Clamped so that it and its inverse are normal floats.
__device__ __forceinline__ float fp16_scale(float largest) {
  int32_t const exponent = (__float_as_int(largest) >> 23) - 127;
  int32_t const shift = min(max(14 - exponent, -126), 126);
  return __int_as_float((shift + 127) << 23);
}

// Called by all math threads, eight lanes a row. A row is multiplied by a power of two and becomes
// fp16, which leaves bf16 and fp16 values as they are. Within 16 columns, of every four neighbours
// the first two go to the lower and the others to the upper half: the order in which ldmatrix
// delivers the keys.
template <class Traits>
class QueryConverter {
  using DType = typename Traits::DType;
  using KpeElement = cutlass::bfloat16_t;  // if kHasTokenScales
  static constexpr int kQueryBoxes = Traits::kQueryBoxes;
  // The box of pe is not for codes if kpe is of bf16.
  static constexpr int kFirstBox = Traits::kHasTokenScales ? 1 : 0;

 public:
  __device__ QueryConverter(Params const& params, typename Traits::SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ void convert_row(int32_t row) {
    float largest = 0.f;
#pragma unroll
    for (int32_t box = kFirstBox; box < kQueryBoxes; ++box) {
      largest = fmaxf(largest, largest_of_box(row, box));
    }
#pragma unroll
    for (int32_t lanes = 1; lanes < 8; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
    }
    float const scale = fp16_scale(largest);
#pragma unroll
    for (int32_t box = kFirstBox; box < kQueryBoxes; ++box) {
      convert_box(row, box, scale);
    }
    if constexpr (Traits::kHasTokenScales) {
      if constexpr (Traits::kQueryPeParts == 2) split_pe(row);
    }
    if (chunk_ == 0) {
      shared_.score_scale[row] = params_.scale_log2 * params_.ckv_scale * (1.f / scale);
    }
  }

 private:
  __device__ uint8_t* chunk_of(int32_t row, int32_t box, int32_t chunk) {
    return reinterpret_cast<uint8_t*>(shared_.query + box * Traits::kRowTile * kBoxColumns +
                                      swizzled_chunk(row, chunk));
  }

  __device__ float largest_of_box(int32_t row, int32_t box) {
    auto const words = *reinterpret_cast<uint4 const*>(chunk_of(row, box, chunk_));
    float2 const a = unpack<DType>(words.x), b = unpack<DType>(words.y);
    float2 const c = unpack<DType>(words.z), d = unpack<DType>(words.w);
    return fmaxf(fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))),
                 fmaxf(fmaxf(fabsf(c.x), fabsf(c.y)), fmaxf(fabsf(d.x), fabsf(d.y))));
  }

  // A lane's eight columns become half of its own and half of its neighbour's chunk.
  __device__ void convert_box(int32_t row, int32_t box, float scale) {
    auto const words = *reinterpret_cast<uint4 const*>(chunk_of(row, box, chunk_));
    auto convert = [&](uint32_t word) {
      float2 const pair = unpack<DType>(word);
      return pack<cutlass::half_t>(pair.x * scale, pair.y * scale);
    };
    uint2 const lower = {convert(words.x), convert(words.z)};
    uint2 const upper = {convert(words.y), convert(words.w)};
    __syncwarp();  // both have read
    int32_t const half = (chunk_ & 1) * 8;
    *reinterpret_cast<uint2*>(chunk_of(row, box, chunk_ & ~1) + half) = lower;
    *reinterpret_cast<uint2*>(chunk_of(row, box, chunk_ | 1) + half) = upper;
  }

  // fp16 becomes the sum of two bf16 numbers, exactly: the first has 8 of its 11 bits. They stay
  // in the order of columns, as kpe is.
  __device__ void split_pe(int32_t row) {
    auto& words = *reinterpret_cast<uint4*>(chunk_of(row, 0, chunk_));
    uint4 low;
    auto split = [](uint32_t& word, uint32_t& low_word) {
      float2 const pair = unpack<DType>(word);
      word = pack<KpeElement>(pair.x, pair.y);
      float2 const high = unpack<KpeElement>(word);
      low_word = pack<KpeElement>(pair.x - high.x, pair.y - high.y);
    };
    split(words.x, low.x);
    split(words.y, low.y);
    split(words.z, low.z);
    split(words.w, low.w);
    *reinterpret_cast<uint4*>(shared_.query_pe_low + swizzled_chunk(row, chunk_)) = low;
  }

  Params const& params_;
  typename Traits::SharedStorage& shared_;
  int32_t const chunk_ = threadIdx.x % 8;
};

template <class Traits>
__device__ void convert_queries_to_fp16(Params const& params,
                                        typename Traits::SharedStorage& shared) {
  QueryConverter<Traits> converter(params, shared);
#pragma unroll 1
  for (int32_t row = threadIdx.x / 8; row < Traits::kRowTile; row += kMathThreads / 8) {
    converter.convert_row(row);
  }
  cutlass::arch::fence_view_async_shared();
  sync_math();
}

}  // namespace etap
