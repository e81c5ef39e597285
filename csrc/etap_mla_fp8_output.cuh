/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * From accumulators over a cache of fp8 to memory. A warpgroup has 64 columns of each box; a lane
 * two neighbouring ones, 16 warp + 2 (lane / 4) and the next, of the rows that MathThread gives it:
 * where another cache's has d and d + 8 of a fragment (kHasColumnPairs).
 */
#pragma once

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

// All that a segment leaves: O^T / l and LSE or, of a part, O^T, its references and sums. Of a row,
// `reference(row)` is what O^T is relative to, and `total_sum(row)` is l. Called by all math
// threads, each with the accumulators of its own columns.
template <class Traits, typename OfBox, typename Scale, typename Reference, typename TotalSum>
__device__ __forceinline__ void write_fp8_segment(Params const& params, MergeWork& merge,
                                                  Segment const& segment, MathThread const& thread,
                                                  OfBox of_box, Scale scale, Reference reference,
                                                  TotalSum total_sum) {
  PartSlot<Traits> const part(params, merge, segment.slot);
  int32_t const row = threadIdx.x;
  if (segment.is_whole()) {
    write_fp8_output<Traits>(params, segment, thread, of_box, scale, total_sum);
    if (params.lse == nullptr || row >= segment.num_rows) return;
    params.lse[segment.packed_row + row] = log_sum_exp(params, reference(row), total_sum(row));
  } else {
    float scales[Traits::Boxes::kCkv];
#pragma unroll
    for (int32_t box = 0; box < Traits::Boxes::kCkv; ++box) scales[box] = scale(box);
    auto const output = [&](int32_t box, int32_t block, int32_t i) {
      return of_box(box)(block * 4 + i) * scales[box];
    };
    store_part(part, NumbersOfPart<Traits, decltype(output)>{thread, output});
    if (row < Traits::kRowTile) store_row_of_part(part, row, reference(row), total_sum(row));
  }
}

}  // namespace etap
