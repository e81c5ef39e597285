/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Batch-invariant calls of kernels that fold: in which order a row tile's partial results are
 * joined. That depends on the row tile's own length alone, and CTAs may be cut between any leaves:
 *
 *   leaf      some token tiles, from nothing: its maximum is its own
 *   quad      four leaves, joined one after another
 *   block     four quads, joined one after another
 *   row tile  its blocks, joined one after another
 *
 * A CTA joins in registers what it has of each of these from its beginning on, and leaves the rest
 * in pieces. Plain integer arithmetic, no CUDA, for the CPU tests, too.
 */
#pragma once

#include "etap_mla_partition.h"

namespace etap {

constexpr int32_t kQuadLeaves = 4;
constexpr int32_t kBlockLeaves = 4 * kQuadLeaves;
constexpr int32_t kMostLeaves = 128;  // as many CTAs as can share a row tile: an H200 has 132 SMs
constexpr int32_t kMostBlocks = kMostLeaves / kBlockLeaves;
// Leaves of a single tile cost more than they bring where there are more (scripts/TUNING.md).
constexpr int32_t kMostSingleTileLeaves = 64;

// Of a row tile: its parts are its leaves.
ETAP_HOST_DEVICE FixedSplit make_leaf_split(int32_t tiles, int32_t split_tiles) {
  FixedSplit leaves = make_fixed_split(tiles, split_tiles, kMostLeaves);
  if (leaves.part_tiles == 1 && tiles > kMostSingleTileLeaves) leaves.part_tiles = 2;
  return leaves;
}

// The line cut into CTAs' ranges. A CTA's work begins at the first granule (leaf, quad or block)
// that begins in its range, and ends where the next CTA's begins. No range is shorter than the
// longest granule, so that each has one.
struct FoldPartition {
  Partition partition;
  int32_t granule_leaves;
};

// Fewer cuts leave fewer pieces: the longest granules with which no CTA gets much more to do.
ETAP_HOST_DEVICE FoldPartition make_fold_partition(int32_t total_tiles, int32_t row_tiles,
                                                   int32_t longest_row_tile, int32_t num_ctas,
                                                   int32_t rows_per_tile, int32_t split_tiles) {
  if (total_tiles == 0) return {make_partition(0, 1, 0, num_ctas, rows_per_tile, 0), 1};
  int32_t const leaf_tiles = make_leaf_split(longest_row_tile, split_tiles).part_tiles;
  // Of the CTA that has most, if row tiles are alike.
  auto const most_tiles = [=](int32_t granule_leaves) {
    int32_t const granule = saturating_multiply(leaf_tiles, granule_leaves);
    return saturating_multiply(granule, divide_up(divide_up(total_tiles, granule), num_ctas));
  };
  int32_t const most_with_leaves = most_tiles(1);
  int32_t const limit = saturating_add(most_with_leaves, most_with_leaves / 16);
  int32_t const granule_leaves = most_tiles(kBlockLeaves) <= limit  ? kBlockLeaves
                                 : most_tiles(kQuadLeaves) <= limit ? kQuadLeaves
                                                                    : 1;
  int32_t const granule = saturating_multiply(leaf_tiles, granule_leaves);
  int32_t const ctas = minimum(num_ctas, total_tiles > granule ? divide(total_tiles, granule) : 1);
  return {make_partition(total_tiles, row_tiles, longest_row_tile, ctas, rows_per_tile, 0),
          granule_leaves};
}

// The cut of a row tile at a range's end, `offset` tiles behind its first: as a number of leaves.
ETAP_HOST_DEVICE int32_t leaves_before_cut(FixedSplit const& leaves, int32_t offset,
                                           int32_t granule_leaves) {
  int32_t const leaf = leaves.first_part_from(minimum(offset, leaves.tiles));
  return minimum(divide_up(leaf, granule_leaves) * granule_leaves, leaves.num_parts());
}

// A CTA's leaves [begin, end) of a row tile as pieces, of which each has a slot of the workspace.
// The whole blocks from the row tile's beginning on are one piece together, if there are any.
struct FoldPieces {
  int32_t begin, end, num_leaves;

  ETAP_HOST_DEVICE int32_t leading_blocks() const {
    if (begin > 0) return 0;
    return end == num_leaves ? divide_up(end, kBlockLeaves) : end / kBlockLeaves;
  }
  // Where the first of the other pieces begins.
  ETAP_HOST_DEVICE int32_t first_leaf() const {
    return begin > 0 ? begin : minimum(leading_blocks() * kBlockLeaves, end);
  }
  // Where the one that begins at `leaf` ends: a leaf, a quad or what there is of it, a block or the
  // whole quads that there are of it.
  ETAP_HOST_DEVICE int32_t end_of_piece(int32_t leaf) const {
    if (leaf % kQuadLeaves != 0) return leaf + 1;
    int32_t const of_quad = minimum(leaf + kQuadLeaves, end);
    if (leaf % kBlockLeaves != 0 || of_quad == end) return of_quad;
    int32_t const of_block = minimum(leaf + kBlockLeaves, end);
    return of_block == num_leaves ? of_block : of_block - of_block % kQuadLeaves;
  }
};

// Slots that a CTA needs where row tiles have at most so many leaves. Behind those for a row tile
// that began in an earlier CTA (leaves of the first quad, quads of the first block, whole blocks,
// whole quads of the last block, leaves of the last quad) come those for one that goes on in a
// later CTA (its leading blocks, whole quads, leaves).
constexpr int32_t kFoldSlotsOfBeginning = 3;
ETAP_HOST_DEVICE constexpr int32_t count_fold_slots(int32_t most_leaves) {
  if (most_leaves <= 1) return 0;
  constexpr int32_t kOfContinuation =
      kQuadLeaves - 1 + kBlockLeaves / kQuadLeaves - 1 + kMostBlocks - 2 + 2;
  return minimum(most_leaves - 1, kOfContinuation) + kFoldSlotsOfBeginning;
}

}  // namespace etap
