/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math of requests of 33 to 64 rows, with rows on WGMMA's M, by three warpgroups. For each
 * token tile:
 *
 *   score warpgroup           S = Q K^T, box by box as they arrive
 *                             r = running maxima;  P = 2^(S - r);  factor = 2^(r before - r)
 *                             P and factor -> shared memory, once those before were used
 *   value warpgroup g = 0, 1  O[g] = factor O[g] + P V[g], where g is a half of d_v
 *                             boxes -> producer
 *
 * The tensor cores take what comes first: usually P V of a tile and then, while its boxes are given
 * back and others come, the next tile's S; they idle during a softmax (scripts/TUNING.md).
 */
#pragma once

#include "etap_mla_rows.cuh"

namespace etap {

// Of the score warpgroup's threads. P and what goes with it have mbarriers: named ones at which a
// side arrives without waiting are as fast, but compute-sanitizer's racecheck loses track there. It
// follows mbarriers, if every thread that stored or read something arrives.
__device__ __forceinline__ void sync_scores() {
  constexpr uint32_t kScoreBarrier = 3;
  cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kScoreBarrier);
}

// A warpgroup that takes part in every tile. Stages are filled in turns.
template <class Traits>
class RowsOfEveryTile : protected RowsWarpgroup<Traits> {
 protected:
  using RowsWarpgroup<Traits>::RowsWarpgroup;

  __device__ int32_t stage() const { return tile_number_ % Traits::kStages; }

  __device__ void wait_for_box(int32_t number) const {
    RowsWarpgroup<Traits>::wait_for_box(stage(), number, tile_number_ / Traits::kStages);
  }

  uint32_t tile_number_ = 0;  // over all segments of this CTA
};

template <class Traits>
class ScoreWarpgroup : WithScores<RowsOfEveryTile<Traits>> {
  using Base = WithScores<RowsOfEveryTile<Traits>>;
  using Base::kRows, Base::lane_, Base::row, Base::row_sum_, Base::segment, Base::segment_number_,
      Base::shared_, Base::stage, Base::tile_number_;

 public:
  __device__ ScoreWarpgroup(Params const& params, typename Traits::SharedStorage& shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void run() {
    for (; this->wait_for_segment(); ++segment_number_) {
      this->await_own_queries(sync_scores);
      if (this->splits_probability()) {
        run_segment<true>();
      } else {
        run_segment<false>();
      }
    }
  }

 private:
  template <bool kSplits>
  __device__ __forceinline__ void run_segment() {
    int32_t const tile_end = segment().tile_end;
    this->begin_scores();
#pragma unroll 1
    for (int32_t tile = segment().tile_begin; tile < tile_end; ++tile, ++tile_number_) {
      run_tile<kSplits>(tile, tile + 1 == tile_end);
    }
  }

  template <bool kSplits>
  __device__ __forceinline__ void run_tile(int32_t tile, bool is_last) {
    this->template add_scores<0, kBoxesPerTile>(stage(), GMMA::ScaleOut::Zero,
                                                [this](int32_t box) { this->wait_for_box(box); });
    this->finish_scores();
    if (is_last) this->release_queries();
    if constexpr (!kSplits) this->release_box(stage(), 0, kMathWarpgroups);

    float factor[kRows];
    this->scale_and_mask_scores(tile);
    this->raise_reference(factor);
    this->template exponentiate<kSplits>(factor);
    if constexpr (kSplits) {
      // All warps have read the box of kpe.
      sync_scores();
      this->store_operand(this->probability_low_, this->box(stage(), 0));
    }
    Barrier::wait(&shared_.probability_empty, tile_number_ & 1 ^ 1);
    this->store_operand(this->probability_, shared_.probability);
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) shared_.factor[row(i)] = factor[i];
    }
    if (is_last) finish_sums();
    cutlass::arch::fence_view_async_shared();
    Barrier::arrive(&shared_.probability_full);
  }

  // The sums to the value warpgroups; the statistics to where they belong.
  __device__ __forceinline__ void finish_sums() {
    this->add_sums_of_lanes();
    if (lane_ % 4 != 0) return;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      shared_.row_sum[row(i)] = row_sum_[i];
      this->write_statistics(i);
    }
  }
};

template <class Traits>
class ValueWarpgroup : WithOutput<RowsOfEveryTile<Traits>> {
  using Base = WithOutput<RowsOfEveryTile<Traits>>;
  using Base::kRows, Base::multiply_, Base::output_, Base::row, Base::segment,
      Base::segment_number_, Base::shared_, Base::stage, Base::thread_, Base::tile_number_;
  using typename Base::DType;

 public:
  __device__ ValueWarpgroup(Params const& params, typename Traits::SharedStorage& shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void run() {
    for (; this->wait_for_segment(); ++segment_number_) {
      this->release_queries();  // of which it uses none, but it is done with the segment before
      clear(output_);
      if (this->splits_probability()) {
        run_segment<true>();
      } else {
        run_segment<false>();
      }
      this->write_segment(row_sum_, warpgroup_);
    }
  }

 private:
  template <bool kSplits>
  __device__ __forceinline__ void run_segment() {
    int32_t const tile_end = segment().tile_end;
#pragma unroll 1
    for (int32_t tile = segment().tile_begin; tile < tile_end; ++tile, ++tile_number_) {
#pragma unroll
      for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
        this->wait_for_box(Base::first_box(warpgroup_) + i);
      }
      this->clear_tokens_past_end(tile, stage(), warpgroup_);
      Barrier::wait(&shared_.probability_full, tile_number_ & 1);
      float const factor[kRows] = {shared_.factor[row(0)], shared_.factor[row(1)]};
      this->rescale_output(factor);
      multiply_values<kSplits>();
      if (tile + 1 == tile_end) {
#pragma unroll
        for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = shared_.row_sum[row(i)];
      }
      release_values<kSplits>();
      Barrier::arrive(&shared_.probability_empty);
    }
  }

  // O[g] += P V[g].
  template <bool kSplits>
  __device__ __forceinline__ void multiply_values() {
    this->template add_shared_product<kSplits>(shared_.probability, this->box(stage(), 0), stage(),
                                               warpgroup_);
  }

  // Once the products are done.
  template <bool kSplits>
  __device__ __forceinline__ void release_values() {
    warpgroup_wait<0>();
    warpgroup_fence_operand(output_);
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
      this->release_box(stage(), Base::first_box(warpgroup_) + i, kMathWarpgroups);
    }
    if constexpr (kSplits) this->release_box(stage(), 0, 1);
  }

  int32_t const warpgroup_ = cutlass::canonical_warp_group_idx();
  float row_sum_[kRows];
};

}  // namespace etap
