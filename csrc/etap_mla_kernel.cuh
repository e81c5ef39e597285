/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * ETAP MLA decode (arXiv 2506.01969): tokens on WGMMA's M, packed rows (query x head) on N.
 *
 *   producer        each token tile: 9 boxes [64 tokens x 64 columns] -> ring (TMA or cp.async)
 *                   each row tile:   Q [row tile x 576] -> shared memory
 *   math warpgroup g = 0, 1, for each token tile t:
 *     t % 2 == g:   S^T = K Q^T, box by box as they arrive
 *                   m = max(m, S^T over tokens)
 *                   P^T = 2^(S^T - m) = high + low part -> shared memory
 *     both:         O^T[g] = 2^(m_old - m) O^T[g] + V^T[g] P^T, where [g] is half of d_v
 *   end of segment: sum l over warps and warpgroups; O^T / l transposed -> out,
 *                   or O^T, m, l in fp32 -> workspace if other CTAs share the row tile
 *   merge kernel:   (etap_mla_merge.cuh) joins what CTAs left in the workspace
 */
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_loader.cuh"
#include "etap_mla_output.cuh"

namespace etap {

// Barriers among math threads, in CUTLASS's numbering of user barriers.
constexpr uint32_t kWarpgroupBarrier = 0;  // and 1: one for each math warpgroup
constexpr uint32_t kMathBarrier = 2;

template <class Traits>
class MathWarpgroup {
  using DType = typename Traits::DType;
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kStoreBlocks = kRowBlocks == 1 ? 1 : 2;  // row blocks that stmatrix stores

 public:
  __device__ MathWarpgroup(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    while (begin_segment()) {
#pragma unroll 1
      for (int32_t tile = segment().tile_begin; tile < tile_end_; ++tile) {
        if ((tile_number_ & 1) == warpgroup_) {
          compute_scores(tile);
          store_probabilities();
        }
        accumulate_output(tile);
        is_first_tile_ = false;
        ring_ = ring_.after(kBoxesPerTile);
        ++tile_number_;
        max_slot_ = max_slot_ == 2 ? 0 : max_slot_ + 1;
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  // Rows of an accumulator that this thread sees: row(2 b + c) = 8 b + 2 (lane % 4) + c.
  __device__ int32_t row(int32_t i) const { return i / 2 * 8 + 2 * (lane_ % 4) + i % 2; }

  __device__ void arrive_once_per_warp(uint64_t* barrier) const {
    __syncwarp();
    if (lane_ == 0) Barrier::arrive(barrier);
  }

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  // Waits for the next segment and its queries; false if there is none.
  __device__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    int32_t const num_tiles = segment().num_tiles();
    if (num_tiles == 0) return false;
    tile_end_ = segment().tile_end;
    is_first_tile_ = true;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = 0.f;
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) clear(output_[box]);
    // A warpgroup without a tile of its own in this segment has no use for Q.
    bool const owns_none = num_tiles == 1 && (tile_number_ & 1) != warpgroup_;
    if (owns_none) arrive_once_per_warp(&shared_.query_empty);
    return true;
  }

  __device__ void wait_for_box(RingPosition<Traits::kRingBoxes> const& slot) const {
    Barrier::wait(&shared_.box_full[slot.index], slot.parity);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
  }

  // S^T = K Q^T in units of log2, with -inf where a row does not see a token.
  __device__ void compute_scores(int32_t tile) {
    typename Traits::MmaQk mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor k = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutK{});
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor k_operand = thread_mma.partition_fragment_A(k);  // (MMA, 1, 4, box)
    Tensor q_operand = thread_mma.partition_fragment_B(q);
    mma.accumulate_ = GMMA::ScaleOut::Zero;

    warpgroup_fence_operand(scores_);
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerTile; ++box) {
      auto const slot = ring_.after(box);
      wait_for_box(slot);
      warpgroup_arrive();
#pragma unroll
      for (int32_t step = 0; step < size<2>(k_operand); ++step) {
        gemm(mma, k_operand(_, _, step, slot.index), q_operand(_, _, step, box), scores_);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores_);

    arrive_once_per_warp(&shared_.box_empty[ring_.index]);  // kpe
    bool const is_last_of_mine = tile + 2 >= tile_end_;
    if (is_last_of_mine) arrive_once_per_warp(&shared_.query_empty);

#pragma unroll
    for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.scale_log2;
    mask_scores(tile);
  }

