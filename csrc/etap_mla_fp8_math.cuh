/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math warpgroups over a cache of fp8, with scales of tokens or more than 16 rows; fewer rows
 * and one scale are in etap_mla_fp8_tile_math.cuh. Math warpgroup g = 0, 1, for each pair of token
 * tiles (t, t + 1), of which the last may be a single tile:
 *
 *   S^T = K Q^T of tile t + g; its maxima over tokens -> shared memory
 *   -- barrier --  r = reference near the running maxima; O^T[g] *= 2^(r_old - r)
 *   P^T = 2^(S^T - r) of tile t + g -> shared memory
 *   -- barrier --  O^T[g] += V^T[g] P^T of both tiles, where [g] is half of d_v
 *
 * WGMMA's A operand (K, then V^T) comes from registers, and turns from e4m3 into fp16 on its way
 * there: exact, so nothing is quantised, and P in fp16 needs no second part. What differs where
 * tokens have scales of their own is in etap_mla_flashmla_scores.cuh: P^T is then stored once for
 * each scale.
 */
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_flashmla_scores.cuh"
#include "etap_mla_fp8_operands.cuh"
#include "etap_mla_fp8_output.cuh"
#include "etap_mla_fp8_queries.cuh"
#include "etap_mla_fp8_scores.cuh"
#include "etap_mla_fp8_traits.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_math_segment.cuh"
#include "etap_mla_math_thread.cuh"
#include "etap_mla_output.cuh"

namespace etap {

// The softmax subtracts a reference r from the scores (base 2), not their maximum: when it is set,
// 8 below the maximum, and set anew when the maximum is more than 15 above it. So P is at most 2^15
// (fp16 ends at 2^16), probabilities down to 2^-22 of the largest stay normal fp16 numbers, and O^T
// is hardly ever rescaled. Sums, partial results and LSE are relative to r.
constexpr float kReferenceBelowMax = 8.f;
constexpr float kLargestProbabilityLog2 = 15.f;

// Integers in the order of floats; its own inverse.
__device__ __forceinline__ int32_t comparable_bits(int32_t float_bits) {
  return float_bits ^ (float_bits < 0 ? 0x7fffffff : 0);
}

template <class Traits>
class Fp8MathWarpgroup : MathSegment<Traits> {
  using Base = MathSegment<Traits>;
  using Base::params_, Base::segment, Base::segment_number_, Base::shared_;
  using typename Base::SharedStorage;
  using DType = typename Traits::DType;
  using Operand = typename Traits::Operand;
  using Boxes = typename Traits::Boxes;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr bool kHasTokenScales = Traits::kKvCache == KvCache::kFp8FlashMla;
  static constexpr int kStoreBlocks = kRowBlocks == 1 ? 1 : 2;  // row blocks that stmatrix stores
  using Scores = std::conditional_t<kHasTokenScales, FlashMlaScores<Traits>, Fp8Scores<Traits>>;

 public:
  __device__ Fp8MathWarpgroup(Params const& params, SharedStorage& shared)
      : Base(params, shared), scores_(params, shared, thread_) {}

