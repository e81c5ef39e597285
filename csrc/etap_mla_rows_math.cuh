/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math of row tiles of 64, with rows on WGMMA's M, by three warpgroups. For each token tile:
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

#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_loader.cuh"
#include "etap_mla_math_segment.cuh"
#include "etap_mla_output.cuh"
#include "etap_mla_rows_traits.cuh"
#include "etap_mla_wgmma.cuh"

namespace etap {

// Of the score warpgroup's threads. P and what goes with it have mbarriers: named ones at which a
// side arrives without waiting are as fast, but compute-sanitizer's racecheck loses track there. It
// follows mbarriers, if every thread that stored or read something arrives.
constexpr uint32_t kScoreBarrier = 3;

// What both kinds of warpgroups know. A thread has two rows of its warp's 16: lane / 4, and that
// plus 8.
template <class Traits>
class RowsWarpgroup : protected MathSegment<Traits> {
  using Base = MathSegment<Traits>;

 protected:
  using Base::params_, Base::segment, Base::segment_number_, Base::shared_;
  using DType = typename Traits::DType;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRows = 2;

  using Base::Base;

  __device__ int32_t row(int32_t i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }

  // Waits for the next segment and its queries; false if there is none.
  __device__ __forceinline__ bool wait_for_segment() const {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    return segment().num_tiles() > 0;
  }

  __device__ __forceinline__ void release_queries() const {
    arrive_once_per_warp(&shared_.query_empty, 1);
  }

  // Box `number` of the tile: 0 is kpe, later the low part of P, then come those of ckv.
  __device__ DType* box(int32_t number) const {
    return shared_.ring + (stage() * kBoxesPerTile + number) * kBoxElements;
  }

  // The tile's; they are filled in turns.
  __device__ int32_t stage() const { return tile_number_ % Traits::kStages; }

  // Waits for a box, or for the pair that it begins.
  __device__ void wait_for_box(int32_t number) const {
    Barrier::wait(&shared_.box_full[stage() * kBoxesPerTile + number],
                  tile_number_ / Traits::kStages & 1);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
  }

  // By each warp of the warpgroups that read it last.
  template <int kWarpgroups>
  __device__ void release_box(int32_t number) const {
    arrive_once_per_warp(&shared_.box_empty[stage() * kBoxesPerTile + number],
                         kMathWarpgroups / kWarpgroups);
  }

  int32_t const thread_ = threadIdx.x % kWarpgroupThreads;
  int32_t const warp_ = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane_ = threadIdx.x % 32;
  Multiply multiply_;

  uint32_t tile_number_ = 0;  // over all segments of this CTA
};

template <class Traits>
class ScoreWarpgroup : RowsWarpgroup<Traits> {
  using Base = RowsWarpgroup<Traits>;
  using Base::box, Base::kRows, Base::kRowTile, Base::lane_, Base::multiply_, Base::params_,
      Base::release_box, Base::row, Base::segment, Base::segment_number_, Base::shared_,
      Base::thread_, Base::tile_number_, Base::warp_;
  using typename Base::DType;