  __device__ void mask_scores(int32_t tile) {
    Request const& request = segment().request;
    auto visible_tokens = [&](int32_t packed_row) {
      if (!params_.causal) return request.kv_len;
      int32_t const query = params_.divide_by_heads.div(packed_row);
      return min(request.kv_len - request.query_len + query + 1, request.kv_len);
    };
    if ((tile + 1) * kTokenTile <= visible_tokens(segment().row_begin)) return;

    int32_t const first_token = tile * kTokenTile + warp_ * 16 + lane_ / 4;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      int32_t const visible = visible_tokens(segment().row_begin + row(i));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (first_token + 8 * half >= visible) score(i, half) = -INFINITY;
      }
    }
  }

  // Score of this thread's row i and token 16 * warp + lane / 4 + 8 * half of the tile.
  __device__ float& score(int32_t i, int32_t half) { return scores_(i / 2 * 4 + half * 2 + i % 2); }

  // P^T = 2^(S^T - m) with m the maximum of all tiles so far, both left for the two warpgroups.
  __device__ void store_probabilities() {
    share_tile_max();
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; block += kStoreBlocks) {
#pragma unroll
      for (int32_t i = 2 * block; i < 2 * (block + kStoreBlocks); ++i) {
        float const new_max = raised_max(i);
        if (warp_ == 0 && lane_ < 4) shared_.row_max[max_slot_][row(i)] = new_max;
        score(i, 0) = rescale_factor(score(i, 0), new_max);
        score(i, 1) = rescale_factor(score(i, 1), new_max);
        row_sum_[i] *= rescale_factor(old_max(i), new_max);
        row_sum_[i] += score(i, 0) + score(i, 1);
      }
      write_probability_operand(block);
    }
    cutlass::arch::fence_view_async_shared();
  }

  // Reduces over the tokens of a warp: neighbours in the thread, then lanes 4, 8 and 16 apart.
  __device__ void share_tile_max() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float tile_max = fmaxf(score(i, 0), score(i, 1));
