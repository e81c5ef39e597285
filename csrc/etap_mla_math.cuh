/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math warpgroups of ETAP: tokens on WGMMA's M, up to 32 packed rows (query x head) on N. For
 * each token tile t:
 *
 *   t % 2 == g:   S^T = K Q^T, box by box as they arrive
 *                 m = max(m, S^T over tokens)
 *                 P^T = 2^(S^T - m) -> over the box of kpe, which S^T no longer needs
 *   -- barrier of both --
 *   both:         O^T[g] = 2^(m_old - m) O^T[g] + V^T[g] P^T, where [g] is half of d_v;
 *                 boxes -> producer, one by one
 */
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_fold.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_math_output.cuh"

namespace etap {

template <class Traits>
using MathBase = std::conditional_t<Traits::kFolds, FoldingMath<Traits>, MathOutput<Traits>>;

template <class Traits>
class MathWarpgroup : MathBase<Traits> {
  using Base = MathBase<Traits>;
  using Base::begin_output, Base::for_each_of_half, Base::has_row, Base::is_first_tile_,
      Base::kElementsPerHalf, Base::kRowBlocks, Base::kRows, Base::kRowTile, Base::last_max,
      Base::output_, Base::over_warps, Base::params_, Base::row, Base::row_sum_,
      Base::row_sum_of_thread, Base::segment, Base::segment_number_, Base::shared_,
      Base::splits_probability, Base::store_row_sums, Base::thread_, Base::tile_number_,
      Base::write_output, Base::write_part, Base::write_row;
  using typename Base::DType, typename Base::SharedStorage;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  using TileBarrier = etap::RingPosition<Traits::kTileBarriers>;
  static constexpr int kStoreBlocks = kRowBlocks == 1 ? 1 : 2;  // row blocks that stmatrix stores

 public:
  __device__ MathWarpgroup(Params const& params, SharedStorage& shared) : Base(params, shared) {}

  __device__ ETAP_INLINE_MATH void run() {
    while (begin_segment()) {
#pragma unroll 1
      for (tile_ = segment().tile_begin; tile_ < tile_end_; ++tile_) {
        if (owns_tile()) {
          compute_scores();
          store_probabilities();
        }
        // P is complete. The owner hardly waits: the other warpgroup had nothing else to do.
        sync_math();
        rescale_output();
        if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
        accumulate_output();
        is_first_tile_ = false;
        ring_ = ring_.after(kBoxesPerTile);
        if constexpr (Traits::kTilesComeWhole) tile_barrier_ = tile_barrier_.after(1);
        ++tile_number_;
        if constexpr (Traits::kFolds) {
          // Unlikely: where most calls do not go, instructions are out of the way.
          if (__builtin_expect(this->ends_leaf(tile_ + 1), 0)) this->finish_leaf();
        }
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  // The warpgroups take turns: one makes S^T and P^T of a tile, both its share of O^T.
  __device__ bool owns_tile() const { return (tile_number_ & 1) == thread_.warpgroup; }

  // Slots of this warpgroup's boxes of ckv. Slot ring_ itself holds kpe, later P.
  __device__ RingPosition ckv_slot(int32_t box) const {
    return ring_.after(1 + 2 * box + thread_.warpgroup);
  }

  __device__ void wait_for_box(RingPosition const& slot) const {
    if constexpr (!Traits::kTilesComeWhole) {
      Barrier::wait(&shared_.box_full[slot.index], slot.parity);
    }
  }

  // Before any of its boxes are read.
  __device__ void wait_for_tile() const {
    if constexpr (Traits::kTilesComeWhole) {
      Barrier::wait(&shared_.box_full[tile_barrier_.index], tile_barrier_.parity);
      cutlass::arch::fence_view_async_shared();
    }
  }

  // Waits for the next segment and its queries; false if there is none.
  __device__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    int32_t const num_tiles = segment().num_tiles();
    if (num_tiles == 0) return false;
    tile_end_ = segment().tile_end;
    begin_output();
    // Of the half that high parts make, the first tile's products are not added to anything.
    this->for_each_of_half(1, [](float& value, int32_t, int32_t) { value = 0.f; });
    if constexpr (Traits::kFolds) this->begin_fold();
    // A warpgroup without a tile of its own in this segment has no use for Q.
    if (num_tiles == 1 && !owns_tile()) arrive_once_per_warp(&shared_.query_empty, 1);
    return true;
  }

  // S^T = K Q^T in units of log2, -inf where a row does not see a token.
  __device__ void compute_scores() {
    typename Traits::MmaQk mma;
    auto const thread_mma = mma.get_slice(thread_.thread);
    Tensor k = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutK{});
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor k_operand = thread_mma.partition_fragment_A(k);  // (MMA, 1, 4, box)
    Tensor q_operand = thread_mma.partition_fragment_B(q);
    mma.accumulate_ = GMMA::ScaleOut::Zero;

    wait_for_tile();
    warpgroup_fence_operand(scores_);
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerTile; ++box) {
      RingPosition const slot = ring_.after(box);
      wait_for_box(slot);
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(k_operand); ++step) {
        multiply_(mma, k_operand(_, _, step, slot.index), q_operand(_, _, step, box), scores_);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores_);
    bool const is_last_of_mine = tile_ + 2 >= tile_end_;
    if (is_last_of_mine) arrive_once_per_warp(&shared_.query_empty, 1);

#pragma unroll
    for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.scale_log2;
    mask_scores();
  }

