/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math warpgroups of row tiles of 64, with rows on WGMMA's M. Both walk through all tiles; tile
 * t belongs to warpgroup t % 2, and warpgroup g has half g of d_v of O in its registers. For each
 * of its tiles t:
 *
 *   issue   S = Q K^T of tile t, box by box as they arrive
 *   issue   O[g] += P V[g] of tile t - 1, whose P the other warpgroup left in shared memory
 *   boxes of tile t - 1 -> producer
 *   r = running maxima; P = 2^(S - r)
 *   P -> shared memory, for the other warpgroup
 *   O[g] += P V[g] of tile t;  boxes of tile t -> producer
 *
 * So the tensor cores have the other warpgroup's products while one of the two does a softmax.
 */
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_loader.cuh"
#include "etap_mla_output.cuh"
#include "etap_mla_rows_traits.cuh"
#include "etap_mla_wgmma.cuh"

namespace etap {

// And the next: P, or the reference, of warpgroup 0's, 1's tile is there.
constexpr uint32_t kProbabilityBarrier = 3;
constexpr uint32_t kReferenceBarrier = 5;

template <class Traits>
class RowsMathWarpgroup {
  using DType = typename Traits::DType;
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRows = 2;  // of a thread: lane / 4 of its warp's 16, and that plus 8
  static constexpr int kOutputBlocks = Traits::kHalfColumns / 8;