#pragma unroll
      for (int32_t lanes = 4; lanes < 32; lanes *= 2) {
        tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffff, tile_max, lanes));
      }
      if (lane_ < 4) shared_.warp_partial[warpgroup_][warp_][row(i)] = tile_max;
    }
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
  }

  // Running maximum of this thread's row i, with and without the current tile. Three slots take
  // turns, so that one warpgroup can write the next tile's while the other still reads these.
  __device__ float row_max(int32_t i) const { return shared_.row_max[max_slot_][row(i)]; }
  __device__ uint32_t previous_max_slot() const { return max_slot_ == 0 ? 2 : max_slot_ - 1; }
  __device__ float old_max(int32_t i) const {
    return is_first_tile_ ? -INFINITY : shared_.row_max[previous_max_slot()][row(i)];
  }

  __device__ float raised_max(int32_t i) const {
    float new_max = old_max(i);
#pragma unroll
    for (int32_t warp = 0; warp < 4; ++warp) {
      new_max = fmaxf(new_max, shared_.warp_partial[warpgroup_][warp][row(i)]);
    }
    return new_max;
  }

  // Writes P^T of kStoreBlocks blocks of 8 rows as WGMMA's B operand: [row][token], the low parts
  // behind the high ones. Transposed 8 x 8 stores: lane l addresses row l % 8 of matrix l / 8;
  // matrices go over the warp's two groups of 8 tokens first, then over the row blocks.
  __device__ void write_probability_operand(int32_t block) {
    constexpr int32_t kBufferElements = 2 * kRowTile * kTokenTile;
    uint32_t high[2 * kStoreBlocks], low[2 * kStoreBlocks];
#pragma unroll
    for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
      int32_t const i = 2 * (block + matrix / 2);
      float const p0 = score(i, matrix % 2), p1 = score(i + 1, matrix % 2);
      float const high_0 = float(DType(p0)), high_1 = float(DType(p1));
      high[matrix] = pack<DType>(high_0, high_1);
      low[matrix] = pack<DType>(p0 - high_0, p1 - high_1);
    }
    int32_t const matrix = lane_ / 8 % (2 * kStoreBlocks);
    DType* const operand = shared_.probability + (tile_number_ & 1) * kBufferElements +
                           (block + matrix / 2) * 8 * kTokenTile +
                           swizzled_chunk(lane_ % 8, warp_ * 2 + matrix % 2);
    auto& high_operand = *reinterpret_cast<uint128_t*>(operand);
    auto& low_operand = *reinterpret_cast<uint128_t*>(operand + kRowTile * kTokenTile);
    if constexpr (kStoreBlocks == 1) {
      SM90_U16x4_STSM_T::copy(high[0], high[1], high_operand);
      SM90_U16x4_STSM_T::copy(low[0], low[1], low_operand);
    } else {
      SM90_U16x8_STSM_T::copy(high[0], high[1], high[2], high[3], high_operand);
      SM90_U16x8_STSM_T::copy(low[0], low[1], low[2], low[3], low_operand);
    }
  }

  // Brings O^T (and, of the warpgroup that did not do it yet, the row sums) to the maxima of this
  // tile. Most tiles raise none; then O^T is left alone.
  __device__ void rescale_output(bool scales_row_sum) {
    float factor[kRows];
    bool is_raised = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      factor[i] = rescale_factor(old_max(i), row_max(i));
      if (scales_row_sum) row_sum_[i] *= factor[i];
      is_raised |= factor[i] != 1.f;
    }
    if (!__any_sync(0xffffffff, is_raised)) return;
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
#pragma unroll
      for (int32_t i = 0; i < size(output_[box]); ++i) {
        output_[box](i) *= factor[i / 4 % kRowBlocks * 2 + i % 2];
      }
    }
  }

  // O^T[half g] += V^T[half g] P^T. Box 2 b + g of ckv belongs to warpgroup g.
  __device__ void accumulate_output(int32_t tile) {
    int32_t const buffer = tile_number_ & 1;
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      wait_for_box(ckv_slot(box));
    }
    // P is complete. The owner hardly waits: the other warpgroup had nothing else to do. P of the
    // next tile but one goes to the same buffer, after the next tile's barrier, hence after this
    // use.
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
    rescale_output(/*scales_row_sum=*/buffer != warpgroup_);
    if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end(tile);

    typename Traits::MmaPv mma;
    auto const thread_mma = mma.get_slice(thread_);
    Tensor v = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutV{});
    Tensor p = make_tensor(make_smem_ptr(shared_.probability), typename Traits::LayoutP{});
    Tensor v_operand = thread_mma.partition_fragment_A(v);  // (MMA, 1, 4, box)
    Tensor p_operand = thread_mma.partition_fragment_B(p);
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) warpgroup_fence_operand(output_[box]);
    warpgroup_arrive();
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      int32_t const slot = ckv_slot(box).index;
#pragma unroll
      for (int32_t pass = 0; pass < Traits::kPvPasses; ++pass) {
#pragma unroll
        for (int32_t step = 0; step < size<2>(v_operand); ++step) {
          gemm(mma, v_operand(_, _, step, slot),
               p_operand(_, _, step, buffer * Traits::kPvPasses + pass), output_[box]);
        }
      }
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      warpgroup_fence_operand(output_[box]);
      arrive_once_per_warp(&shared_.box_empty[ckv_slot(box).index]);
    }
  }

  __device__ auto ckv_slot(int32_t box) const { return ring_.after(1 + 2 * box + warpgroup_); }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: tokens are rows of S^T.)
  __device__ void clear_tokens_past_end(int32_t tile) {
    int32_t const tokens = max(segment().request.kv_len - tile * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
#pragma unroll 1
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
      auto* const chunks =
          reinterpret_cast<uint4*>(shared_.ring + ckv_slot(box).index * kBoxElements);
#pragma unroll 1
      for (int32_t i = tokens * 8 + thread_; i < kTokenTile * 8; i += kWarpgroupThreads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
  }

  __device__ void finish_segment() {
    share_row_sums();
    bool const is_whole = segment().is_whole();
    int32_t const slot = 2 * blockIdx.x + (segment().begins_row_tile ? 1 : 0);
    if (is_whole) {
      write_output();
    } else {
      write_partial(slot);
    }
    write_statistics(is_whole, slot);
    // The next segment's maxima go where the sums are.
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
  }

  // Sums over the tokens that other lanes saw, and makes the sum known to all warps.
  __device__ void share_row_sums() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t lanes = 4; lanes < 32; lanes *= 2) {
        row_sum_[i] += __shfl_xor_sync(0xffffffff, row_sum_[i], lanes);
      }
      if (lane_ < 4) shared_.warp_partial[warpgroup_][warp_][row(i)] = row_sum_[i];
    }
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
  }

  __device__ float total_sum(int32_t row_of_tile) const {
    float sum = 0.f;
#pragma unroll
    for (int32_t warp = 0; warp < 4 * kMathWarpgroups; ++warp) {
      sum += shared_.warp_partial[warp / 4][warp % 4][row_of_tile];
    }
    return sum;
  }

  // LSE or, of a part, maximum and sum; one thread a row.
  __device__ void write_statistics(bool is_whole, int32_t slot) const {
    int32_t const row_of_tile = threadIdx.x;
    if (row_of_tile >= kRowTile) return;
    float const max = shared_.row_max[previous_max_slot()][row_of_tile];
    float const sum = total_sum(row_of_tile);
    if (!is_whole) {
      params_.partial_ml[slot * kRowTile + row_of_tile] = make_float2(max, sum);
    } else if (params_.lse != nullptr && row_of_tile < segment().num_rows) {
      params_.lse[segment().packed_row + row_of_tile] = log_sum_exp(params_, max, sum);
    }
  }

  // The high and the low part of P each made a part of O^T; from here on only their sum matters.
  __device__ OutputFragment output_fragment(int32_t box, int32_t row_block) {
    OutputFragment fragment;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      fragment.value[i] = output_[box](row_block * 4 + i);
      if constexpr (Traits::kPvColumns == 2 * kRowTile) {
        fragment.value[i] += output_[box]((kRowBlocks + row_block) * 4 + i);
      }
    }
    return fragment;
  }

  __device__ void write_output() {
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; ++block) {
      float const scale_0 = normalizer(total_sum(row(2 * block)));
      float const scale_1 = normalizer(total_sum(row(2 * block + 1)));
      int32_t const row_of_lane = block * 8 + lane_ / 4;
      bool const exists = row_of_lane < segment().num_rows;
      DType* const out_row =
          output_row<DType>(params_, segment().packed_row + (exists ? row_of_lane : 0));
#pragma unroll
      for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
        int32_t const column = (2 * box + warpgroup_) * kBoxColumns + warp_ * 16;
        store_fragment(output_fragment(box, block), scale_0, scale_1, out_row, column, exists);
      }
    }
  }

  __device__ void write_partial(int32_t slot) {
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        OutputFragment const fragment = output_fragment(box, block);
        int32_t const index = partial_index<kRowTile>(slot, 2 * box + warpgroup_, block, warp_);
        *reinterpret_cast<float4*>(params_.partial_out + index) =
            make_float4(fragment.value[0], fragment.value[1], fragment.value[2], fragment.value[3]);
      }
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const thread_ = threadIdx.x % kWarpgroupThreads;
  int32_t const warpgroup_ = cutlass::canonical_warp_group_idx();
  int32_t const warp_ = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane_ = threadIdx.x % 32;

  RingPosition<Traits::kRingBoxes> ring_;  // box 0 of the current tile
  uint32_t tile_number_ = 0;               // of this CTA, over all its segments
  uint32_t max_slot_ = 0;                  // tile_number_ % 3
  uint32_t segment_number_ = 0;
  int32_t tile_end_;    // of the segment
  bool is_first_tile_;  // of the segment

  decltype(partition_fragment_C(typename Traits::MmaQk{},
                                Shape<Int<kTokenTile>, Int<kRowTile>>{})) scores_;
  decltype(partition_fragment_C(
      typename Traits::MmaPv{},
      Shape<Int<kBoxColumns>, Int<Traits::kPvColumns>>{})) output_[kBoxesPerWarpgroup];
  float row_sum_[kRows];  // over this thread's tokens only, until the segment ends
};

