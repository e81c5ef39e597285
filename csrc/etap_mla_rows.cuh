/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What warpgroups with rows on WGMMA's M have in common, whoever makes scores and whoever has
 * values (etap_mla_rows_math.cuh, etap_mla_seesaw_math.cuh): S and P, O, and how these are written.
 */
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_loader.cuh"
#include "etap_mla_math_segment.cuh"
#include "etap_mla_partial.cuh"
#include "etap_mla_rows_traits.cuh"
#include "etap_mla_wgmma.cuh"

namespace etap {

// A thread has two rows of its warp's 16: lane / 4, and that plus 8.
template <class Traits_>
class RowsWarpgroup : protected MathSegment<Traits_> {
  using Base = MathSegment<Traits_>;

 protected:
  using Base::segment, Base::segment_number_, Base::shared_;
  using Traits = Traits_;
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

  // Box `number` of the tile in a stage: 0 is kpe, later some of P, then come those of ckv.
  __device__ static int32_t slot(int32_t stage, int32_t number) {
    return stage * kBoxesPerTile + number;
  }

  __device__ DType* box(int32_t stage, int32_t number) const {
    return shared_.ring + slot(stage, number) * kBoxElements;
  }

  // The first box of a half of ckv.
  __device__ static constexpr int32_t first_box(int32_t half) {
    return 1 + half * kBoxesPerWarpgroup;
  }

  // Waits for a box, or for the pair that it begins, in a stage that was filled so often before.
  __device__ void wait_for_box(int32_t stage, int32_t number, uint32_t laps) const {
    Barrier::wait(&shared_.box_full[slot(stage, number)], laps & 1);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
  }

  // By each warp that read it last: gives back a box, or those that go with it.
  __device__ void release_box(int32_t stage, int32_t number, uint32_t count) const {
    arrive_once_per_warp(&shared_.box_empty[slot(stage, number)], count);
  }

  int32_t const thread_ = threadIdx.x % kWarpgroupThreads;
  int32_t const warp_ = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane_ = threadIdx.x % 32;
  Multiply multiply_;
};

// A warpgroup that makes scores.
template <class Base_>
class WithScores : protected Base_ {
  using Base = Base_;

 protected:
  using Base::kRows, Base::kRowTile, Base::lane_, Base::multiply_, Base::params_, Base::row,
      Base::segment, Base::shared_, Base::thread_, Base::warp_;
  using typename Base::DType, typename Base::Traits;

  using Base::Base;

