/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math of requests of more than 64 rows, which arithmetic bounds, in row tiles of 64 with rows
 * on WGMMA's M. Token tiles come in pairs; warpgroup g has the scores of tile g of a pair, and half
 * g of O. The order is that of FlashMLA's seesaw schedule (deepseek-ai/FlashMLA,
 * docs/20250422-new-kernel-deep-dive.md): while one multiplies, the other has its softmax, and each
 * gives boxes back that the next pair needs first.
 *
 *   warpgroup 0                                  warpgroup 1
 *   P[0] = softmax(S[0])  -- reference, factor ->
 *   O[0] += P[0] V[0]                            P[1] = softmax(S[1])
 *                         <- reference, factor --
 *   P[0] *= factor                               O[1] += P[1] V[1]
 *                         -- P[0] ------------->
 *                                                O[1] += P[0] V[0]
 *                         <- P[1] --------------
 *   O[0] += P[1] V[1]                            S[1] = Q K[1]^T of the next pair
 *   S[0] = Q K[0]^T of the next pair
 *
 * Most pairs are plain: every row sees all their tokens, and others follow. They have a loop of
 * their own, for what the last ones ask of a segment takes 7 % of the time of a pair.
 */
#pragma once

#include "etap_mla_rows.cuh"

namespace etap {

// Of both warpgroups: they run the same instructions at a segment's end, so that these are fetched
// once. Where the two differ, kWarpgroup says which one it is.
template <class Traits>
class SeesawWarpgroup : WithOutput<WithScores<RowsWarpgroup<Traits>>> {
  using Base = WithOutput<WithScores<RowsWarpgroup<Traits>>>;
  using Base::box, Base::first_box, Base::kRows, Base::lane_, Base::multiply_, Base::output_,
      Base::probability_, Base::probability_low_, Base::reference_, Base::row, Base::row_sum_,
      Base::score, Base::segment, Base::segment_number_, Base::shared_, Base::thread_;
  using typename Base::DType;

  // Of warpgroup 0; that of warpgroup 1 comes next.
  static constexpr uint32_t kReferenceBarrier = kMathBarrier + 1;
  static constexpr uint32_t kProbabilityBarrier = kReferenceBarrier + kMathWarpgroups;

