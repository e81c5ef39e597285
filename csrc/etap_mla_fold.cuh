/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * How batch-invariant calls join two partial results that follow each other: in the same operations
 * with the same roundings, whether in a math thread's registers or from the workspace.
 */
#pragma once

#include "etap_mla_fold_tree.h"
#include "etap_mla_math_output.cuh"
#include "etap_mla_schedule.cuh"

namespace etap {

// a and b, relative to other maxima than their sum is. Adding zero makes -0 and 0 the same,
// whichever way they came here. The intrinsics keep the compiler from contracting it in one place
// and not in another.
__device__ __forceinline__ float join_scaled(float a, float factor_a, float b, float factor_b) {
  return __fmaf_rn(b, factor_b, __fmaf_rn(a, factor_a, 0.f));
}

// What two partial results of a row are multiplied with when they are joined, and the row's maximum
// then. One of the factors is 1.
struct RowJoin {
  float first, second, max;

  __device__ __forceinline__ RowJoin(float max_1, float max_2) : max(fmaxf(max_1, max_2)) {
    float const factor = rescale_factor(fminf(max_1, max_2), max);
    first = max_1 < max ? factor : 1.f;
    second = max_2 < max ? factor : 1.f;
  }

  __device__ __forceinline__ float operator()(float a, float b) const {
    return join_scaled(a, first, b, second);
  }
};

__device__ __forceinline__ void fold_row(RowStatistics& row, RowStatistics const& next) {
  RowJoin const join(row.max, next.max);
  row = {join.max, join(row.sum, next.sum)};
}

// A math thread's share of O^T of some tiles, not yet divided by the sums. `own(box, block, i)` is
// element i of a fragment, as OutputFragment has it, and `next` gives those of what follows.
template <class Traits, class Value, class Next>
__device__ __forceinline__ void fold_output(Value const& own, float (&max)[Traits::kRowsPerThread],
                                            Next const& next,
                                            float const (&next_max)[Traits::kRowsPerThread]) {
  constexpr int kRows = Traits::kRowsPerThread;
  float first[kRows], second[kRows];
#pragma unroll
  for (int32_t i = 0; i < kRows; ++i) {
    RowJoin const join(max[i], next_max[i]);
    first[i] = join.first, second[i] = join.second, max[i] = join.max;
  }
#pragma unroll
  for (int32_t box = 0; box < kBoxesPerWarpgroup; ++box) {
#pragma unroll
    for (int32_t block = 0; block < Traits::kRowTile / 8; ++block) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        int32_t const i = 2 * block + j % 2;
        float& value = own(box, block, j);
        value = join_scaled(value, first[i], next(box, block, j), second[i]);
      }
    }
  }
}

// With registers of its own.
template <class Traits>
struct FoldedOutput {
  static constexpr int kRows = Traits::kRowsPerThread;
  float values[kBoxesPerWarpgroup][Traits::kRowTile / 8][4];
  float max[kRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& of_box : values) {
#pragma unroll
      for (auto& of_block : of_box) {
#pragma unroll
        for (float& value : of_block) value = 0.f;
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) max[i] = -INFINITY;
  }

  __device__ __forceinline__ float operator()(int32_t box, int32_t block, int32_t i) const {
    return values[box][block][i];
  }

  template <class Next>
  __device__ __forceinline__ void fold(Next const& next, float const (&next_max)[kRows]) {
    auto const own = [this](int32_t box, int32_t block, int32_t i) -> float& {
      return values[box][block][i];
    };
    fold_output<Traits>(own, max, next, next_max);
  }
};

// What a math thread knows of its segment's leaves. Tiles and leaves are counted from the row
// tile's first.
template <class Traits>
struct FoldState {
  int32_t leaf_end, leaf, first_leaf, next_slot;
  FoldedOutput<Traits> quad, block;  // joined so far

  // Maxima and sums, of which one thread a row takes care, a leaf later than of outputs: then the
  // warps' sums are there without a barrier of their own.
  RowStatistics row_of_quad, row_of_block, row_of_row_tile;
  float max_of_last_leaf;
  bool last_leaf_is_open, last_quad_joins, last_block_joins;

