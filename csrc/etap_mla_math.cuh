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

#include "etap_mla_loader.cuh"
#include "etap_mla_output.cuh"
#include "etap_mla_wgmma.cuh"

namespace etap {

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
  __device__ float operator()(float a, float b) const { return a + b; }
};

template <class Traits>
class MathWarpgroup {
  using DType = typename Traits::DType;
  using SharedStorage = typename Traits::SharedStorage;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kStoreBlocks = kRowBlocks == 1 ? 1 : 2;  // row blocks that stmatrix stores

 public:
  __device__ MathWarpgroup(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ ETAP_INLINE_MATH void run() {
    while (begin_segment()) {
#pragma unroll 1
      for (tile_ = segment().tile_begin; tile_ < tile_end_; ++tile_) {
        if (owns_tile()) {
          compute_scores();
          store_probabilities();
        }
        // P is complete. The owner hardly waits: the other warpgroup had nothing else to do.
        cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
        rescale_output();
        if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
        accumulate_output();
        is_first_tile_ = false;
        ring_ = ring_.after(kBoxesPerTile);
        ++tile_number_;
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  // Rows of an accumulator that this thread sees: row(2 b + c) = 8 b + 2 (lane % 4) + c.
  __device__ int32_t row(int32_t i) const { return i / 2 * 8 + 2 * (lane_ % 4) + i % 2; }

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  // The warpgroups take turns: one makes S^T and P^T of a tile, both its share of O^T.
  __device__ bool owns_tile() const { return (tile_number_ & 1) == warpgroup_; }

  // Slots of this warpgroup's boxes of ckv. Slot ring_ itself holds kpe, later P.
  __device__ RingPosition ckv_slot(int32_t box) const {
    return ring_.after(1 + 2 * box + warpgroup_);
  }

  __device__ void wait_for_box(RingPosition const& slot) const {
    Barrier::wait(&shared_.box_full[slot.index], slot.parity);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
  }

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
    if (num_tiles == 1 && !owns_tile()) arrive_once_per_warp(&shared_.query_empty, 1);
    return true;
  }

  // S^T = K Q^T in units of log2, -inf where a row does not see a token.
  __device__ void compute_scores() {
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
    int32_t const token = tile_ * kTokenTile + warp_ * 16 + lane_ / 4;
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

  // Combines the values of each row over the lanes that see it, which are 4, 8 and 16 apart, and
  // leaves the warp's result in shared memory. Each step halves the rows a lane still has, so that
  // few shuffles do. `first` is the first of the rows that are left.
  template <int kLanes = 16, int kCount = kRows, typename Combine>
  __device__ void reduce_over_warp(float (&values)[kRows], float (&of_warps)[kRowTile][4],
                                   Combine combine, int32_t first = 0) {
    if constexpr (kLanes < 4) {
      // Lanes that hold copies write the same value.
#pragma unroll
      for (int32_t i = 0; i < kCount; ++i) {
        of_warps[row(first + i)][warp_] = values[i];
      }
    } else if constexpr (kCount == 1) {
      values[0] = combine(values[0], __shfl_xor_sync(0xffffffff, values[0], kLanes));
      reduce_over_warp<kLanes / 2, 1>(values, of_warps, combine, first);
    } else {
      constexpr int32_t kKept = kCount / 2;
      bool const is_upper = (lane_ & kLanes) != 0;
#pragma unroll
      for (int32_t i = 0; i < kKept; ++i) {
        float const given = is_upper ? values[i] : values[i + kKept];
        float const kept = is_upper ? values[i + kKept] : values[i];
        values[i] = combine(kept, __shfl_xor_sync(0xffffffff, given, kLanes));
      }
      reduce_over_warp<kLanes / 2, kKept>(values, of_warps, combine,
                                          first + (is_upper ? kKept : 0));
    }
  }

  // The values that four warps left of a row, combined in a fixed order.
  template <typename Combine>
  __device__ static float over_warps(float const (&of_warps)[4], Combine combine) {
    auto const values = reinterpret_cast<float4 const&>(of_warps);
    return combine(combine(values.x, values.y), combine(values.z, values.w));
  }

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
    reduce_over_warp(tile_max, shared_.tile_max, Max{});
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
    if (thread_ < kRowTile) {
      uint32_t const slot = tile_number_ & 1;
      float const old_max = is_first_tile_ ? -INFINITY : shared_.running_max[slot ^ 1][thread_].max;
      float const new_max = fmaxf(old_max, over_warps(shared_.tile_max[thread_], Max{}));
      shared_.running_max[slot][thread_] = {new_max, rescale_factor(old_max, new_max)};
    }
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
  }

  // Brings O^T (and, of the warpgroup that did not do it yet, l) to the maxima of this tile. Most
  // tiles raise none; then O^T is left alone.
  __device__ void rescale_output() {
    float factor[kRows];
    bool is_raised = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      factor[i] = running_max(i).factor;
      is_raised |= factor[i] != 1.f;
      if (!owns_tile()) row_sum_[i] *= factor[i];
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
    int32_t const matrix = lane_ / 8 % (2 * kStoreBlocks);
    int32_t const offset =
        (block + matrix / 2) * 8 * kTokenTile + swizzled_chunk(lane_ % 8, warp_ * 2 + matrix % 2);
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

  __device__ bool splits_probability() const {
    return segment().request.kv_len <= Traits::kLongestSplitPRequest;
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
      for (int32_t i = tokens * 8 + thread_; i < kTokenTile * 8; i += kWarpgroupThreads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + warpgroup_);
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
    auto const thread_mma = mma.get_slice(thread_);
    Tensor v = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutV{});
    Tensor p = make_tensor(make_smem_ptr(shared_.ring), typename Traits::LayoutP{});
    Tensor v_operand = thread_mma.partition_fragment_A(v);  // (MMA, 1, 4, box)
    Tensor p_operand = thread_mma.partition_fragment_B(p);  // (MMA, 64 / columns, 4, box)
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
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
    // The sums may go where P was.
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
    reduce_over_warp(row_sum_, shared_.row_sum[warpgroup_], Plus{});
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
    bool const is_whole = segment().is_whole();
    int32_t const slot = segment().slot;
    if (is_whole) {
      write_output();
    } else {
      write_partial(slot);
    }
    write_statistics(is_whole, slot);
    // The next segment's maxima go where the sums are.
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
  }

  __device__ float total_sum(int32_t row_of_tile) const {
    return over_warps(shared_.row_sum[0][row_of_tile], Plus{}) +
           over_warps(shared_.row_sum[1][row_of_tile], Plus{});
  }

  // LSE or, of a part, maximum and sum; one thread a row.
  __device__ void write_statistics(bool is_whole, int32_t slot) const {
    int32_t const row_of_tile = threadIdx.x;
    if (row_of_tile >= kRowTile) return;
    float const max = shared_.running_max[tile_number_ & 1 ^ 1][row_of_tile].max;
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
      fragment.value[i] += output_[box]((kRowBlocks + row_block) * 4 + i);
    }
    return fragment;
  }

  // A warp has 16 columns of each box: 8 rows of two boxes are one store of 16 bytes a lane.
  __device__ void write_output() {
    int32_t const box_of_lane = lane_ % 4 / 2, half_of_lane = lane_ % 2;
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; ++block) {
      float const scale_0 = normalizer(total_sum(row(2 * block)));
      float const scale_1 = normalizer(total_sum(row(2 * block + 1)));
      int32_t const row_of_lane = block * 8 + lane_ / 4;
      bool const exists = row_of_lane < segment().num_rows;
      DType* const out =
          output_row<DType>(params_, segment().packed_row + (exists ? row_of_lane : 0)) +
          warp_ * 16 + half_of_lane * 8;
#pragma unroll
      for (int32_t box = 0; box < kBoxesPerWarpgroup; box += 2) {
        int32_t const column = (2 * (box + box_of_lane) + warpgroup_) * kBoxColumns;
        write_fragments<DType>(output_fragment(box, block), output_fragment(box + 1, block),
                               scale_0, scale_1, out + column, exists);
      }
    }
  }

  __device__ void write_partial(int32_t slot) {
#pragma unroll
    for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        OutputFragment const fragment = output_fragment(box, block);
        int32_t const index =
            partial_index<kRowTile>(slot, 2 * box + warpgroup_, block, warp_, lane_);
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

  RingPosition ring_;            // box 0 of the tile
  uint32_t segment_number_ = 0;  // of this CTA
  uint32_t tile_number_ = 0;     // of this CTA, over all its segments
  int32_t tile_, tile_end_;      // of the segment
  bool is_first_tile_;           // of the segment

  Multiply multiply_;
  decltype(partition_fragment_C(typename Traits::MmaQk{},
                                Shape<Int<kTokenTile>, Int<kRowTile>>{})) scores_;
  decltype(partition_fragment_C(
      typename Traits::template MmaPv<Traits::kPvColumns>{},
      Shape<Int<kBoxColumns>, Int<Traits::kPvColumns>>{})) output_[kBoxesPerWarpgroup];
  float row_sum_[kRows];  // over this thread's tokens only, until the segment ends
};

}  // namespace etap