  __device__ void mask_scores() {
    if (tile_ < segment().masked_tile_begin) return;
    Request const& request = segment().request;
    int32_t const token = tile_ * kTokenTile + thread_.token();
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      int32_t const visible = visible_tokens(params_, request, segment().row_begin + row(i));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (token + 8 * half >= visible) score(i, half) = -INFINITY;
      }
    }
  }

  // Score of this thread's row i and token 16 * warp + lane / 4 + 8 * half of the tile.
  __device__ float& score(int32_t i, int32_t half) { return scores_(i / 2 * 4 + half * 2 + i % 2); }

  // P^T = 2^(S^T - m) with m the maximum of all tiles so far.
  __device__ void store_probabilities() {
    raise_running_max();
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; block += kStoreBlocks) {
#pragma unroll
      for (int32_t i = 2 * block; i < 2 * (block + kStoreBlocks); ++i) {
        RunningMax const running = running_max(i);
        score(i, 0) = rescale_factor(score(i, 0), running.max);
        score(i, 1) = rescale_factor(score(i, 1), running.max);
        row_sum_[i] = row_sum_[i] * running.factor + (score(i, 0) + score(i, 1));
      }
      write_probability_operand(block);
    }
    cutlass::arch::fence_view_async_shared();
  }

  // Of this thread's row i. Two slots take turns, so that one warpgroup can write the next tile's
  // while the other still reads these.
  __device__ RunningMax running_max(int32_t i) const {
    return shared_.running_max[tile_number_ & 1][row(i)];
  }

  // Warps reduce over their tokens, then one thread a row over the warps and the tiles before.
  __device__ void raise_running_max() {
    float tile_max[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) tile_max[i] = fmaxf(score(i, 0), score(i, 1));
    thread_.reduce_over_warp(tile_max, Max{}, [this](int32_t row, float max) {
      shared_.tile_max[row][thread_.warp] = max;
    });
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + thread_.warpgroup);
    if (thread_.thread < kRowTile) {
      uint32_t const slot = tile_number_ & 1;
      float const old_max =
          is_first_tile_ ? -INFINITY : shared_.running_max[slot ^ 1][thread_.thread].max;
      float const new_max = fmaxf(old_max, over_warps(shared_.tile_max[thread_.thread], Max{}));
      shared_.running_max[slot][thread_.thread] = {new_max, rescale_factor(old_max, new_max)};
    }
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + thread_.warpgroup);
  }

  // Brings O^T (and, of the warpgroup that did not do it yet, l) to the maxima of this tile. Most
  // tiles raise none; then O^T is left alone.
  __device__ void rescale_output() {
    if (is_first_tile_) return;
    float factor[kRows];
    bool is_raised = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      factor[i] = running_max(i).factor;
      is_raised |= factor[i] != 1.f;
      if (!owns_tile()) row_sum_[i] *= factor[i];
    }
    if (!__any_sync(0xffffffff, is_raised)) return;
    auto const rescale = [&](float& value, int32_t, int32_t i) {
      value *= factor[i / 4 * 2 + i % 2];
    };
    for_each_of_half(0, rescale);
    if (splits_probability()) for_each_of_half(1, rescale);
  }

  // Writes P^T of kStoreBlocks blocks of 8 rows as WGMMA's B operand: [row][token], and the low
  // parts behind the high ones. Transposed 8 x 8 stores:
  // lane l addresses row l % 8 of matrix l / 8; matrices go over the warp's two groups of 8 tokens
  // first, then over the row blocks.
  __device__ void write_probability_operand(int32_t block) {
    uint32_t parts[2 * kStoreBlocks];
#pragma unroll
    for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
      int32_t const i = 2 * (block + matrix / 2);
      parts[matrix] = pack<DType>(score(i, matrix % 2), score(i + 1, matrix % 2));
    }
    int32_t const matrix = thread_.lane / 8 % (2 * kStoreBlocks);
    int32_t const offset = (block + matrix / 2) * 8 * kTokenTile +
                           swizzled_chunk(thread_.lane % 8, thread_.warp * 2 + matrix % 2);
    DType* const operand = shared_.ring + ring_.index * kBoxElements;
    store_transposed(parts, operand + offset);
    if (!splits_probability()) return;