  static constexpr RowStatistics kNoTokens = {-INFINITY, 0.f};

  // Of a segment that is one leaf there is nothing to join.
  __device__ __forceinline__ void begin(Params const& params, Segment const& segment) {
    leaf_end = INT32_MAX;
    if (!folds<Traits>(params)) return;
    if (segment.num_tiles() <= segment.part_tiles) return;
    first_leaf = leaf = divide(segment.tile_begin, segment.part_tiles);
    leaf_end = segment.tile_begin + segment.part_tiles;
    next_slot = segment.slot;
    quad.clear();
    block.clear();
    row_of_quad = row_of_block = row_of_row_tile = kNoTokens;
    last_leaf_is_open = false;
  }

  __device__ __forceinline__ bool is_active() const { return leaf_end != INT32_MAX; }

  struct EndOfLeaf {
    bool quad_joins, block_joins;    // they end, and what they are part of began here, too
    bool leaves_quad, leaves_block;  // or what there is of them, as pieces
  };

  __device__ __forceinline__ EndOfLeaf end_of_leaf(Segment const& segment) const {
    bool const ends_segment = leaf_end == segment.tile_end;
    bool const ends_row_tile = ends_segment && segment.ends_row_tile;
    bool const ends_quad = ends_row_tile || (leaf + 1) % kQuadLeaves == 0;
    bool const ends_block = ends_row_tile || (leaf + 1) % kBlockLeaves == 0;
    bool const quad_began_here = leaf - leaf % kQuadLeaves >= first_leaf;
    bool const block_began_here = leaf - leaf % kBlockLeaves >= first_leaf;
    bool const block_has_quads = ends_quad || leaf % kBlockLeaves >= kQuadLeaves;
    bool const block_joins = block_began_here && ends_block && segment.begins_row_tile;
    bool const leaves_quad = !quad_began_here || (ends_quad ? !block_began_here : ends_segment);
    bool const leaves_block =
        block_began_here && !block_joins && (ends_block || (ends_segment && block_has_quads));
    return {block_began_here && ends_quad, block_joins, leaves_quad, leaves_block};
  }

  __device__ __forceinline__ void next_leaf(Segment const& segment) {
    ++leaf;
    leaf_end = min(leaf_end + segment.part_tiles, segment.tile_end);
  }

  __device__ __forceinline__ bool has_leading_blocks(Segment const& segment) const {
    return segment.begins_row_tile && (leaf >= kBlockLeaves || segment.ends_row_tile);
  }

  __device__ __forceinline__ void open_row(float max, EndOfLeaf const& end) {
    max_of_last_leaf = max;
    last_leaf_is_open = true;
    last_quad_joins = end.quad_joins;
    last_block_joins = end.block_joins;
  }

  // Joins the row of the last leaf, now that its sum is known.
  __device__ __forceinline__ void settle_row(float sum_of_last_leaf) {
    last_leaf_is_open = false;
    fold_row(row_of_quad, {max_of_last_leaf, sum_of_last_leaf});
    if (!last_quad_joins) return;
    fold_row(row_of_block, row_of_quad);
    row_of_quad = kNoTokens;
    if (!last_block_joins) return;
    fold_row(row_of_row_tile, row_of_block);
    row_of_block = kNoTokens;
  }
};

// A math warpgroup that folds in batch-invariant calls.
template <class Traits>
class FoldingMath : protected MathOutput<Traits> {
  using Base = MathOutput<Traits>;

 protected:
  using Base::begin_output, Base::for_each_of_half, Base::has_row, Base::kElementsPerHalf,
      Base::kRows, Base::last_max, Base::output_, Base::row, Base::row_sum_of_thread, Base::segment,
      Base::shared_, Base::splits_probability, Base::store_row_sums, Base::sum_slot_,
      Base::tile_number_, Base::total_sum, Base::write_output, Base::write_part, Base::write_row;
  static_assert(Traits::kLongestSplitPRequest <= kBlockLeaves * kTokenTile, "see row_tile_output");

  using Base::Base;