  __device__ __forceinline__ void run() {
    while (begin_segment()) {
#pragma unroll 1
      for (tile_ = segment().tile_begin; tile_ < segment().tile_end; tile_ += kMathWarpgroups) {
        if (has_tile()) {
          scores_.compute(segment(), tile_ + thread_.warpgroup, kpe_slot(thread_.warpgroup));
        }
        share_tile_max();
        float reference[kRows];
        update_reference(reference);
        if constexpr (kHasTokenScales) update_scale_references();
        if (has_tile()) store_probabilities(reference);
        if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
        publish_probabilities();
        if (is_single_tile()) {
          accumulate_output<1>();
        } else {
          accumulate_output<2>();
        }
        reference_slot_ ^= 1;
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  // Whether this warpgroup's tile of the pair exists: the last pair may be a single tile.
  __device__ bool has_tile() const { return tile_ + thread_.warpgroup < segment().tile_end; }
  __device__ bool is_single_tile() const { return tile_ + 1 == segment().tile_end; }

  // Slots of the pair's tile `half`.
  __device__ RingPosition kpe_slot(int32_t half) const {
    return ring_.after(half * Boxes::kPerTile);
  }
  __device__ RingPosition ckv_slot(int32_t half, int32_t box) const {
    return ring_.after(half * Boxes::kPerTile + 1 + box);
  }

  __device__ void wait_for_box(RingPosition const& slot) const {
    Barrier::wait(&shared_.box_full[slot.index], slot.parity);
  }

  // Waits for the next segment and its queries; false if there is none.
  __device__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    if (segment().num_tiles() == 0) return false;
    if (threadIdx.x < kRowTile) {
      shared_.score_max[threadIdx.x] = comparable_bits(__float_as_int(-INFINITY));
      shared_.reference[reference_slot_ ^ 1][threadIdx.x] = -INFINITY;
    }
    if constexpr (kHasTokenScales) scores_.scales().begin_segment();
    this->await_own_queries(sync_math);
    convert_queries_to_fp16<Traits>(params_, shared_);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = 0.f;
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) clear(output_[box]);
    return true;
  }

  // --- A operands -------------------------------------------------------------------------------

  // Reads this warp's 16 columns of 32 tokens, transposed: `tokens` counts them over the boxes of
  // ckv. A lane gets a pair of columns of two neighbouring tokens. The first 64 columns of a box
  // belong to warpgroup 0.
  __device__ Fp8Codes load_values(int32_t tokens, int32_t lane) const {
    RingPosition const slot = value_slot(tokens);
    int32_t const part = tokens % 2;
    if (part == 0) wait_for_box(slot);
    int32_t const place = 2 * swizzled_chunk(lane, 4 * thread_.warpgroup + thread_.warp);
    auto const* const row = shared_.ring + slot.index * Boxes::kElements + place + part * 32 * 128;
    Fp8Codes codes;
    SM75_U16x8_LDSM_T::copy(*reinterpret_cast<uint128_t const*>(row), codes.matrix[0],
                            codes.matrix[1], codes.matrix[2], codes.matrix[3]);
    return codes;
  }

  __device__ RingPosition value_slot(int32_t tokens) const {
    return ckv_slot(tokens / (2 * Boxes::kCkv), tokens / 2 % Boxes::kCkv);
  }

  // --- Softmax, P^T ------------------------------------------------------------------------------

  __device__ void share_tile_max() {
    if (has_tile()) {
      float tile_max[kRows];
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) tile_max[i] = fmaxf(scores_(i, 0), scores_(i, 1));
      thread_.reduce_over_warp(
          tile_max, [](float a, float b) { return fmaxf(a, b); },
          [this](int32_t row_of_tile, float max) {
            atomicMax(&shared_.score_max[row_of_tile], comparable_bits(__float_as_int(max)));
          });
      if constexpr (kHasTokenScales) scores_.scales().share_largest();
    }
    sync_math();
  }

