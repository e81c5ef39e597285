/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * From accumulators over a cache of fp8 to memory. A warpgroup has 64 columns of each box; a lane
 * two neighbouring ones, 16 warp + 2 (lane / 4) and the next, of the rows that MathThread gives it.
 */
#pragma once

#include "etap_mla_math_thread.cuh"
#include "etap_mla_partial.cuh"

namespace etap {

// O^T / l. `of_box(box)` is an accumulator, to be multiplied with `scale(box)`; `total_sum(row)` is
// l of a row.
template <class Traits, typename OfBox, typename Scale, typename TotalSum>
__device__ __forceinline__ void write_fp8_output(Params const& params, Segment const& segment,
                                                 MathThread const& thread, OfBox of_box,
                                                 Scale scale, TotalSum total_sum) {
  using DType = typename Traits::DType;
#pragma unroll
  for (int32_t i = 0; i < Traits::kRowsPerThread; ++i) {
    bool const exists = thread.row(i) < segment.num_rows;
    float const row_scale = normalizer(total_sum(thread.row(i)));
    DType* const out_row =
        output_row<DType>(params, segment.packed_row + (exists ? thread.row(i) : 0));
#pragma unroll
    for (int32_t box = 0; box < Traits::Boxes::kCkv; ++box) {
      int32_t const value = i / 2 * 4 + i % 2;
      int32_t const column = box * Traits::Boxes::kColumns + thread.warpgroup * 64 +
                             thread.warp * 16 + thread.lane / 4 * 2;
      float const factor = row_scale * scale(box);
      uint32_t const pair =
          pack<DType>(of_box(box)(value) * factor, of_box(box)(value + 2) * factor);
      if (exists) *reinterpret_cast<uint32_t*>(out_row + column) = pair;
    }
  }
}

// O^T of a part, as store_part() wants it. The merge expects columns lane / 4 and lane / 4 + 8 of a
// lane; this one has 2 * (lane / 4) and the next: of its pairs of rows each goes to another lane's
// place.
template <class Traits, typename OfBox, typename Scale>
struct NumbersOfFp8Part {
  static constexpr int kChunks =
      kHasHalfParts<Traits> && Traits::kRowTile >= 32 ? Traits::Boxes::kCkv : 1;
  MathThread const& thread;
  OfBox of_box;
  Scale scale;

  // f(place, the number there, the next)
  template <class Function>
  __device__ __forceinline__ void for_each_pair(int32_t chunk, Function const& f) const {
    constexpr int32_t kBoxes = Traits::Boxes::kCkv / kChunks;
    constexpr int kRowTile = Traits::kRowTile;
    int32_t const lane = thread.fresh_lane();
    int32_t const scattered_lane = (2 * (lane / 4) % 8) * 4 + lane % 4;
    int32_t const first_place =
        place_in_part<kRowTile>(thread.warpgroup, 0, thread.warp, scattered_lane) + lane / 16 * 2;
#pragma unroll
    for (int32_t box = chunk * kBoxes; box < (chunk + 1) * kBoxes; ++box) {
#pragma unroll
      for (int32_t pair = 0; pair < kRowTile / 4; ++pair) {
        int32_t const distance = place_in_part<kRowTile>(2 * box, pair / 2, 0, 0) + pair % 2 * 16;
        float const* const rows = &of_box(box)(pair * 2);
        float const factor = scale(box);
        f(first_place + distance, rows[0] * factor, rows[1] * factor);
      }
    }
  }

  template <class Function>
  __device__ __forceinline__ void as_floats(int32_t chunk, Function const& f) const {
    for_each_pair(chunk, [&](int32_t place, float a, float b) { f(place, make_float2(a, b)); });
  }

  template <class Function>
  __device__ __forceinline__ void as_halves(int32_t chunk, Function const& f) const {
    for_each_pair(chunk,
                  [&](int32_t place, float a, float b) { f(place, pack<cutlass::half_t>(a, b)); });
  }

  __device__ __forceinline__ __half2 largest(int32_t chunk) const {
    __half2 largest = {};
    as_halves(chunk,
              [&](int32_t, uint32_t halves) { largest = larger_magnitudes(largest, halves); });
    return largest;
  }
};

// LSE or, of a part, reference and sum.
template <class Traits>
__device__ __forceinline__ void write_fp8_statistics(Params const& params, uint32_t call,
                                                     Segment const& segment, int32_t row_of_tile,
                                                     float reference, float sum) {
  if (!segment.is_whole()) {
    store_row_of_part<Traits>(params, call, segment.slot, row_of_tile, reference, sum);
  } else if (params.lse != nullptr && row_of_tile < segment.num_rows) {
    params.lse[segment.packed_row + row_of_tile] = log_sum_exp(params, reference, sum);
  }
}

// All that a segment leaves: O^T / l and LSE or, of a part, O^T, its references and sums. Of a row,
// `reference(row)` is what O^T is relative to, and `total_sum(row)` is l. Called by all math
// threads, each with the accumulators of its own columns.
template <class Traits, typename OfBox, typename Scale, typename Reference, typename TotalSum>
__device__ __forceinline__ void write_fp8_segment(Params const& params, uint32_t call,
                                                  Segment const& segment, MathThread const& thread,
                                                  OfBox of_box, Scale scale, Reference reference,
                                                  TotalSum total_sum) {
  if (segment.is_whole()) {
    write_fp8_output<Traits>(params, segment, thread, of_box, scale, total_sum);
  } else {
    NumbersOfFp8Part<Traits, OfBox, Scale> const numbers{thread, of_box, scale};
    store_part<Traits>(params, call, segment.slot, numbers);
  }
  int32_t const row = threadIdx.x;
  if (row < Traits::kRowTile) {
    write_fp8_statistics<Traits>(params, call, segment, row, reference(row), total_sum(row));
  }
}

}  // namespace etap