 public:
  __device__ SeesawWarpgroup(Params const& params, typename Traits::SharedStorage& shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void run() {
    int32_t const warpgroup = cutlass::canonical_warp_group_idx();
    for (; this->wait_for_segment(); ++segment_number_) {
      clear(output_);
      this->await_own_queries(sync_math);
      this->begin_scores();
      if (warpgroup == 0) {
        run_segment<0>();
      } else {
        run_segment<1>();
      }
      finish_sums(warpgroup);
      this->write_segment(row_sum_, warpgroup);
    }
  }

 private:
  template <int kWarpgroup>
  __device__ __forceinline__ void run_segment() {
    int32_t const tile_end = segment().tile_end;
    int32_t tile = segment().tile_begin;
    if (tile + kWarpgroup < tile_end) {
      add_scores_of_half<kWarpgroup, kWarpgroup>();
      finish_scores<kWarpgroup>();
    }
    if (tile + kWarpgroup + 2 >= tile_end) this->release_queries();
    if (this->splits_probability()) {
#pragma unroll 1
      for (; tile < tile_end; tile += 2) run_pair<kWarpgroup, true, false>(tile, tile_end);
      return;
    }
    // After a plain pair both warpgroups have scores to make, and not the last ones.
    int32_t const plain_end = min(segment().masked_tile_begin - 1, tile_end - 5);
#pragma unroll 1
    for (; tile < plain_end; tile += 2) run_pair<kWarpgroup, false, true>(tile, tile_end);
#pragma unroll 1
    for (; tile < tile_end; tile += 2) run_pair<kWarpgroup, false, false>(tile, tile_end);
  }

  template <int kWarpgroup, bool kSplits, bool kIsPlain>
  __device__ __forceinline__ void run_pair(int32_t tile, int32_t tile_end) {
    if constexpr (kWarpgroup == 0) {
      run_pair_as_first<kSplits, kIsPlain>(tile, tile_end);
    } else {
      run_pair_as_second<kSplits, kIsPlain>(tile, tile_end);
    }
  }

  template <bool kSplits, bool kIsPlain>
  __device__ __forceinline__ void run_pair_as_first(int32_t tile, int32_t tile_end) {
    bool const has_second = kIsPlain || tile + 1 < tile_end;
    ++laps_;
    float factor[kRows];
    this->template scale_and_mask_scores<kIsPlain>(tile);
    this->raise_reference(factor);
    publish_reference<0>(factor);
    this->template exponentiate<kSplits>(factor);
    if (!has_second) {
      sync_warpgroup<0>();  // all warps have read the box of kpe
      share_first_probability<kSplits>();
    }
    this->rescale_output(factor);
    multiply_own_probability<0, kSplits, kIsPlain>(tile);
    warpgroup_wait<0>();
    warpgroup_fence_operand(output_);
    release_values<0>(0);
    if (!has_second) return;

    receive_reference<0>(factor);
    rescale_probability<kSplits>(factor);
    share_first_probability<kSplits>();
    wait_for(kProbabilityBarrier + 1);
    this->rescale_output(factor);
    multiply_other_probability<0, kSplits, kIsPlain>(tile + 1);
    if (kIsPlain || tile + 2 < tile_end) {
      add_scores_of_half<0, 0>();
      warpgroup_wait<1>();
      release_values<0>(1);
      finish_scores<0>();
      if (!kIsPlain && tile + 4 >= tile_end) this->release_queries();
    } else {
      warpgroup_wait<0>();
      release_values<0>(1);
    }
    warpgroup_fence_operand(output_);
  }

  template <bool kSplits, bool kIsPlain>
  __device__ __forceinline__ void run_pair_as_second(int32_t tile, int32_t tile_end) {
    bool const has_second = kIsPlain || tile + 1 < tile_end;
    float factor[kRows];
    receive_reference<1>(factor);
    multiply_sums(factor);
    if (!has_second) {
      this->rescale_output(factor);
      wait_for(kProbabilityBarrier);
      multiply_other_probability<1, kSplits, kIsPlain>(tile);
      warpgroup_wait<0>();
      warpgroup_fence_operand(output_);
      release_values<1>(0);
      return;
    }
    ++laps_;
    float own_factor[kRows];
    this->template scale_and_mask_scores<kIsPlain>(tile + 1);
    this->raise_reference(own_factor);
    publish_reference<1>(own_factor);
    this->template exponentiate<kSplits>(own_factor);
    if constexpr (kSplits) sync_warpgroup<1>();  // all warps have read the box of kpe
    this->store_operand(probability_, place_of_probability<1, kSplits>());
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) factor[i] *= own_factor[i];
    this->rescale_output(factor);
    multiply_own_probability<1, kSplits, kIsPlain>(tile + 1);
    cutlass::arch::fence_view_async_shared();
    wait_for(kProbabilityBarrier);
    multiply_other_probability<1, kSplits, kIsPlain>(tile);
    // Only now: else O[0] += P[1] V[1] would take its turn before, and the next pair's first scores
    // need what this product frees.
    if constexpr (!kSplits) announce(kProbabilityBarrier + 1);
    warpgroup_wait<1>();
    release_values<1>(1);
    warpgroup_wait<0>();
    warpgroup_fence_operand(output_);
    release_values<1>(0);
    if constexpr (kSplits) {
      sync_warpgroup<1>();  // all warps have read the other's low part, over which this one goes
      this->store_operand(probability_low_, shared_.probability);
      cutlass::arch::fence_view_async_shared();
      announce(kProbabilityBarrier + 1);
    }
    if (kIsPlain || tile + 3 < tile_end) {
      add_scores_of_half<1, 1>();
      finish_scores<1>();
      if (!kIsPlain && tile + 5 >= tile_end) this->release_queries();
    }
  }

  // What one warpgroup tells the other, which waits for it. With barriers in shared memory a pair
  // takes up to 5 % longer.
  __device__ __forceinline__ static void announce(uint32_t barrier) {
    cutlass::arch::NamedBarrier::arrive(kMathThreads, barrier);
  }

  __device__ __forceinline__ static void wait_for(uint32_t barrier) {
    cutlass::arch::NamedBarrier::sync(kMathThreads, barrier);
  }

  template <int kWarpgroup>
  __device__ __forceinline__ static void sync_warpgroup() {
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + kWarpgroup);
  }

  // This warpgroup's half of the values in a stage, which no one else reads any more; and, if the
  // stage is the other's, the box of kpe.
  template <int kWarpgroup>
  __device__ __forceinline__ void release_values(int32_t stage) const {
    this->release_box(stage, first_box(kWarpgroup), kMathWarpgroups);
  }

  // --- S and P ----------------------------------------------------------------------------------

  // Of this warpgroup's next tile over half kHalf of d_v; its own half comes first.
  template <int kWarpgroup, int kHalf>
  __device__ __forceinline__ void add_scores_of_half() {
    add_scores<kWarpgroup, first_box(kHalf), kBoxesPerWarpgroup>(
        kHalf == kWarpgroup ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One);
  }

