/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Which pieces CTAs leave of a row tile that they share, in a batch-invariant call that folds:
 * found by each of these CTAs while it waits for its first tile.
 */
#pragma once

#include "etap_mla_schedule.cuh"

namespace etap {

// By one warp: the lanes look at a CTA each.
template <class Traits>
__device__ void list_fold_pieces(Params const& params, CtaWork const& work,
                                 SplitRowTile const& split, FixedSplit const& leaves,
                                 FoldPieceList& list) {
  int32_t const num_leaves = leaves.num_parts(), num_ctas = split.descriptor.num_parts;
  int32_t const lane = threadIdx.x % 32;
  auto const begin_of = [&](int32_t part) {
    if (part == 0) return 0;
    if (part >= num_ctas) return num_leaves;
    int32_t const offset = work.partition.range(split.number + part).begin - split.begin;
    return leaves_before_cut(leaves, offset, work.granule_leaves);
  };
  int32_t const leading_blocks = FoldPieces{0, begin_of(1), num_leaves}.leading_blocks();
  int32_t const has_leading = leading_blocks > 0;
  int32_t pieces_before = has_leading, groups_before = has_leading;
  // A lane's leaves end where the next lane's begin. The last lane, which has no next, has none.
#pragma unroll 1
  for (int32_t first = 0; first < num_ctas; first += 31) {
    int32_t const part = first + lane, begin = begin_of(part);
    FoldPieces const own = {begin, __shfl_down_sync(0xffffffff, begin, 1), num_leaves};
    int32_t count = 0, groups = 0;
    for (int32_t leaf = own.first_leaf(); leaf < own.end; leaf = own.end_of_piece(leaf)) {
      ++count;
      groups += leaf % kQuadLeaves == 0;
    }
    int32_t piece = pieces_before + add_lanes_before(count);
    int32_t group = groups_before + add_lanes_before(groups);
    pieces_before += count, groups_before += groups;
    int32_t slot = (split.number + part) * params.fold_slots;
    if (part == 0) slot += params.fold_slots - kFoldSlotsOfBeginning + 1;
    for (int32_t leaf = own.first_leaf(), end; leaf < own.end; leaf = end, ++piece, ++slot) {
      end = own.end_of_piece(leaf);
      bool const ends_row_tile = end == num_leaves;
      list.pieces[piece] = {int16_t(slot), ends_row_tile || end % kQuadLeaves == 0,
                            ends_row_tile || end % kBlockLeaves == 0};
      if (leaf % kBlockLeaves == 0) {
        list.begin_of_block[leaf / kBlockLeaves - leading_blocks + has_leading] = group;
      }
      if (leaf % kQuadLeaves == 0) list.begin_of_group[group++] = piece;
    }
  }
  if (lane > 0) return;
  list.num_pieces = pieces_before;
  list.num_blocks = divide_up(num_leaves, kBlockLeaves) - leading_blocks + has_leading;
  list.begin_of_block[list.num_blocks] = groups_before;
  list.begin_of_group[groups_before] = pieces_before;
  if (!has_leading) return;
  int32_t const slot = (split.number + 1) * params.fold_slots - kFoldSlotsOfBeginning;
  list.pieces[0] = {int16_t(slot), true, true};
  list.begin_of_block[0] = list.begin_of_group[0] = 0;
}

// Of the segment's row tile, if it is split. By the warp that described it; takes 2 us, which short
// calls cannot hide, so that the next call has it, too.
template <class Traits>
__device__ void list_pieces(Params const& params, typename Traits::SharedStorage& shared,
                            Segment const& segment) {
  if (segment.is_whole()) return;
  __syncwarp();
  int32_t const i = segment.begins_row_tile;
  FoldPieceList& list = shared.fold.lists[i];
  SplitRowTile const& split = shared.merge.split_row_tiles[i];
  list_fold_pieces<Traits>(params, shared.work, split, {split.tiles, segment.part_tiles}, list);
  if (params.requests_per_thread > 1) return;  // whose schedules are not kept
  __syncwarp();
  auto* const kept = reinterpret_cast<int4*>(&params.kept_schedules[blockIdx.x].fold_lists[i]);
  for (int32_t word = threadIdx.x % 32; word < int32_t(sizeof(list) / sizeof(int4)); word += 32) {
    kept[word] = reinterpret_cast<int4 const*>(&list)[word];
  }
}

}  // namespace etap
