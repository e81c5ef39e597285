/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * From accumulators over a cache of fp8 to memory. A warpgroup has 64 columns of each box; a lane
 * two neighbouring ones, 16 warp + 2 (lane / 4) and the next, of the rows that MathThread gives it.
 */
#pragma once

#include <cfloat>

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

// O^T of a part. The merge expects columns lane / 4 and lane / 4 + 8 of a lane; this one has 2 *
// (lane / 4) and the next: of its pairs of rows each goes to another lane's place.
template <class Traits, typename OfBox, typename Scale>
__device__ __forceinline__ void write_fp8_partial(Params const& params, MergeWork& merge,
                                                  int32_t slot, MathThread const& thread,
                                                  OfBox of_box, Scale scale) {
  int32_t const lane = thread.fresh_lane();
  int32_t const scattered_lane = (2 * (lane / 4) % 8) * 4 + lane % 4;
  Partial<Traits::kRowTile> const partial(params, slot);
  int32_t const first_place =
      place_in_partial<Traits::kRowTile>(thread.warpgroup, 0, thread.warp, scattered_lane) +
      lane / 16 * 2;
  // f(distance from first_place, box, the number there, the next)
  auto const for_each_pair = [&](auto const& f) {
#pragma unroll
    for (int32_t box = 0; box < Traits::Boxes::kCkv; ++box) {
#pragma unroll
      for (int32_t pair = 0; pair < Traits::kRowTile / 4; ++pair) {
        int32_t const distance =
            place_in_partial<Traits::kRowTile>(2 * box, pair / 2, 0, 0) + pair % 2 * 16;
        float const* const rows = &of_box(box)(pair * 2);
        f(distance, box, rows[0], rows[1]);
      }
    }
  };
  if constexpr (Traits::kHasHalfPartials) {
    uint32_t* const begin = partial.pairs_of_halves(first_place);
    auto const store = [&](auto const& scaled) {
      __half2 largest = {};
      for_each_pair([&](int32_t distance, int32_t box, float first, float second) {
        float const factor = scaled(scale(box));
        uint32_t const numbers = pack<cutlass::half_t>(first * factor, second * factor);
        largest = larger_magnitudes(largest, numbers);
        begin[distance / 2] = numbers;
      });
      return largest;
    };
    auto const for_each_largest = [&](auto const& f) {
#pragma unroll
      for (int32_t box = 0; box < Traits::Boxes::kCkv; ++box) {
        // At least this, so that scale / power is no infinity. What is less is as good as 0.
        float largest = 0x1p-80f;
#pragma unroll
        for (int32_t i = 0; i < Traits::kRowTile / 2; ++i) {
          float const magnitude = fabsf(of_box(box)(i));
          if (magnitude < INFINITY) largest = fmaxf(largest, magnitude);
        }
        if (scale(box) < INFINITY) f(fminf(largest * scale(box), FLT_MAX));
      }
    };
    store_halves(partial, 4 * thread.warpgroup + thread.warp, merge, store, for_each_largest);
  } else {
    float* const begin = partial.floats(first_place);
    for_each_pair([&](int32_t distance, int32_t box, float first, float second) {
      *reinterpret_cast<float2*>(begin + distance) =
          make_float2(first * scale(box), second * scale(box));
    });
  }
}

// LSE or, of a part, reference and sum.
template <class Traits>
__device__ __forceinline__ void write_fp8_statistics(Params const& params, Segment const& segment,
                                                     int32_t row_of_tile, float reference,
                                                     float sum) {
  if (!segment.is_whole()) {
    params.partial_ml[segment.slot * Traits::kRowTile + row_of_tile] = make_float2(reference, sum);
  } else if (params.lse != nullptr && row_of_tile < segment.num_rows) {
    params.lse[segment.packed_row + row_of_tile] = log_sum_exp(params, reference, sum);
  }
}

// All that a segment leaves: O^T / l and LSE or, of a part, O^T, its references and sums. Of a row,
// `reference(row)` is what O^T is relative to, and `total_sum(row)` is l. Called by all math
// threads, each with the accumulators of its own columns.
template <class Traits, typename OfBox, typename Scale, typename Reference, typename TotalSum>
__device__ __forceinline__ void write_fp8_segment(Params const& params, MergeWork& merge,
                                                  Segment const& segment, MathThread const& thread,
                                                  OfBox of_box, Scale scale, Reference reference,
                                                  TotalSum total_sum) {
  if (segment.is_whole()) {
    write_fp8_output<Traits>(params, segment, thread, of_box, scale, total_sum);
  } else {
    write_fp8_partial<Traits>(params, merge, segment.slot, thread, of_box, scale);
  }
  int32_t const row = threadIdx.x;
  if (row < Traits::kRowTile) {
    write_fp8_statistics<Traits>(params, segment, row, reference(row), total_sum(row));
  }
}

}  // namespace etap
