/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a math warpgroup of etap_mla_fp8_tile_math.cuh sums over its tiles of a segment, and how two
 * such become one result when the segment ends: both bring what they have to the larger of their
 * references, and each takes half of the other's O^T.
 */
#pragma once

#include "etap_mla_fp8_scores.cuh"
#include "etap_mla_math_thread.cuh"
#include "etap_mla_output.cuh"

namespace etap {

template <class Traits>
struct TileSums {
  using SharedStorage = typename Traits::SharedStorage;
  using Boxes = typename Traits::Boxes;
  static constexpr int kRowBlocks = Traits::kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kHalves = 2;  // of a box: 64 columns each

  typename TileScores<Traits>::Accumulator output[Boxes::kCkv][kHalves];  // [1] is given away
  float reference[kRows];  // that the others are relative to
  float row_sum[kRows];    // over this thread's tokens only

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      row_sum[i] = 0.f;
      reference[i] = -INFINITY;
    }
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
#pragma unroll
      for (int32_t half = 0; half < kHalves; ++half) cute::clear(output[box][half]);
    }
  }

  // By what brings each row to another reference.
  __device__ __forceinline__ void multiply(float const (&factor)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum[i] *= factor[i];
#pragma unroll
    for (int32_t half = 0; half < kHalves; ++half) multiply_half(half, factor);
  }

  // --- End of a segment -------------------------------------------------------------------------

  // Reference and sums for both warpgroups.
  __device__ __forceinline__ void share_statistics(SharedStorage& shared,
                                                   MathThread const& thread) {
    thread.reduce_over_warp(
        row_sum, [](float a, float b) { return a + b; },
        [&](int32_t row, float sum) { shared.warp_sum[thread.warpgroup][row][thread.warp] = sum; });
    if (thread.thread >= 4) return;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      shared.reference[thread.warpgroup][thread.row(i)] = reference[i];
    }
  }

  // The other warpgroup's half, in place of the codes of ckv of a tile that was read.
  __device__ __forceinline__ void give_half(uint8_t* codes, MathThread const& thread) const {
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
      float4* const target = place(codes, box, thread);
      auto const& given = output[box][1];
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        target[block * kWarpgroupThreads] = make_float4(given(block * 4), given(block * 4 + 1),
                                                        given(block * 4 + 2), given(block * 4 + 3));
      }
    }
    cutlass::arch::fence_view_async_shared();  // the producer writes there next
  }

  // Adds what the other one gave, once its statistics are shared, too.
  __device__ __forceinline__ void take_half(uint8_t* codes, SharedStorage const& shared,
                                            MathThread const& thread) {
    float own_factor[kRows], other_factor[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float const other = shared.reference[thread.warpgroup ^ 1][thread.row(i)];
      float const larger = fmaxf(reference[i], other);
      own_factor[i] = rescale_factor(reference[i], larger);
      other_factor[i] = rescale_factor(other, larger);
    }
    multiply_half(0, own_factor);
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
      float4 const* const source = place(codes, box, thread);
      auto& kept = output[box][0];
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        float4 const taken = source[block * kWarpgroupThreads];
        kept(block * 4) += taken.x * other_factor[2 * block];
        kept(block * 4 + 1) += taken.y * other_factor[2 * block + 1];
        kept(block * 4 + 2) += taken.z * other_factor[2 * block];
        kept(block * 4 + 3) += taken.w * other_factor[2 * block + 1];
      }
    }
    cutlass::arch::fence_view_async_shared();  // as above
  }

  // Of a row over both warpgroups, whose statistics are shared: the reference, and the sum in a
  // fixed order.
  __device__ static float total_reference(SharedStorage const& shared, int32_t row) {
    return fmaxf(shared.reference[0][row], shared.reference[1][row]);
  }
  __device__ static float total_sum(SharedStorage const& shared, int32_t row) {
    float total = 0.f;
#pragma unroll
    for (int32_t warpgroup = 0; warpgroup < kMathWarpgroups; ++warpgroup) {
      auto const sums = *reinterpret_cast<float4 const*>(shared.warp_sum[warpgroup][row]);
      total += ((sums.x + sums.y) + (sums.z + sums.w)) *
               rescale_factor(shared.reference[warpgroup][row], total_reference(shared, row));
    }
    return total;
  }

 private:
  __device__ __forceinline__ void multiply_half(int32_t half, float const (&factor)[kRows]) {
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
      auto& values = output[box][half];
#pragma unroll
      for (int32_t j = 0; j < size(values); ++j) values(j) *= factor[j / 4 * 2 + j % 2];
    }
  }

  // A float4 of each thread for every 8 rows of the 64 columns of a box that change hands.
  __device__ static float4* place(uint8_t* codes, int32_t box, MathThread const& thread) {
    return reinterpret_cast<float4*>(codes + box * Boxes::kElements) + thread.thread;
  }
};

}  // namespace etap