  // Takes the pair's maxima into account; O^T and l are brought to the new reference if there is
  // one. Two slots take turns for r: one is written while the other is still read.
  __device__ void update_reference(float (&reference)[kRows]) {
    bool is_changed = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; i += 2) {
      int2 const max = *reinterpret_cast<int2 const*>(&shared_.score_max[thread_.row(i)]);
      float2 const old = old_references(i);
      is_changed |= update_reference(reference[i], max.x, old.x);
      is_changed |= update_reference(reference[i + 1], max.y, old.y);
    }
    // All loads come before the stores, which might be of the same address for all the compiler
    // knows.
    if (threadIdx.x < 4) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) {
        shared_.reference[reference_slot_][thread_.row(i)] = reference[i];
      }
    }
    if (__any_sync(0xffffffff, is_changed)) rescale(reference);
  }

  __device__ static bool update_reference(float& reference, int32_t max_bits, float old) {
    float const max = __int_as_float(comparable_bits(max_bits));
    bool const is_too_low = max - old > kLargestProbabilityLog2;
    reference = is_too_low ? max - kReferenceBelowMax : old;
    return is_too_low;
  }

  __device__ void rescale(float const (&reference)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float2 const old = old_references(i & ~1);
      float const factor = rescale_factor(i % 2 == 0 ? old.x : old.y, reference[i]);
      row_sum_[i] *= factor;
#pragma unroll
      for (int32_t box = 0; box < Boxes::kCkv; ++box) {
        output_[box](i / 2 * 4 + i % 2) *= factor;
        output_[box](i / 2 * 4 + i % 2 + 2) *= factor;
      }
    }
  }

  __device__ void update_scale_references() {
    scores_.scales().update_references([this](int32_t box, float factor) {
#pragma unroll
      for (int32_t i = 0; i < size(output_[box]); ++i) output_[box](i) *= factor;
    });
  }

  // Of this thread's rows i and i + 1.
  __device__ float2 old_references(int32_t i) const {
    return *reinterpret_cast<float2 const*>(
        &shared_.reference[reference_slot_ ^ 1][thread_.row(i)]);
  }

  // P^T = 2^(S^T - r) of this warpgroup's tile.
  __device__ void store_probabilities(float const (&reference)[kRows]) {
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; block += kStoreBlocks) {
#pragma unroll
      for (int32_t i = 2 * block; i < 2 * (block + kStoreBlocks); ++i) {
        scores_(i, 0) = rescale_factor(scores_(i, 0), reference[i]);
        scores_(i, 1) = rescale_factor(scores_(i, 1), reference[i]);
        row_sum_[i] += scores_(i, 0) + scores_(i, 1);
      }
      if constexpr (kHasTokenScales) {
#pragma unroll
        for (int32_t box = 0; box < Boxes::kCkv; ++box) {
          write_probability_operand(block, box, scores_.scales().relative_scale(box, 0),
                                    scores_.scales().relative_scale(box, 1));
        }
      } else {
        write_probability_operand(block, 0, 1.f, 1.f);
      }
    }
  }

  // Writes P^T of kStoreBlocks blocks of 8 rows as WGMMA's B operand, this thread's tokens times
  // these factors; `box` is that of their scales.
  __device__ void write_probability_operand(int32_t block, int32_t box, float factor_0,
                                            float factor_8) {
    uint32_t p[2 * kStoreBlocks];
    auto value = [&](int32_t matrix, int32_t odd) {
      float const factor = matrix % 2 == 0 ? factor_0 : factor_8;
      return scores_(2 * (block + matrix / 2) + odd, matrix % 2) * factor;
    };
#pragma unroll
    for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
      p[matrix] = pack<Operand>(value(matrix, 0), value(matrix, 1));
    }
    store_transposed(p, block, probability_copy(thread_.warpgroup, box, 0));
    if constexpr (Traits::kProbabilityParts == 2) {
#pragma unroll
      for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
        float2 const high = unpack<Operand>(p[matrix]);
        p[matrix] = pack<Operand>(value(matrix, 0) - high.x, value(matrix, 1) - high.y);
      }
      store_transposed(p, block, probability_copy(thread_.warpgroup, box, 1));
    }
  }

  // Number of the operand [row][token] that holds a part of P of the pair's tile `half`, times the
  // scales of `box`.
  __device__ static int32_t probability_copy(int32_t half, int32_t box, int32_t part) {
    constexpr int32_t kCopies = Traits::kProbabilityCopies;
    return (half * kCopies + box % kCopies) * Traits::kProbabilityParts + part;
  }

  // Transposed 8 x 8 stores: lane l addresses row l % 8 of matrix l / 8; matrices go over the
  // warp's two groups of 8 tokens first, then over the row blocks.
  __device__ void store_transposed(uint32_t const (&p)[2 * kStoreBlocks], int32_t block,
                                   int32_t copy) {
    int32_t const matrix = thread_.lane / 8 % (2 * kStoreBlocks);
    Operand* const operand = shared_.probability + copy * kRowTile * kTokenTile +
                             (block + matrix / 2) * 8 * kTokenTile +
                             swizzled_chunk(thread_.lane % 8, thread_.warp * 2 + matrix % 2);
    auto& target = *reinterpret_cast<uint128_t*>(operand);
    if constexpr (kStoreBlocks == 1) {
      SM90_U16x4_STSM_T::copy(p[0], p[1], target);
    } else {
      SM90_U16x8_STSM_T::copy(p[0], p[1], p[2], p[3], target);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: tokens are rows of S^T.)
  __device__ void clear_tokens_past_end() {
    int32_t const half = is_single_tile() ? 0 : 1;
    int32_t const tokens = max(segment().request.kv_len - (tile_ + half) * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
#pragma unroll 1
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
      RingPosition const slot = ckv_slot(half, box);
      wait_for_box(slot);
      auto* const chunks = reinterpret_cast<uint4*>(shared_.ring + slot.index * Boxes::kElements);
#pragma unroll 1
      for (int32_t i = tokens * 8 + threadIdx.x; i < kTokenTile * 8; i += kMathThreads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Makes P of both tiles visible to the WGMMAs of both warpgroups. The loader of the next
  // segment's queries learns with it that S^T is done with these.
  __device__ void publish_probabilities() {
    cutlass::arch::fence_view_async_shared();
    bool const is_last_pair = tile_ + kMathWarpgroups >= segment().tile_end;
    if (is_last_pair) arrive_once_per_warp(&shared_.query_empty, 1);
    sync_math();
  }

  // --- O^T --------------------------------------------------------------------------------------

  // O^T[half g of d_v] += V^T P^T of the pair's tiles, box after box. A box is free for the
  // producer as soon as its values are in registers.
  template <int kTiles>
  __device__ void accumulate_output() {
    typename Traits::Mma mma;
    Tensor p = make_tensor(make_smem_ptr(shared_.probability), typename Traits::LayoutP{});
    Tensor p_operand = mma.get_slice(thread_.thread).partition_fragment_B(p);  // (MMA, 1, 4, copy)
    mma.accumulate_ = GMMA::ScaleOut::One;
    int32_t const lane = thread_.fresh_lane();
    fence_output();
    constexpr int32_t kSteps = kTiles * Boxes::kCkv * 4;
    run_steps<kSteps, Traits::kGroupSteps>(
        [&](int32_t tokens) { return load_values(tokens, lane); }, convert_values,
        [&](Fp8Fragment const& values, int32_t step) {
          int32_t const box = step / 4 % Boxes::kCkv, half = step / (4 * Boxes::kCkv);
#pragma unroll
          for (int32_t part = 0; part < Traits::kProbabilityParts; ++part) {
            int32_t const copy = probability_copy(half, box, part);
            gemm(mma, values, p_operand(_, 0, step % 4, copy), output_[box](_, 0, 0));
          }
        },
        [&](int32_t tokens) {
          bool const is_last_of_box = tokens % 2 == 1;
          if (is_last_of_box) {
            arrive_once_per_warp(&shared_.box_empty[value_slot(tokens).index], 1);
          }
        },
        [](int32_t) {});
    fence_output();
    ring_ = ring_.after(kTiles * Boxes::kPerTile);
  }

  __device__ void fence_output() {
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) warpgroup_fence_operand(output_[box]);
  }

  // --- End of a segment -------------------------------------------------------------------------

  __device__ void finish_segment() {
    thread_.reduce_over_warp(
        row_sum_, [](float a, float b) { return a + b; },
        [this](int32_t row_of_tile, float sum) {
          shared_.warp_sum[row_of_tile][4 * thread_.warpgroup + thread_.warp] = sum;
        });
    sync_math();
    write_fp8_segment<Traits>(
        params_, shared_.merge, segment(), thread_,
        [this](int32_t box) -> auto& { return output_[box]; },
        [this](int32_t box) { return output_scale(box); },
        [this](int32_t row) { return shared_.reference[reference_slot_ ^ 1][row]; },
        [this](int32_t row) { return total_sum(row); });
  }

  // Of all warps, in a fixed order.
  __device__ float total_sum(int32_t row_of_tile) const {
    auto const* const sums = reinterpret_cast<float4 const*>(shared_.warp_sum[row_of_tile]);
    float4 const a = sums[0], b = sums[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }

  // What O^T of a box is multiplied with.
  __device__ float output_scale(int32_t box) {
    if constexpr (kHasTokenScales) return scores_.scales().reference(box);
    return params_.ckv_scale;
  }

  // Parts of this object have copies of it: a pointer into the object would keep all of it, the
  // accumulators too, in memory.
  MathThread const thread_;
  Scores scores_;  // of this warpgroup's tile

  RingPosition ring_;            // box 0 of the pair
  int32_t tile_;                 // first of the pair
  uint32_t reference_slot_ = 0;  // of r, for the current pair

  using Accumulator =
      decltype(partition_fragment_C(typename Traits::Mma{}, Shape<_64, Int<kRowTile>>{}));
  Accumulator output_[Boxes::kCkv];
  float row_sum_[kRows];  // over this thread's tokens only, until the segment ends
};

}  // namespace etap
