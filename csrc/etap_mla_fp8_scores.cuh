/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * S^T = K Q^T of one tile over a cache of fp8 with one scale.
 */
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "etap_mla_fp8_operands.cuh"
#include "etap_mla_fp8_traits.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_math_thread.cuh"

namespace etap {

// S^T of a warpgroup's tile in the order of accumulators, however it is computed.
template <class Traits>
struct TileScores {
  using Accumulator =
      decltype(partition_fragment_C(typename Traits::MmaQk{}, Shape<_64, Int<Traits::kRowTile>>{}));

  // Of this thread's row i and token() + 8 * half.
  __device__ float& operator()(int32_t i, int32_t half) {
    return values(i / 2 * 4 + half * 2 + i % 2);
  }

  // Adds those of kpe, whose codes have a scale of their own: here relative to ckv's.
  __device__ void add_kpe(Accumulator const& kpe_values, float relative_scale) {
#pragma unroll
    for (int32_t i = 0; i < size(values); ++i) values(i) += relative_scale * kpe_values(i);
  }

  // To units of log2, by a factor for each row.
  __device__ void scale(float const (&row_scale)[Traits::kRowTile], MathThread const& thread) {
#pragma unroll
    for (int32_t i = 0; i < Traits::kRowsPerThread; i += 2) {
      auto const factor = *reinterpret_cast<float2 const*>(&row_scale[thread.row(i)]);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        (*this)(i, half) *= factor.x;
        (*this)(i + 1, half) *= factor.y;
      }
    }
  }

  // -inf where a row does not see a token.
  __device__ void mask(Params const& params, Segment const& segment, int32_t tile,
                       MathThread const& thread) {
    if (tile < segment.masked_tile_begin) return;
    Request const& request = segment.request;
    int32_t const token = tile * kTokenTile + thread.token();
#pragma unroll
    for (int32_t i = 0; i < Traits::kRowsPerThread; ++i) {
      int32_t const visible = visible_tokens(params, request, segment.row_begin + thread.row(i));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (token + 8 * half >= visible) (*this)(i, half) = -INFINITY;
      }
    }
  }

  Accumulator values;
};

// Reads 32 columns of this warp's 16 tokens, `part` of a box of codes: of 16 columns a lane gets
// four neighbours. Rows of a box have 128 bytes or, of kpe, half of that.
__device__ __forceinline__ Fp8Codes load_keys(uint8_t const* box, bool is_half_box, int32_t part,
                                              int32_t warp, int32_t lane) {
  int32_t const token = warp * 16 + lane % 16, chunk = lane / 16;
  int32_t const place =
      is_half_box ? swizzled_half_chunk(token, chunk) : 2 * swizzled_chunk(token, chunk);
  auto const* const row = box + (place ^ (32 * part));
  Fp8Codes codes;
  SM75_U32x4_LDSM_N::copy(*reinterpret_cast<uint128_t const*>(row), codes.matrix[0],
                          codes.matrix[1], codes.matrix[2], codes.matrix[3]);
  return codes;
}

template <class Traits>
class Fp8Scores {
  using SharedStorage = typename Traits::SharedStorage;
  using Boxes = typename Traits::Boxes;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  using Accumulator = typename TileScores<Traits>::Accumulator;
  static constexpr bool kHasKpeScores = Traits::kRowTile <= 32;

 public:
  __device__ Fp8Scores(Params const& params, SharedStorage& shared, MathThread const& thread)
      : params_(params), shared_(shared), thread_(thread) {}

  __device__ float& operator()(int32_t i, int32_t half) { return scores_(i, half); }

  // S^T of `tile`, whose first box is `kpe_slot`, in units of log2, -inf where a row does not see a
  // token. The part of kpe has a scale of its own: it has its own accumulators or, with 64 rows,
  // for which there are no registers, is brought to the scale of ckv before that is added.
  __device__ void compute(Segment const& segment, int32_t tile, RingPosition const& kpe_slot) {
    Accumulator& scores = scores_.values;
    warpgroup_fence_operand(scores);
    if constexpr (kHasKpeScores) warpgroup_fence_operand(kpe_scores_);
    if constexpr (kHasKpeScores) {
      multiply_keys<0, 4 * Traits::kQueryBoxes>(kpe_slot);
    } else {
      multiply_keys<0, 4>(kpe_slot);
      warpgroup_fence_operand(scores);
#pragma unroll
      for (int32_t i = 0; i < size(scores); ++i) scores(i) *= params_.kpe_over_ckv_scale;
      warpgroup_fence_operand(scores);
      multiply_keys<4, 4 * Traits::kQueryBoxes>(kpe_slot);
    }
    warpgroup_fence_operand(scores);
    if constexpr (kHasKpeScores) warpgroup_fence_operand(kpe_scores_);
    arrive_once_per_warp(&shared_.box_empty[kpe_slot.index], kMathWarpgroups);
    if constexpr (kHasKpeScores) scores_.add_kpe(kpe_scores_, params_.kpe_over_ckv_scale);
    scores_.scale(shared_.score_scale, thread_);
    scores_.mask(params_, segment, tile, thread_);
  }

 private:
  // WGMMAs kFirst, ..., kEnd - 1 of S^T, of 16 columns each: kpe first.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void multiply_keys(RingPosition const& kpe_slot) {
    typename Traits::Mma mma;
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor q_operand = mma.get_slice(thread_.thread).partition_fragment_B(q);  // (MMA, 1, 4, box)
    int32_t const lane = thread_.fresh_lane();
    run_steps<kEnd - kFirst, Traits::kGroupSteps>(
        [&](int32_t columns) {
          return load_columns(kpe_slot, kFirst / 2 + columns,
                              kHasKpeScores ? lane : thread_.fresh_lane());
        },
        convert_keys,
        [&](Fp8Fragment const& keys, int32_t i) {
          int32_t const step = kFirst + i;
          bool const is_first = step == 0 || (kHasKpeScores && step == 4);
          mma.accumulate_ = is_first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
          auto& scores = kHasKpeScores && step < 4 ? kpe_scores_ : scores_.values;
          gemm(mma, keys, q_operand(_, 0, step % 4, step / 4), scores(_, 0, 0));
        },
        [](int32_t) {}, [](int32_t) {});
  }

  // 32 columns; `columns` counts them over kpe, then ckv.
  __device__ Fp8Codes load_columns(RingPosition const& kpe_slot, int32_t columns,
                                   int32_t lane) const {
    bool const is_kpe = columns < 2;
    int32_t const box = is_kpe ? 0 : (columns + 2) / 4, part = is_kpe ? columns : (columns + 2) % 4;
    RingPosition const slot = kpe_slot.after(box);
    if (part == 0) Barrier::wait(&shared_.box_full[slot.index], slot.parity);
    return load_keys(shared_.ring + slot.index * Boxes::kElements, is_kpe, part, thread_.warp,
                     lane);
  }

  Params const& params_;
  SharedStorage& shared_;
  MathThread const thread_;  // a copy: see Fp8MathWarpgroup
  TileScores<Traits> scores_;
  Accumulator kpe_scores_;  // unless there are 64 rows
};

}  // namespace etap
