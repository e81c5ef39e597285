/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * A thread's place among the math threads where tokens are on M, and what threads do together.
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

struct MathThread {
  int32_t const thread = threadIdx.x % kWarpgroupThreads;
  int32_t const warpgroup = cutlass::canonical_warp_group_idx();
  int32_t const warp = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane = threadIdx.x % 32;

  // Rows of an accumulator that this thread sees: row(2 b + c) = 8 b + 2 (lane % 4) + c.
  __device__ int32_t row(int32_t i) const { return row(i, lane); }
  __device__ static int32_t row(int32_t i, int32_t lane) {
    return i / 2 * 8 + 2 * (lane % 4) + i % 2;
  }

  // Tokens of S^T that this thread sees: this one of the tile and the eighth after it.
  __device__ int32_t token() const { return warp * 16 + lane / 4; }

  // The lane, but what is computed from it cannot be moved ahead of the loop over tiles, where 64
  // rows leave no registers to keep it.
  __device__ int32_t fresh_lane() const {
    int32_t result = lane;
    asm volatile("" : "+r"(result));
    return result;
  }

  // Combines the values of each row over the lanes that see it, which are 4, 8 and 16 apart, and
  // calls store(row, value).
  template <int kRows, typename Combine, typename Store>
  __device__ void reduce_over_warp(float (&values)[kRows], Combine combine, Store store) const {
    reduce_over_lanes<16, kRows>(values, combine, store, 0);
  }

 private:
  // Each step halves the rows a lane still has, so that few shuffles do. `first` is the first of
  // the rows that are left.
  template <int kLanes, int kCount, int kRows, typename Combine, typename Store>
  __device__ void reduce_over_lanes(float (&values)[kRows], Combine combine, Store store,
                                    int32_t first) const {
    if constexpr (kLanes < 4) {
      // Lanes that hold copies store the same value.
#pragma unroll
      for (int32_t i = 0; i < kCount; ++i) store(row(first + i, fresh_lane()), values[i]);
    } else if constexpr (kCount == 1) {
      values[0] = combine(values[0], __shfl_xor_sync(0xffffffff, values[0], kLanes));
      reduce_over_lanes<kLanes / 2, 1>(values, combine, store, first);
    } else {
      constexpr int32_t kKept = kCount / 2;
      bool const is_upper = (lane & kLanes) != 0;
#pragma unroll
      for (int32_t i = 0; i < kKept; ++i) {
        float const given = is_upper ? values[i] : values[i + kKept];
        float const kept = is_upper ? values[i + kKept] : values[i];
        values[i] = combine(kept, __shfl_xor_sync(0xffffffff, given, kLanes));
      }
      reduce_over_lanes<kLanes / 2, kKept>(values, combine, store, first + (is_upper ? kKept : 0));
    }
  }
};

}  // namespace etap