  // The other half and kpe.
  template <int kWarpgroup>
  __device__ __forceinline__ void finish_scores() {
    add_scores_of_half<kWarpgroup, 1 - kWarpgroup>();
    add_scores<kWarpgroup, 0, 1>(GMMA::ScaleOut::One);
    Base::finish_scores();
  }

  template <int kWarpgroup, int kFirstBox, int kBoxes>
  __device__ __forceinline__ void add_scores(GMMA::ScaleOut first) {
    Base::template add_scores<kFirstBox, kBoxes>(
        kWarpgroup, first, [this](int32_t box) { this->wait_for_box(kWarpgroup, box, laps_); });
  }

  // For the other warpgroup, whose last ones these are now.
  template <int kWarpgroup>
  __device__ __forceinline__ void publish_reference(float const (&factor)[kRows]) const {
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) {
        shared_.references[kWarpgroup][row(i)] = {reference_[i], factor[i]};
      }
    }
    announce(kReferenceBarrier + kWarpgroup);
  }

  template <int kWarpgroup>
  __device__ __forceinline__ void receive_reference(float (&factor)[kRows]) {
    wait_for(kReferenceBarrier + 1 - kWarpgroup);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      RunningMax const received = shared_.references[1 - kWarpgroup][row(i)];
      reference_[i] = received.max;
      factor[i] = received.factor;
    }
  }

  __device__ __forceinline__ void multiply_sums(float const (&factor)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] *= factor[i];
  }

  // To the second tile's reference, which most pairs share.
  template <bool kSplits>
  __device__ __forceinline__ void rescale_probability(float const (&factor)[kRows]) {
    if (!__any_sync(0xffffffff, factor[0] != 1.f || factor[1] != 1.f)) return;
    multiply_sums(factor);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        score(i, block, 0) *= factor[i];
        score(i, block, 1) *= factor[i];
        this->template make_operand<kSplits>(i, block);
      }
    }
  }

  // Where the other warpgroup finds P of tile kTile of a pair: over that tile's box of kpe or, for
  // nobody has to wait there until all warps have read it, where low parts would be.
  template <int kTile, bool kSplits>
  __device__ DType* place_of_probability() const {
    return kTile == 1 && !kSplits ? shared_.probability : box(kTile, 0);
  }

  template <bool kSplits>
  __device__ __forceinline__ void share_first_probability() const {
    this->store_operand(probability_, place_of_probability<0, kSplits>());
    if constexpr (kSplits) this->store_operand(probability_low_, shared_.probability);
    cutlass::arch::fence_view_async_shared();
    announce(kProbabilityBarrier);
  }

  // Over both warpgroups' tiles.
  __device__ __forceinline__ void finish_sums(int32_t warpgroup) {
    auto& row_sums = shared_.row_sum[segment_number_ & 1];
    this->add_sums_of_lanes();
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      if (lane_ % 4 == 0) row_sums[warpgroup][row(i)] = row_sum_[i];
    }
    sync_math();
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      row_sum_[i] = row_sums[0][row(i)] + row_sums[1][row(i)];
      if (warpgroup == 0 && lane_ % 4 == 0) this->write_statistics(i);
    }
  }

  // --- O ----------------------------------------------------------------------------------------

  // O[g] += P V[g] of this warpgroup's tile; P is in registers.
  template <int kWarpgroup, bool kSplits, bool kIsPlain>
  __device__ __forceinline__ void multiply_own_probability(int32_t tile) {
    if constexpr (!kIsPlain) this->clear_tokens_past_end(tile, kWarpgroup, kWarpgroup);
    typename Traits::MmaPvRegisters mma;
    warpgroup_fence_operand(probability_);
    if constexpr (kSplits) warpgroup_fence_operand(probability_low_);
    this->template add_product<kSplits>(mma, probability_, probability_low_,
                                        this->values(mma, kWarpgroup, kWarpgroup));
  }

  // Of the other's tile, whose boxes that warpgroup has waited for before it announced P.
  template <int kWarpgroup, bool kSplits, bool kIsPlain>
  __device__ __forceinline__ void multiply_other_probability(int32_t tile) {
    constexpr int kOther = 1 - kWarpgroup;
    if constexpr (!kIsPlain) this->clear_tokens_past_end(tile, kOther, kWarpgroup);
    this->template add_shared_product<kSplits>(place_of_probability<kOther, kSplits>(),
                                               shared_.probability, kOther, kWarpgroup);
  }

  uint32_t laps_ = 0;  // this warpgroup's tiles before the one whose scores are next
};

}  // namespace etap