#pragma unroll
    for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
      int32_t const i = 2 * (block + matrix / 2);
      float2 const high = unpack<DType>(parts[matrix]);
      parts[matrix] = pack<DType>(score(i, matrix % 2) - high.x, score(i + 1, matrix % 2) - high.y);
    }
    store_transposed(parts, operand + kRowTile * kTokenTile + offset);
  }

  __device__ void store_transposed(uint32_t const (&matrices)[2 * kStoreBlocks], DType* operand) {
    auto& target = *reinterpret_cast<uint128_t*>(operand);
    if constexpr (kStoreBlocks == 1) {
      SM90_U16x4_STSM_T::copy(matrices[0], matrices[1], target);
    } else {
      SM90_U16x8_STSM_T::copy(matrices[0], matrices[1], matrices[2], matrices[3], target);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: tokens are rows of S^T.)
  __device__ void clear_tokens_past_end() {
    int32_t const tokens = max(segment().request.kv_len - tile_ * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
#pragma unroll 1
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      RingPosition const slot = ckv_slot(box);
      wait_for_box(slot);
      auto* const chunks = reinterpret_cast<uint4*>(shared_.ring + slot.index * kBoxElements);
#pragma unroll 1
      for (int32_t i = tokens * 8 + thread_.thread; i < kTokenTile * 8; i += kWarpgroupThreads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + thread_.warpgroup);
  }

  // O^T[half g of d_v] += V^T P^T. Box 2 b + g of ckv belongs to warpgroup g.
  __device__ void accumulate_output() {
    if (splits_probability()) {
      accumulate_output_with<Traits::kPvColumns>();
    } else {
      accumulate_output_with<kRowTile>();
    }
  }

  template <int kColumns>
  __device__ void accumulate_output_with() {
    if (!owns_tile()) wait_for_tile();
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) warpgroup_fence_operand(output_[box]);
    issue_boxes<kColumns>();
    release_box<3>(ckv_slot(0));
    release_box<2>(ckv_slot(1));
    release_box<1>(ckv_slot(2));
    release_box<0>(ckv_slot(3));
    // Both warpgroups read P, but only one of them each box of V.
    arrive_once_per_warp(&shared_.box_empty[ring_.index], 1);
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) warpgroup_fence_operand(output_[box]);
  }

  // One group of WGMMAs for each box.
  template <int kColumns>
  __device__ void issue_boxes() {
    typename Traits::template MmaPv<kColumns> mma;
    auto const thread_mma = mma.get_slice(thread_.thread);
    Tensor v = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutV{});
    Tensor p = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutP{});
    Tensor v_operand = thread_mma.partition_fragment_A(v);  // (MMA, 1, 4, box)
    Tensor p_operand = thread_mma.partition_fragment_B(p);  // (MMA, 64 / columns, 4, box)
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      mma.accumulate_ = is_first_tile_ ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      RingPosition const slot = ckv_slot(box);
      wait_for_box(slot);
      // The first columns of the accumulators; the low parts' are left out if P has none.
      Tensor output = make_tensor(output_[box].data(),
                                  partition_shape_C(mma, Shape<Int<kBoxColumns>, Int<kColumns>>{}));
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(v_operand); ++step) {
        Tensor a = v_operand(_, 0, step, slot.index);
        multiply_(mma, a, p_operand(_, 0, step, ring_.index), output(_, 0, 0));
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    }
  }

  template <int kLaterGroups>
  __device__ void release_box(RingPosition const& slot) {
    warpgroup_wait<kLaterGroups>();
    arrive_once_per_warp(&shared_.box_empty[slot.index], kMathWarpgroups);
  }

  __device__ void finish_segment() {
    if constexpr (Traits::kFolds) {
      if (__builtin_expect(this->is_folding(), 0)) return this->finish_fold();
    }
    // The high and the low part of P each made a part of O^T; only their sum matters.
    auto const output = [this](int32_t box, int32_t block, int32_t i) {
      return output_[box](block * 4 + i) + output_[box](kElementsPerHalf + block * 4 + i);
    };
    if (segment().is_whole()) {
      store_row_sums();
      sync_math();
      write_output(output);
      return;
    }
    // O^T first: others wait until it is there.
    write_part(segment().slot, output);
    store_row_sums();
    sync_math();
    if (has_row()) write_row(segment().slot, {last_max(threadIdx.x), row_sum_of_thread()});
  }

  RingPosition ring_;         // box 0 of the tile
  TileBarrier tile_barrier_;  // if tiles come whole
  int32_t tile_, tile_end_;   // of the segment
  Multiply multiply_;
  decltype(partition_fragment_C(typename Traits::MmaQk{},
                                Shape<Int<kTokenTile>, Int<kRowTile>>{})) scores_;
};

}  // namespace etap