 public:
  __device__ RowsMathWarpgroup(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ __forceinline__ void run() {
    while (begin_segment()) {
      if (splits_probability()) {
        run_segment<true>();
      } else {
        run_segment<false>();
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  __device__ int32_t row(int32_t i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  __device__ bool splits_probability() const {
    return segment().request.kv_len <= Traits::kLongestSplitPRequest;
  }

  // --- Tiles ------------------------------------------------------------------------------------

  // Waits for the next segment and its queries; false if there is none.
  __device__ __forceinline__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    int32_t const num_tiles = segment().num_tiles();
    if (num_tiles == 0) return false;
    tile_end_ = segment().tile_end;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      reference_[i] = -INFINITY;
      row_sum_[i] = 0.f;
    }
    clear(output_);
    // A warpgroup without a tile of its own in this segment has no use for Q.
    if (num_tiles == 1 && (tile_number_ & 1) != warpgroup_) {
      arrive_once_per_warp(&shared_.query_empty, 1);
    }
    return true;
  }

  template <bool kSplits>
  __device__ __forceinline__ void run_segment() {
    tile_ = segment().tile_begin;
    if ((tile_number_ & 1) != warpgroup_) {
      ++tile_;
      ++tile_number_;
    }
    if (tile_ == segment().tile_begin) run_tile<kSplits, /*kHasPrevious=*/false>();
#pragma unroll 1
    while (tile_ < tile_end_) run_tile<kSplits, /*kHasPrevious=*/true>();
    bool const is_last_of_other = tile_ == tile_end_;
    if (is_last_of_other) {
      begin_other_tile<kSplits>();
      finish_other_tile<kSplits, /*kGroupsBehind=*/0>();
    } else {
      --tile_number_;
    }
  }

  // Tile t of this warpgroup, and the other's tile t - 1.
  template <bool kSplits, bool kHasPrevious>
  __device__ __forceinline__ void run_tile() {
    begin_scores();
    issue_scores<0, Traits::kBoxesAhead>();
    if constexpr (kHasPrevious) {
      begin_other_tile<kSplits>();
      // The tensor cores go on with a pair of boxes of S while the values of the tile before are
      // given back.
      constexpr int kSoon = Traits::kBoxesAhead + Traits::kBoxesPerPair;
      issue_scores<Traits::kBoxesAhead, kSoon>();
      finish_other_tile<kSplits, /*kGroupsBehind=*/1>();
      issue_scores<kSoon, kBoxesPerTile>();
    } else {
      issue_scores<Traits::kBoxesAhead, kBoxesPerTile>();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores_);
    bool const is_last_of_mine = tile_ + 2 >= tile_end_;
    if (is_last_of_mine) arrive_once_per_warp(&shared_.query_empty, 1);
    if constexpr (!kSplits) release_kpe(warpgroup_);

    float reference[kRows], tile_sum[kRows];
    scale_and_mask_scores();
    raise_reference(reference);
    exponentiate<kSplits>(reference, tile_sum);
    publish_probabilities<kSplits>();
    follow_reference(reference);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] += tile_sum[i];
    accumulate_own_tile<kSplits>();
    tile_ += 2;
    tile_number_ += 2;
  }

  // Issues O[g] += P V[g] of tile_ - 1. The other warpgroup tells its reference before its P.
  template <bool kSplits>
  __device__ __forceinline__ void begin_other_tile() {
    cutlass::arch::NamedBarrier::sync(kMathThreads, kReferenceBarrier + other_warpgroup());
    float reference[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) reference[i] = shared_.reference[other_warpgroup()][row(i)];
    follow_reference(reference);
    wait_for_values(tile_number_ - 1);
    cutlass::arch::NamedBarrier::sync(kMathThreads, kProbabilityBarrier + other_warpgroup());

    typename Traits::MmaPvShared mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor high = make_tensor(make_smem_ptr(shared_.probability), typename Traits::LayoutP{});
    Tensor low = make_tensor(make_smem_ptr(box(other_warpgroup(), 0)), typename Traits::LayoutP{});
    multiply_values<kSplits>(mma, thread_mma.partition_fragment_A(high),  // (MMA, 1, 4)
                             thread_mma.partition_fragment_A(low), tile_ - 1, other_warpgroup());
  }

  // Once its products are done, behind which so many groups of WGMMAs were issued.
  template <bool kSplits, int kGroupsBehind>
  __device__ __forceinline__ void finish_other_tile() {
    release_values<kGroupsBehind>(other_warpgroup());
    if constexpr (kSplits) release_kpe(other_warpgroup());
  }

  template <bool kSplits>
  __device__ __forceinline__ void accumulate_own_tile() {
    wait_for_values(tile_number_);
    typename Traits::MmaPvRegisters mma;
    multiply_values<kSplits>(mma, probability_, probability_low_, tile_, warpgroup_);
    release_values<0>(warpgroup_);
  }

  template <bool kSplits, class Mma, class Operand>
  __device__ __forceinline__ void multiply_values(Mma mma, Operand const& high, Operand const& low,
                                                  int32_t tile, int32_t stage) {
    if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end(tile, stage);
    Tensor v =
        make_tensor(make_smem_ptr(box(stage, first_value_box())), typename Traits::LayoutV{});
    Tensor v_operand = mma.get_slice(thread_).partition_fragment_B(v);  // (MMA, 1, 4)
    mma.accumulate_ = GMMA::ScaleOut::One;
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    multiply_(mma, high, v_operand, output_);
    if constexpr (kSplits) multiply_(mma, low, v_operand, output_);
    warpgroup_commit_batch();
  }

  // --- Boxes ------------------------------------------------------------------------------------

  __device__ int32_t other_warpgroup() const { return 1 - warpgroup_; }

  // Box `number` of a stage: 0 is kpe, later P, then come those of ckv.
  __device__ DType* box(int32_t stage, int32_t number) const {
    return shared_.ring + (stage * kBoxesPerTile + number) * kBoxElements;
  }
  __device__ uint64_t* box_empty(int32_t stage, int32_t number) const {
    return &shared_.box_empty[stage * kBoxesPerTile + number];
  }

  // Waits for a box, or for the pair that it begins, of the tile that is in the stage. Both stages
  // are filled in turns, beginning with the first.
  __device__ void wait_for_box(int32_t stage, int32_t number, uint32_t tile_number) const {
    Barrier::wait(&shared_.box_full[stage * kBoxesPerTile + number], tile_number / 2 & 1);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
  }

  // The first of this warpgroup's boxes of ckv.
  __device__ int32_t first_value_box() const { return 1 + warpgroup_ * kBoxesPerWarpgroup; }

  // By its last reader: the warpgroup that made S or, if the low part of P went there, the other.
  __device__ void release_kpe(int32_t stage) const {
    arrive_once_per_warp(box_empty(stage, 0), kMathWarpgroups);
  }

  // Waits for the products with V[g], and gives its boxes back.
  template <int kGroupsBehind>
  __device__ __forceinline__ void release_values(int32_t stage) {
    warpgroup_wait<kGroupsBehind>();
    warpgroup_fence_operand(output_);
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
      arrive_once_per_warp(box_empty(stage, first_value_box() + i), kMathWarpgroups);
    }
  }

  __device__ __forceinline__ void wait_for_values(uint32_t tile_number) const {
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
      wait_for_box(tile_number & 1, first_value_box() + i, tile_number);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: its scores are masked.)
  __device__ __forceinline__ void clear_tokens_past_end(int32_t tile, int32_t stage) const {
    int32_t const tokens = max(segment().request.kv_len - tile * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
    auto* const chunks = reinterpret_cast<uint4*>(box(stage, first_value_box()));
#pragma unroll 1
    for (int32_t i = 0; i < kBoxesPerWarpgroup; ++i) {
#pragma unroll 1
      for (int32_t j = tokens * 8 + thread_; j < kTokenTile * 8; j += kWarpgroupThreads) {
        chunks[i * kTokenTile * 8 + j] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
  }

  // --- S, softmax, P ----------------------------------------------------------------------------

  __device__ __forceinline__ void begin_scores() {
    mma_qk_.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(scores_);
  }

  // S += Q K^T over some of the tile's boxes.
  template <int kFirstBox, int kEndBox>
  __device__ __forceinline__ void issue_scores() {
    auto const thread_mma = mma_qk_.get_slice(thread_);
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor k = make_tensor(make_smem_ptr(box(warpgroup_, 0)), typename Traits::LayoutK{});
    Tensor q_operand = thread_mma.partition_fragment_A(q);  // (MMA, 1, 4, box)
    Tensor k_operand = thread_mma.partition_fragment_B(k);
#pragma unroll
    for (int32_t i = kFirstBox; i < kEndBox; ++i) {
      int32_t const number = Traits::box_in_order(warpgroup_, i);
      if (Traits::has_barrier(i)) wait_for_box(warpgroup_, number, tile_number_);
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(k_operand); ++step) {
        multiply_(mma_qk_, q_operand(_, 0, step, number), k_operand(_, 0, step, number),
                  scores_(_, 0, 0));
        mma_qk_.accumulate_ = GMMA::ScaleOut::One;
      }
    }
    warpgroup_commit_batch();
  }

  // Score of this thread's row i and token 8 * block + 2 * (lane % 4) + odd of the tile.
  __device__ float& score(int32_t i, int32_t block, int32_t odd) {
    return scores_(block * 4 + i * 2 + odd);
  }

  // O of this thread's row i and column 8 * block + 2 * (lane % 4) + odd of its warpgroup's half.
  __device__ float& output(int32_t i, int32_t block, int32_t odd) {
    return output_(block * 4 + i * 2 + odd);
  }

  // To units of log2, -inf where a row does not see a token.
  __device__ __forceinline__ void scale_and_mask_scores() {
#pragma unroll
    for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.scale_log2;

    if (tile_ < segment().masked_tile_begin) return;
    Request const& request = segment().request;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      int32_t const visible =
          visible_tokens(params_, request, segment().row_begin + row(i)) - tile_ * kTokenTile;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
#pragma unroll
        for (int32_t odd = 0; odd < 2; ++odd) {
          if (block * 8 + 2 * (lane_ % 4) + odd >= visible) score(i, block, odd) = -INFINITY;
        }
      }
    }
  }

  // The reference for this tile, from the tile before's and this tile's scores.
  __device__ __forceinline__ void raise_reference(float (&reference)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float max = -INFINITY;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        max = fmaxf(max, fmaxf(score(i, block, 0), score(i, block, 1)));
      }
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
      reference[i] = fmaxf(reference_[i], max);
      if (lane_ % 4 == 0) shared_.reference[warpgroup_][row(i)] = reference[i];
    }
    cutlass::arch::NamedBarrier::arrive(kMathThreads, kReferenceBarrier + warpgroup_);
  }