 public:
  __device__ ScoreWarpgroup(Params const& params, typename Traits::SharedStorage& shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void run() {
    for (; this->wait_for_segment(); ++segment_number_) {
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
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      reference_[i] = -INFINITY;
      row_sum_[i] = 0.f;
    }
#pragma unroll 1
    for (int32_t tile = segment().tile_begin; tile < tile_end; ++tile, ++tile_number_) {
      run_tile<kSplits>(tile, tile + 1 == tile_end);
    }
  }

  template <bool kSplits>
  __device__ __forceinline__ void run_tile(int32_t tile, bool is_last) {
    make_scores();
    if (is_last) this->release_queries();
    if constexpr (!kSplits) this->template release_box<1>(0);

    float factor[kRows];
    scale_and_mask_scores(tile);
    raise_reference(factor);
    exponentiate<kSplits>(factor);
    if constexpr (kSplits) {
      // All warps have read the box of kpe.
      cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kScoreBarrier);
      store_operand(probability_low_, box(0));
    }
    Barrier::wait(&shared_.probability_empty, tile_number_ & 1 ^ 1);
    store_operand(probability_, shared_.probability);
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) shared_.factor[row(i)] = factor[i];
    }
    if (is_last) finish_sums();
    cutlass::arch::fence_view_async_shared();
    Barrier::arrive(&shared_.probability_full);
  }

  // S = Q K^T.
  __device__ __forceinline__ void make_scores() {
    typename Traits::MmaQk mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor k = make_tensor(make_smem_ptr(box(0)), typename Traits::LayoutK{});
    Tensor q_operand = thread_mma.partition_fragment_A(q);  // (MMA, 1, 4, box)
    Tensor k_operand = thread_mma.partition_fragment_B(k);
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(scores_);
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerTile; ++i) {
      if (Traits::has_barrier(i)) this->wait_for_box(i);
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(k_operand); ++step) {
        multiply_(mma, q_operand(_, 0, step, i), k_operand(_, 0, step, i), scores_(_, 0, 0));
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores_);
  }

  // Score of this thread's row i and token 8 * block + 2 * (lane % 4) + odd of the tile.
  __device__ float& score(int32_t i, int32_t block, int32_t odd) {
    return scores_(block * 4 + i * 2 + odd);
  }

  // To units of log2, -inf where a row does not see a token.
  __device__ __forceinline__ void scale_and_mask_scores(int32_t tile) {
#pragma unroll
    for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.scale_log2;

    if (tile < segment().masked_tile_begin) return;
    Request const& request = segment().request;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      int32_t const visible =
          visible_tokens(params_, request, segment().row_begin + row(i)) - tile * kTokenTile;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
#pragma unroll
        for (int32_t odd = 0; odd < 2; ++odd) {
          if (block * 8 + 2 * (lane_ % 4) + odd >= visible) score(i, block, odd) = -INFINITY;
        }
      }
    }
  }

  // The maxima over this tile, too; and what everything before has to be multiplied with.
  __device__ __forceinline__ void raise_reference(float (&factor)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float max = -INFINITY;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        max = fmaxf(max, fmaxf(score(i, block, 0), score(i, block, 1)));
      }
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
      max = fmaxf(max, reference_[i]);
      factor[i] = rescale_factor(reference_[i], max);
      reference_[i] = max;
    }
  }

  // Turns the scores into probabilities, and these into operands.
  template <bool kSplits>
  __device__ __forceinline__ void exponentiate(float const (&factor)[kRows]) {
    Tensor words = recast<uint32_t>(probability_);
    Tensor low_words = recast<uint32_t>(probability_low_);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float tile_sum = 0.f;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        float const even = rescale_factor(score(i, block, 0), reference_[i]);
        float const odd = rescale_factor(score(i, block, 1), reference_[i]);
        tile_sum += even + odd;
        uint32_t const high = pack<DType>(even, odd);
        words(block * 2 + i) = high;
        if constexpr (kSplits) {
          float2 const rounded = unpack<DType>(high);
          low_words(block * 2 + i) = pack<DType>(even - rounded.x, odd - rounded.y);
        }
      }
      row_sum_[i] = row_sum_[i] * factor[i] + tile_sum;
    }
  }

  // A part of P to shared memory. Lane l addresses row l % 8 of matrix l / 8; the four matrices are
  // two blocks of 8 rows, then the same 8 tokens on.
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

  // The sums, which four lanes share, to the value warpgroups; the statistics to where they belong.
  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 1);
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 2);
      if (lane_ % 4 != 0) continue;
      shared_.row_sum[row(i)] = row_sum_[i];
      write_statistics(i);
    }
  }

  // LSE or, of a part, reference and sum.
  __device__ __forceinline__ void write_statistics(int32_t i) const {
    if (!segment().is_whole()) {
      params_.partial_ml[segment().slot * kRowTile + row(i)] =
          make_float2(reference_[i], row_sum_[i]);
    } else if (params_.lse != nullptr && row(i) < segment().num_rows) {
      params_.lse[segment().packed_row + row(i)] = log_sum_exp(params_, reference_[i], row_sum_[i]);
    }
  }

  decltype(partition_fragment_C(typename Traits::MmaQk{},
                                Shape<Int<kRowTile>, Int<kTokenTile>>{})) scores_;
  using Probabilities = decltype(make_tensor<DType>(partition_shape_A(
      typename Traits::MmaPvRegisters{}, Shape<Int<kRowTile>, Int<kTokenTile>>{})));
  Probabilities probability_, probability_low_;
  float reference_[kRows];  // what row_sum_ is relative to
  float row_sum_[kRows];    // over this thread's tokens only, until the segment ends
};