// One barrier a thread. By the last two warps: the first ones have the requests of small batches to
// look at, and would only wait for the fence.
template <class Traits>
__device__ void init_barriers(typename Traits::SharedStorage& shared) {
  constexpr int32_t kRing = Traits::kRingBoxes;
  constexpr int32_t kBoxProducers = Traits::kKvLoader == KvLoader::kTma ? 1 : kGatherThreads;
  static_assert(2 * kRing + 2 <= 64);
  int32_t const i = int32_t(threadIdx.x) - (kThreads - 64);
  if (i < 0) return;
  if (i < kRing) {
    Barrier::init(&shared.box_full[i], kBoxProducers);
  } else if (i < 2 * kRing) {
    // The warps of the one warpgroup that reads the box last.
    Barrier::init(&shared.box_empty[i - kRing], 4);
  } else if (i == 2 * kRing) {
    Barrier::init(&shared.query_full, kQueryLoadThreads);
  } else if (i == 2 * kRing + 1) {
    Barrier::init(&shared.query_empty, 4 * kMathWarpgroups);
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, 1)
    etap_mla_kernel(__grid_constant__ Params const params,
                    __grid_constant__ CUtensorMap const ckv_map,
                    __grid_constant__ CUtensorMap const kpe_map) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  CtaWork& work = shared.work;

  // The merge kernel's CTAs may take their places as ours leave; they wait for our results.
  cudaTriggerProgrammaticLaunchCompletion();
  init_barriers<Traits>(shared);
  if (Traits::kKvLoader == KvLoader::kTma && threadIdx.x == kMathThreads) {
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&ckv_map));
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&kpe_map));
  }
  find_cta_work<Traits::kRowTile>(params, shared.schedule, work);
  if (threadIdx.x == kThreads - 1) params.merge_descriptors[blockIdx.x] = {};
  __syncthreads();
  if (work.begin >= work.end) return;

  if (threadIdx.x >= kMathThreads) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    int32_t const warp = threadIdx.x / 32 % 4;
    if (warp >= 2) {
      load_queries<Traits>(params, shared, work);
    } else if constexpr (Traits::kKvLoader == KvLoader::kGather) {
      load_cache_by_gather<Traits>(params, shared, work);
    } else if (warp == 0) {
      load_cache_by_tma<Traits>(params, ckv_map, kpe_map, shared, work);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kMathRegisters>();
    MathWarpgroup<Traits>(params, shared).run();
  }
}

}  // namespace etap