  // Turns the scores into probabilities, and these into operands.
  template <bool kSplits>
  __device__ __forceinline__ void exponentiate(float const (&reference)[kRows],
                                               float (&tile_sum)[kRows]) {
    Tensor words = recast<uint32_t>(probability_);
    Tensor low_words = recast<uint32_t>(probability_low_);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      tile_sum[i] = 0.f;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        float const even = rescale_factor(score(i, block, 0), reference[i]);
        float const odd = rescale_factor(score(i, block, 1), reference[i]);
        tile_sum[i] += even + odd;
        uint32_t const high = pack<DType>(even, odd);
        words(block * 2 + i) = high;
        if constexpr (kSplits) {
          float2 const rounded = unpack<DType>(high);
          low_words(block * 2 + i) = pack<DType>(even - rounded.x, odd - rounded.y);
        }
      }
    }
  }

  // P to shared memory, for the other warpgroup. A warp writes the rows that it read itself, when
  // the other warpgroup's P was there; but the box of kpe was read by all warps.
  template <bool kSplits>
  __device__ __forceinline__ void publish_probabilities() {
    store_operand(probability_, shared_.probability);
    if constexpr (kSplits) {
      cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
      store_operand(probability_low_, box(warpgroup_, 0));
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive(kMathThreads, kProbabilityBarrier + warpgroup_);
  }

  // Lane l addresses row l % 8 of matrix l / 8; the four matrices are two blocks of 8 rows, then
  // the same 8 tokens on.
  template <typename Operand>
  __device__ __forceinline__ void store_operand(Operand const& operand, DType* destination) const {
    Tensor words = recast<uint32_t>(operand);
    int32_t const operand_row = warp_ * 16 + lane_ % 16;
#pragma unroll
    for (int32_t step = 0; step < kTokenTile / 16; ++step) {
      auto& target = *reinterpret_cast<uint128_t*>(
          destination + swizzled_chunk(operand_row, step * 2 + lane_ / 16));
      SM90_U32x4_STSM_N::copy(words(step * 4), words(step * 4 + 1), words(step * 4 + 2),
                              words(step * 4 + 3), target);
    }
  }

  // Brings O and l to another reference. Most tiles have the one of the tile before.
  __device__ __forceinline__ void follow_reference(float const (&reference)[kRows]) {
    bool const is_raised = reference[0] != reference_[0] || reference[1] != reference_[1];
    if (!__any_sync(0xffffffff, is_raised)) return;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float const factor = rescale_factor(reference_[i], reference[i]);
      reference_[i] = reference[i];
      row_sum_[i] *= factor;
#pragma unroll
      for (int32_t block = 0; block < kOutputBlocks; ++block) {
        output(i, block, 0) *= factor;
        output(i, block, 1) *= factor;
      }
    }
  }

  // --- End of a segment -------------------------------------------------------------------------

  __device__ __forceinline__ void finish_segment() {
    float (&sums)[kMathWarpgroups][kRowTile] = shared_.row_sum[segment_number_ & 1];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 1);
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 2);
      if (lane_ % 4 == 0) sums[warpgroup_][row(i)] = row_sum_[i];
    }
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = sums[0][row(i)] + sums[1][row(i)];

    bool const is_whole = segment().is_whole();
    int32_t const slot = segment().slot;
    if (is_whole) {
      write_output();
    } else {
      write_partial(slot);
    }
    if (warpgroup_ == 0 && lane_ % 4 == 0) write_statistics(is_whole, slot);
  }

  // LSE or, of a part, reference and sum.
  __device__ __forceinline__ void write_statistics(bool is_whole, int32_t slot) const {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      if (!is_whole) {
        params_.partial_ml[slot * kRowTile + row(i)] = make_float2(reference_[i], row_sum_[i]);
      } else if (params_.lse != nullptr && row(i) < segment().num_rows) {
        params_.lse[segment().packed_row + row(i)] =
            log_sum_exp(params_, reference_[i], row_sum_[i]);
      }
    }
  }

  // Four lanes share a row; each writes every fourth block of 8 columns.
  __device__ __forceinline__ void write_output() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      bool const exists = row(i) < segment().num_rows;
      float const scale = normalizer(row_sum_[i]);
      DType* const out = output_row<DType>(params_, segment().packed_row + (exists ? row(i) : 0)) +
                         warpgroup_ * Traits::kHalfColumns + 8 * (lane_ % 4);