template <class Traits>
class ValueWarpgroup : RowsWarpgroup<Traits> {
  using Base = RowsWarpgroup<Traits>;
  using Base::box, Base::kRows, Base::kRowTile, Base::lane_, Base::multiply_, Base::params_,
      Base::release_box, Base::row, Base::segment, Base::segment_number_, Base::shared_,
      Base::thread_, Base::tile_number_, Base::warp_;
  using typename Base::DType;
  static constexpr int kOutputBlocks = Traits::kHalfColumns / 8;

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
      if (segment().is_whole()) {
        write_output();
      } else {
        write_partial(segment().slot);
      }
    }
  }

 private:
  template <bool kSplits>
  __device__ __forceinline__ void run_segment() {
    int32_t const tile_end = segment().tile_end;
#pragma unroll 1
    for (int32_t tile = segment().tile_begin; tile < tile_end; ++tile, ++tile_number_) {
      wait_for_values();
      if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end(tile);
      Barrier::wait(&shared_.probability_full, tile_number_ & 1);
      rescale_output();
      multiply_values<kSplits>();
      if (tile + 1 == tile_end) {
#pragma unroll
        for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = shared_.row_sum[row(i)];
      }
      release_values<kSplits>();
      Barrier::arrive(&shared_.probability_empty);
    }
  }

  // The first of this warpgroup's boxes of ckv.
  __device__ int32_t first_value_box() const { return 1 + warpgroup_ * kBoxesPerWarpgroup; }

  __device__ __forceinline__ void wait_for_values() const {
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
      this->wait_for_box(first_value_box() + i);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: its scores are masked.)
  __device__ __forceinline__ void clear_tokens_past_end(int32_t tile) const {
    int32_t const tokens = max(segment().request.kv_len - tile * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
    auto* const chunks = reinterpret_cast<uint4*>(box(first_value_box()));
#pragma unroll 1
    for (int32_t i = 0; i < kBoxesPerWarpgroup; ++i) {
#pragma unroll 1
      for (int32_t j = tokens * 8 + thread_; j < kTokenTile * 8; j += kWarpgroupThreads) {
        chunks[i * kTokenTile * 8 + j] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    // Each warp's products read what all of them cleared.
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
  }

  // O of this thread's row i and column 8 * block + 2 * (lane % 4) + odd of its warpgroup's half.
  __device__ float& output(int32_t i, int32_t block, int32_t odd) {
    return output_(block * 4 + i * 2 + odd);
  }

  // To this tile's reference. Most tiles have the one of the tile before.
  __device__ __forceinline__ void rescale_output() {
    float const factor[kRows] = {shared_.factor[row(0)], shared_.factor[row(1)]};
    if (!__any_sync(0xffffffff, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t block = 0; block < kOutputBlocks; ++block) {
        output(i, block, 0) *= factor[i];
        output(i, block, 1) *= factor[i];
      }
    }
  }

  // O[g] += P V[g].
  template <bool kSplits>
  __device__ __forceinline__ void multiply_values() {
    typename Traits::MmaPv mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor v = make_tensor(make_smem_ptr(box(first_value_box())), typename Traits::LayoutV{});
    Tensor v_operand = thread_mma.partition_fragment_B(v);  // (MMA, 1, 4)
    Tensor high = make_tensor(make_smem_ptr(shared_.probability), typename Traits::LayoutP{});
    Tensor low = make_tensor(make_smem_ptr(box(0)), typename Traits::LayoutP{});
    mma.accumulate_ = GMMA::ScaleOut::One;
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    multiply_(mma, thread_mma.partition_fragment_A(high), v_operand, output_);
    if constexpr (kSplits) multiply_(mma, thread_mma.partition_fragment_A(low), v_operand, output_);
    warpgroup_commit_batch();
  }

  // Once the products are done.
  template <bool kSplits>
  __device__ __forceinline__ void release_values() {
    warpgroup_wait<0>();
    warpgroup_fence_operand(output_);
#pragma unroll
    for (int32_t i = 0; i < kBoxesPerWarpgroup; i += Traits::kBoxesPerPair) {
      this->template release_box<1>(first_value_box() + i);
    }
    if constexpr (kSplits) this->template release_box<kMathWarpgroups>(0);
  }

  // --- End of a segment -------------------------------------------------------------------------

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

  int32_t const warpgroup_ = cutlass::canonical_warp_group_idx();
  decltype(partition_fragment_C(typename Traits::MmaPv{},
                                Shape<Int<kRowTile>, Int<Traits::kHalfColumns>>{})) output_;
  float row_sum_[kRows];
};

}  // namespace etap
