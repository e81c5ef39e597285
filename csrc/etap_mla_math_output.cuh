/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a math thread has of O^T and of its rows where tokens are on M, and how that is written: as
 * rows of the output or as a partial result in the workspace.
 */
#pragma once

#include "etap_mla_math_segment.cuh"
#include "etap_mla_partial.cuh"
#include "etap_mla_wgmma.cuh"

namespace etap {

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Of one row of some tiles.
struct RowStatistics {
  float max, sum;
};

template <class Traits>
class MathOutput : protected MathSegment<Traits> {
  using Base = MathSegment<Traits>;

 protected:
  using Base::params_, Base::segment, Base::segment_number_, Base::shared_;
  using DType = typename Traits::DType;
  using typename Base::SharedStorage;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kElementsPerHalf = 4 * kRowBlocks;  // of a thread, in a box of O^T

  using Base::Base;

  __device__ int32_t row(int32_t i) const { return thread_.row(i); }

  // `f(value, box, i)` for this thread's elements of O^T in one half of the columns: 0, which P's
  // high parts make, or 1, which its low parts do.
  template <class Function>
  __device__ __forceinline__ void for_each_of_half(int32_t half, Function const& f) {
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
#pragma unroll
      for (int32_t i = 0; i < kElementsPerHalf; ++i)
        f(output_[box](half * kElementsPerHalf + i), box, i);
    }
  }

  // Of a segment or a leaf: the first tile's products do not add to what is there.
  __device__ void begin_output() {
    is_first_tile_ = true;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = 0.f;
  }

  // The values that four warps left of a row, combined in a fixed order.
  template <typename Combine>
  __device__ static float over_warps(float const (&of_warps)[4], Combine combine) {
    auto const values = reinterpret_cast<float4 const&>(of_warps);
    return combine(combine(values.x, values.y), combine(values.z, values.w));
  }

  // Of this thread's tiles and tokens, for all to see behind the next barrier. Nobody reads what
  // was there any more: that was before the last tile's barrier.
  __device__ void store_row_sums() {
    thread_.reduce_over_warp(row_sum_, Plus{}, [this](int32_t row, float sum) {
      shared_.row_sum[sum_slot_][thread_.warpgroup][row][thread_.warp] = sum;
    });
  }

  __device__ float total_sum(int32_t slot, int32_t row_of_tile) const {
    auto const& sums = shared_.row_sum[slot];
    return over_warps(sums[0][row_of_tile], Plus{}) + over_warps(sums[1][row_of_tile], Plus{});
  }

  __device__ float row_sum_of_thread() const { return total_sum(sum_slot_, threadIdx.x); }

  __device__ float last_max(int32_t row_of_tile) const {
    return shared_.running_max[tile_number_ & 1 ^ 1][row_of_tile].max;
  }

  __device__ static bool has_row() { return threadIdx.x < kRowTile; }

  template <class Output>
  __device__ static OutputFragment fragment(Output const& output, int32_t box, int32_t block) {
    return {{output(box, block, 0), output(box, block, 1), output(box, block, 2),
             output(box, block, 3)}};
  }

  // A warp has 16 columns of each box: 8 rows of two boxes are one store of 16 bytes a lane.
  template <class Output>
  __device__ void write_output(Output const& output) {
    int32_t const box_of_lane = thread_.lane % 4 / 2, half_of_lane = thread_.lane % 2;
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; ++block) {
      float const scale_0 = normalizer(total_sum(sum_slot_, row(2 * block)));
      float const scale_1 = normalizer(total_sum(sum_slot_, row(2 * block + 1)));
      int32_t const row_of_lane = block * 8 + thread_.lane / 4;
      bool const exists = row_of_lane < segment().num_rows;
      DType* const out =
          output_row<DType>(params_, segment().packed_row + (exists ? row_of_lane : 0)) +
          thread_.warp * 16 + half_of_lane * 8;
#pragma unroll
      for (int32_t box = 0; box < kBoxesPerWarpgroup; box += 2) {
        int32_t const column = (2 * (box + box_of_lane) + thread_.warpgroup) * kBoxColumns;
        write_fragments<DType>(fragment(output, box, block), fragment(output, box + 1, block),
                               scale_0, scale_1, out + column, exists);
      }
    }
    if (params_.lse == nullptr || threadIdx.x >= segment().num_rows) return;
    params_.lse[segment().packed_row + threadIdx.x] =
        log_sum_exp(params_, last_max(threadIdx.x), row_sum_of_thread());
  }

  template <class Output>
  __device__ void write_part(int32_t slot, Output const& output) const {
    NumbersOfPart<Traits, Output> const numbers{thread_, output};
    store_part(PartSlot<Traits>(params_, shared_.merge, slot), numbers);
  }

  __device__ void write_row(int32_t slot, RowStatistics const& row) const {
    PartSlot<Traits> const part(params_, shared_.merge, slot);
    store_row_of_part(part, threadIdx.x, row.max, row.sum);
  }

  MathThread const thread_;

  uint32_t tile_number_ = 0;  // of this CTA, over all its segments
  bool is_first_tile_;        // of the segment or leaf
  int32_t sum_slot_ = 0;      // of shared_.row_sum; leaves take turns at two

  // Two halves of columns: those of P's high parts and those of its low parts.
  decltype(partition_fragment_C(
      typename Traits::template MmaPv<Traits::kPvColumns>{},
      Shape<Int<kBoxColumns>, Int<Traits::kPvColumns>>{})) output_[kBoxesPerWarpgroup];
  float row_sum_[kRows];  // over this thread's tokens only, until the segment or leaf ends
};

}  // namespace etap