#pragma unroll
      for (int32_t block = 0; block < kOutputBlocks; block += 4) {
        uint32_t words[4];
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) {
          words[j] = pack<DType>(output(i, block + j, 0) * scale, output(i, block + j, 1) * scale);
        }
        transpose_over_quad(words);
        store_words(words, out + block * 8, exists);
      }
    }
  }

  // The merge expects fragments of O^T: two neighbouring rows of one column in a lane. Here
  // a lane has two neighbouring columns of one row; lanes of neighbouring rows exchange one each.
  __device__ __forceinline__ void write_partial(int32_t slot) {
    int32_t const row_of_lane = lane_ / 4;
    bool const is_odd = row_of_lane & 1;
    int32_t const fragment_lane = (2 * (lane_ % 4) + (is_odd ? 1 : 0)) * 4 + row_of_lane / 2;
    auto exchange = [&](int32_t i, int32_t block) {
      float const first = output(i, block, 0), second = output(i, block, 1);
      float const kept = is_odd ? second : first;
      float const received = __shfl_xor_sync(0xffffffff, is_odd ? first : second, 4);
      return is_odd ? make_float2(received, kept) : make_float2(kept, received);
    };
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t fragment = 0; fragment < kOutputBlocks / 2; ++fragment) {
        float2 const lower = exchange(i, 2 * fragment), upper = exchange(i, 2 * fragment + 1);
        int32_t const index =
            partial_index<kRowTile>(slot, warpgroup_ * kBoxesPerWarpgroup + fragment / 4,
                                    warp_ * 2 + i, fragment % 4, fragment_lane);
        *reinterpret_cast<float4*>(params_.partial_out + index) =
            make_float4(lower.x, lower.y, upper.x, upper.y);
      }
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  Multiply multiply_;
  int32_t const thread_ = threadIdx.x % kWarpgroupThreads;
  int32_t const warpgroup_ = cutlass::canonical_warp_group_idx();
  int32_t const warp_ = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane_ = threadIdx.x % 32;

  uint32_t segment_number_ = 0;  // of this CTA
  int32_t tile_, tile_end_;      // of the segment
  uint32_t tile_number_ = 0;     // tile_ counted over all segments of this CTA

  typename Traits::MmaQk mma_qk_;
  decltype(partition_fragment_C(typename Traits::MmaQk{},
                                Shape<Int<kRowTile>, Int<kTokenTile>>{})) scores_;
  using Probabilities = decltype(make_tensor<DType>(partition_shape_A(
      typename Traits::MmaPvRegisters{}, Shape<Int<kRowTile>, Int<kTokenTile>>{})));
  Probabilities probability_, probability_low_;
  decltype(partition_fragment_C(typename Traits::MmaPvRegisters{},
                                Shape<Int<kRowTile>, Int<Traits::kHalfColumns>>{})) output_;
  float reference_[kRows];  // what output_ and row_sum_ are relative to
  float row_sum_[kRows];    // over this thread's tokens only, until the segment ends
};

}  // namespace etap