  __device__ __forceinline__ void begin_scores() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      reference_[i] = -INFINITY;
      row_sum_[i] = 0.f;
    }
  }

  // S = Q K^T or S += Q K^T, as `first` says, over some boxes of the tile in a stage; wait(box)
  // waits for one.
  template <int kFirstBox, int kBoxes, class Wait>
  __device__ __forceinline__ void add_scores(int32_t stage, GMMA::ScaleOut first,
                                             Wait const& wait) {
    typename Traits::MmaQk mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor k = make_tensor(make_smem_ptr(this->box(stage, 0)), typename Traits::LayoutK{});
    Tensor q_operand = thread_mma.partition_fragment_A(q);  // (MMA, 1, 4, box)
    Tensor k_operand = thread_mma.partition_fragment_B(k);
    mma.accumulate_ = first;
    warpgroup_fence_operand(scores_);
#pragma unroll
    for (int32_t i = kFirstBox; i < kFirstBox + kBoxes; ++i) {
      if (Traits::has_barrier(i)) wait(i);
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(k_operand); ++step) {
        multiply_(mma, q_operand(_, 0, step, i), k_operand(_, 0, step, i), scores_(_, 0, 0));
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
    }
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void finish_scores() {
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores_);
  }

  // Score, later probability, of this thread's row i and token 8 * block + 2 * (lane % 4) + odd of
  // the tile.
  __device__ float& score(int32_t i, int32_t block, int32_t odd) {
    return scores_(block * 4 + i * 2 + odd);
  }

  // To units of log2, -inf where a row does not see a token.
  template <bool kIsPlain = false>
  __device__ __forceinline__ void scale_and_mask_scores(int32_t tile) {
#pragma unroll
    for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.scale_log2;

    if (kIsPlain || tile < segment().masked_tile_begin) return;
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
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float tile_sum = 0.f;
#pragma unroll
      for (int32_t block = 0; block < kTokenTile / 8; ++block) {
        score(i, block, 0) = rescale_factor(score(i, block, 0), reference_[i]);
        score(i, block, 1) = rescale_factor(score(i, block, 1), reference_[i]);
        tile_sum += score(i, block, 0) + score(i, block, 1);
        make_operand<kSplits>(i, block);
      }
      row_sum_[i] = row_sum_[i] * factor[i] + tile_sum;
    }
  }

  template <bool kSplits>
  __device__ __forceinline__ void make_operand(int32_t i, int32_t block) {
    float const even = score(i, block, 0), odd = score(i, block, 1);
    uint32_t const high = pack<DType>(even, odd);
    recast<uint32_t>(probability_)(block * 2 + i) = high;
    if constexpr (kSplits) {
      float2 const rounded = unpack<DType>(high);
      recast<uint32_t>(probability_low_)(block * 2 + i) =
          pack<DType>(even - rounded.x, odd - rounded.y);
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

  // Of this thread's rows, which four lanes share.
  __device__ __forceinline__ void add_sums_of_lanes() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 1);
      row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], 2);
    }
  }

  // LSE or, of a part, reference and sum.
  __device__ __forceinline__ void write_statistics(int32_t i) const {
    if (!segment().is_whole()) {
      PartSlot<Traits> const part(params_, this->shared_.merge, segment().slot);
      store_row_of_part(part, row(i), reference_[i], row_sum_[i]);
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

// A warpgroup that has half of O.
template <class Base_>
class WithOutput : protected Base_ {
  using Base = Base_;

 protected:
  using Base::kRows, Base::kRowTile, Base::lane_, Base::multiply_, Base::params_, Base::row,
      Base::segment, Base::thread_, Base::warp_;
  using typename Base::DType, typename Base::Traits;
  static constexpr int kOutputBlocks = Traits::kHalfColumns / 8;

  using Base::Base;

  // V[half] of the tile in a stage, as an operand (MMA, 1, 4).
  template <class Mma>
  __device__ auto values(Mma const& mma, int32_t stage, int32_t half) const {
    Tensor v = make_tensor(make_smem_ptr(this->box(stage, Base::first_box(half))),
                           typename Traits::LayoutV{});
    return mma.get_slice(thread_).partition_fragment_B(v);
  }

  // O += P V, asynchronously; P in a high and perhaps a low part.
  template <bool kSplits, class Mma, class Part, class Values>
  __device__ __forceinline__ void add_product(Mma& mma, Part const& high, Part const& low,
                                              Values const& v_operand) {
    mma.accumulate_ = GMMA::ScaleOut::One;
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    multiply_(mma, high, v_operand, output_);
    if constexpr (kSplits) multiply_(mma, low, v_operand, output_);
    warpgroup_commit_batch();
  }

  // The same with P in shared memory.
  template <bool kSplits>
  __device__ __forceinline__ void add_shared_product(DType* high_part, DType* low_part,
                                                     int32_t stage, int32_t half) {
    typename Traits::MmaPv mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor high = make_tensor(make_smem_ptr(high_part), typename Traits::LayoutP{});
    Tensor low = make_tensor(make_smem_ptr(low_part), typename Traits::LayoutP{});
    add_product<kSplits>(mma, thread_mma.partition_fragment_A(high),
                         thread_mma.partition_fragment_A(low), values(mma, stage, half));
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: its scores are masked.)
  __device__ void clear_tokens_past_end(int32_t tile, int32_t stage, int32_t half) const {
    if constexpr (Traits::kKvLoader == KvLoader::kGather) return;  // which copies zeros
    int32_t const tokens = max(segment().request.kv_len - tile * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
    auto* const chunks = reinterpret_cast<uint4*>(this->box(stage, Base::first_box(half)));
#pragma unroll 1
    for (int32_t i = 0; i < kBoxesPerWarpgroup; ++i) {
#pragma unroll 1
      for (int32_t j = tokens * 8 + thread_; j < kTokenTile * 8; j += kWarpgroupThreads) {
        chunks[i * kTokenTile * 8 + j] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + half);
  }

  // O of this thread's row i and column 8 * block + 2 * (lane % 4) + odd of its warpgroup's half.
  __device__ float& output(int32_t i, int32_t block, int32_t odd) {
    return output_(block * 4 + i * 2 + odd);
  }

  // Most tiles have the reference of the tile before.
  __device__ __forceinline__ void rescale_output(float const (&factor)[kRows]) {
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

  __device__ __forceinline__ void write_segment(float const (&row_sum)[kRows], int32_t half) {
    if (segment().is_whole()) {
      write_output(row_sum, half);
    } else {
      write_part(half);
    }
  }

  decltype(partition_fragment_C(typename Traits::MmaPv{},
                                Shape<Int<kRowTile>, Int<Traits::kHalfColumns>>{})) output_;

 private:
  // Four lanes share a row; each writes every fourth block of 8 columns.
  __device__ __forceinline__ void write_output(float const (&row_sum)[kRows], int32_t half) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      bool const exists = row(i) < segment().num_rows;
      float const scale = normalizer(row_sum[i]);
      DType* const out = output_row<DType>(params_, segment().packed_row + (exists ? row(i) : 0)) +
                         half * Traits::kHalfColumns + 8 * (lane_ % 4);
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

  // O of a part, as store_part() wants it. The merge expects fragments of O^T: two neighbouring
  // rows of one column in a lane. Here a lane has two neighbouring columns of one row; lanes of
  // neighbouring rows exchange one each.
  struct NumbersOfPart {
    static constexpr int kChunks = 4;
    static constexpr int32_t kBlocks = kOutputBlocks / kChunks;
    WithOutput& math;
    int32_t half, warp, lane;

    __device__ __forceinline__ bool is_odd() const { return lane / 4 & 1; }

    // f(place, this thread's row, the first of two blocks of columns)
    template <class Function>
    __device__ __forceinline__ void for_each_fragment(int32_t chunk, Function const& f) const {
      int32_t const fragment_lane = (2 * (lane % 4) + (is_odd() ? 1 : 0)) * 4 + lane / 8;
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
        for (int32_t j = chunk * kBlocks / 2; j < (chunk + 1) * kBlocks / 2; ++j) {
          f(place_in_part<kRowTile>(half * kBoxesPerWarpgroup + j / 4, warp * 2 + i, j % 4,
                                    fragment_lane),
            i, 2 * j);
        }
      }
    }

    template <class Function>
    __device__ __forceinline__ void as_floats(int32_t chunk, Function const& f) const {
      auto const exchange = [this](int32_t i, int32_t block) {
        float const first = math.output(i, block, 0), second = math.output(i, block, 1);
        float const kept = is_odd() ? second : first;
        float const received = __shfl_xor_sync(0xffffffff, is_odd() ? first : second, 4);
        return is_odd() ? make_float2(received, kept) : make_float2(kept, received);
      };
      for_each_fragment(chunk, [&](int32_t place, int32_t i, int32_t block) {
        float2 const lower = exchange(i, block), upper = exchange(i, block + 1);
        f(place, make_float4(lower.x, lower.y, upper.x, upper.y));
      });
    }

    template <class Function>
    __device__ __forceinline__ void as_halves(int32_t chunk, Function const& f) const {
      auto const exchange = [this](int32_t i, int32_t block) {
        uint32_t const own = halves(i, block), received = __shfl_xor_sync(0xffffffff, own, 4);
        return __byte_perm(own, received, is_odd() ? 0x3276 : 0x5410);
      };
      for_each_fragment(chunk, [&](int32_t place, int32_t i, int32_t block) {
        f(place, make_uint2(exchange(i, block), exchange(i, block + 1)));
      });
    }

    __device__ __forceinline__ uint32_t halves(int32_t i, int32_t block) const {
      return pack<cutlass::half_t>(math.output(i, block, 0), math.output(i, block, 1));
    }
  };

  __device__ __forceinline__ void write_part(int32_t half) {
    int32_t thread = threadIdx.x;
    // So that no place is found before the loop over tiles, where there is no register to keep it.
    asm volatile("" : "+r"(thread));
    PartSlot<Traits> const part(params_, this->shared_.merge, segment().slot);
    store_part(part, NumbersOfPart{*this, half, thread / 32 % 4, thread % 32});
  }
};

}  // namespace etap