  __device__ void begin_fold() {
    fold_.begin(this->params_, segment());
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_tile_max_[i] = -INFINITY;
  }

  // Whether the tile before `tile_end` is its leaf's last, in a segment of several.
  __device__ bool ends_leaf(int32_t tile_end) const { return tile_end == fold_.leaf_end; }

  __device__ bool is_folding() const { return fold_.is_active(); }

  __device__ void finish_leaf() {
    auto const end = fold_.end_of_leaf(segment());
    store_row_sums();
    join_leaf();
    if (has_row()) {
      if (fold_.last_leaf_is_open) fold_.settle_row(total_sum(sum_slot_ ^ 1, threadIdx.x));
      fold_.open_row(last_max(threadIdx.x), end);
    }
    if (end.quad_joins) fold_.block.fold(fold_.quad, fold_.quad.max);
    if (end.block_joins) join_block();
    if (end.leaves_block || end.leaves_quad) {
      sync_math();
      if (has_row()) fold_.settle_row(row_sum_of_thread());
      if (end.leaves_block) leave_piece(fold_.block, fold_.row_of_block);
      if (end.leaves_quad) leave_piece(fold_.quad, fold_.row_of_quad);
    }
    if (end.quad_joins || end.leaves_quad) fold_.quad.clear();
    if (end.block_joins || end.leaves_block) fold_.block.clear();
    sum_slot_ ^= 1;
    begin_output();
    fold_.next_leaf(segment());
  }

  // The leading blocks, if there are any.
  __device__ void finish_fold() {
    if (!fold_.has_leading_blocks(segment())) return;
    sync_math();
    if (has_row() && fold_.last_leaf_is_open) {
      fold_.settle_row(total_sum(sum_slot_ ^ 1, threadIdx.x));
    }
    auto const output = [this](int32_t box, int32_t block, int32_t i) {
      return row_tile_output(box, block, i);
    };
    if (segment().is_whole()) {
      if (has_row()) publish_row(fold_.row_of_row_tile);
      sync_math();
      write_output(output);
    } else {
      int32_t const slot = segment().slot - 1;
      write_part(slot, output);
      if (has_row()) write_row(slot, fold_.row_of_row_tile);
    }
  }

 private:
  __device__ void join_leaf() {
    if (splits_probability()) {
      for_each_of_half(0, [this](float& value, int32_t box, int32_t i) {
        value += output_[box](kElementsPerHalf + i);
      });
    }
    float leaf_max[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) leaf_max[i] = last_max(row(i));
    fold_.quad.fold(
        [this](int32_t box, int32_t block, int32_t i) { return output_[box](block * 4 + i); },
        leaf_max);
  }

  // What is joined of the row tile lies where low parts would be. A request that has those has one
  // block, and then none is added to any more.
  __device__ float& row_tile_output(int32_t box, int32_t block, int32_t i) {
    return output_[box](kElementsPerHalf + block * 4 + i);
  }

  __device__ void join_block() {
    if (splits_probability()) {
      for_each_of_half(1, [](float& value, int32_t, int32_t) { value = 0.f; });
    }
    fold_output<Traits>([this](int32_t box, int32_t block,
                               int32_t i) -> float& { return row_tile_output(box, block, i); },
                        row_tile_max_, fold_.block, fold_.block.max);
  }

  template <class Output>
  __device__ void leave_piece(Output const& output, RowStatistics& row) {
    write_part(fold_.next_slot, output);
    if (has_row()) write_row(fold_.next_slot, row);
    row = fold_.kNoTokens;
    ++fold_.next_slot;
  }

  // Puts a row's statistics where those of tiles alone would be.
  __device__ void publish_row(RowStatistics const& row) {
    shared_.running_max[tile_number_ & 1 ^ 1][threadIdx.x].max = row.max;
    auto& sums = shared_.row_sum[sum_slot_];
    reinterpret_cast<float4&>(sums[0][threadIdx.x]) = make_float4(row.sum, 0.f, 0.f, 0.f);
    reinterpret_cast<float4&>(sums[1][threadIdx.x]) = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  FoldState<Traits> fold_;
  float row_tile_max_[kRows];
};

}  // namespace etap
