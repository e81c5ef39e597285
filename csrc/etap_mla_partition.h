/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * How the work of one call is cut into CTAs. Plain integer arithmetic, no CUDA: the same code runs
 * in the kernel and in the CPU tests.
 *
 * All work lies on one line: request after request, row tile after row tile, token tile after
 * token tile. Each CTA works on one range of it, so each tile is done once, and a row tile that
 * reaches over the end of a range is split there. Where row tiles differ in length, the line has
 * empty places before the first tile of each: a few, for the time in which a CTA ends one row tile
 * and begins the next, or as many as make all row tiles equally long.
 */
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ETAP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ETAP_HOST_DEVICE inline
#endif

namespace etap {

// 32 bits are enough for 2^31 tiles, some minutes of an H200's time, and divide fast. Longer lines
// are cut off there.
constexpr int32_t kMaxTiles = INT32_MAX;

ETAP_HOST_DEVICE int32_t saturating_add(int32_t a, int32_t b) {
  uint32_t const sum = uint32_t(a) + uint32_t(b);
  return sum < uint32_t(kMaxTiles) ? int32_t(sum) : kMaxTiles;
}

ETAP_HOST_DEVICE int32_t saturating_multiply(int32_t a, int32_t b) {
  int64_t const product = int64_t(a) * b;
  return product < kMaxTiles ? int32_t(product) : kMaxTiles;
}

// Of numbers that are not negative; without a sign the GPU divides faster.
ETAP_HOST_DEVICE int32_t divide(int32_t a, int32_t b) { return int32_t(uint32_t(a) / uint32_t(b)); }

// Of numbers that are not negative, too.
ETAP_HOST_DEVICE int32_t divide_up(int32_t a, int32_t b) {
  return int32_t((uint32_t(a) + uint32_t(b) - 1) / uint32_t(b));
}

ETAP_HOST_DEVICE constexpr int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }

// The line is a sequence of units of `unit_places`, and each unit is cut into `parts_per_unit`
// parts: the first `longer_parts` of `part_places + 1` places, the others of `part_places`.
struct Partition {
  int32_t total_places;
  int32_t unit_places;
  int32_t parts_per_unit;
  int32_t part_places;
  int32_t longer_parts;
  // Of a row tile. The places that it has no tiles for are empty, and come first.
  int32_t empty_places;   // at least
  int32_t padded_places;  // all, if more

  ETAP_HOST_DEVICE int32_t longest_part() const { return part_places + (longer_parts > 0 ? 1 : 0); }

  ETAP_HOST_DEVICE int32_t places_of_row_tile(int32_t tiles) const {
    int32_t const places = tiles + empty_places;
    return places > padded_places ? places : padded_places;
  }
  // Of so many row tiles with so many tiles in all.
  ETAP_HOST_DEVICE int32_t places_of_row_tiles(int32_t row_tiles, int32_t tiles) const {
    if (padded_places > 0) return saturating_multiply(row_tiles, padded_places);
    return saturating_add(tiles, saturating_multiply(row_tiles, empty_places));
  }

  struct Range {
    int32_t begin, end;
  };

  // Places of CTA `cta`; none, at total_places, for idle CTAs.
  ETAP_HOST_DEVICE Range range(int32_t cta) const {
    int32_t const unit = divide(cta, parts_per_unit);
    int32_t const part = cta - unit * parts_per_unit;
    int64_t const begin = int64_t(unit) * unit_places + int64_t(part) * part_places +
                          (part < longer_parts ? part : longer_parts);
    int64_t const end = begin + part_places + (part < longer_parts ? 1 : 0);
    return {int32_t(begin < total_places ? begin : total_places),
            int32_t(end < total_places ? end : total_places)};
  }

  // The CTA whose range holds a place, 0 <= place < total_places.
  ETAP_HOST_DEVICE int32_t cta_of(int32_t place) const {
    int32_t const unit = divide(place, unit_places);
    int32_t const offset = place - unit * unit_places;
    int32_t const in_longer_parts = longer_parts * (part_places + 1);
    int32_t const part = offset < in_longer_parts
                             ? divide(offset, part_places + 1)
                             : longer_parts + divide(offset - in_longer_parts, part_places);
    return unit * parts_per_unit + part;
  }
};

// Chooses the cut with the earliest end. The even cut over all CTAs has the shortest ranges, but
// splits nearly every row tile. When all row tiles are padded to the length of the longest, each
// can be cut into the same number of parts, so that every CTA begins and ends together, or be left
// whole. What splitting costs is given in tiles, as measured (scripts/TUNING.md): parts of kRowTile
// rows are written and joined, in the aligned cut the fewer the less; and an even cut gives most
// CTAs two row tiles. In the even cut of row tiles that differ, `empty_places` before each keep
// CTAs with many short ones from ending last. Zero of them, in batch-invariant calls, stands for no
// padding either.
ETAP_HOST_DEVICE Partition make_partition(int32_t total_tiles, int32_t row_tiles,
                                          int32_t longest_row_tile, int32_t num_ctas,
                                          int32_t rows_per_tile, int32_t empty_places) {
  if (total_tiles == 0) return {0, 1, 1, 1, 0, 0, 0};
  int32_t const padded = saturating_multiply(row_tiles, longest_row_tile);
  bool const is_uniform = padded == total_tiles;
  bool const may_be_padded = padded < kMaxTiles && (is_uniform || empty_places > 0);
  if (is_uniform) empty_places = 0;
  int32_t const places = saturating_add(total_tiles, saturating_multiply(row_tiles, empty_places));
  int32_t const parts = places < num_ctas ? places : num_ctas;
  int32_t const part_places = divide(places, parts);
  Partition const even = {places,       places, parts, part_places, places - part_places * parts,
                          empty_places, 0};
  if (!may_be_padded) return even;

  int32_t const merge_tiles = 2 + rows_per_tile / 16;
  // Empty places stand for some of what the even cut costs.
  int32_t const even_tiles = even.longest_part() / 16 + merge_tiles - (empty_places > 0 ? 2 : 0);
  int32_t const even_end = saturating_add(even.longest_part(), even_tiles);
  if (row_tiles > num_ctas) {
    int32_t const end = saturating_multiply(divide(row_tiles - 1, num_ctas) + 1, longest_row_tile);
    return end <= even_end ? Partition{padded, end, 1, end, 0, 0, longest_row_tile} : even;
  }
  int32_t const ctas = divide(num_ctas, row_tiles);
  int32_t const cut = ctas < longest_row_tile ? ctas : longest_row_tile;
  int32_t const aligned_places = divide(longest_row_tile, cut);
  Partition const aligned = {
      padded, longest_row_tile, cut, aligned_places, longest_row_tile - aligned_places * cut,
      0,      longest_row_tile};
  // Its merge takes merge_tiles * row_tiles / num_ctas, rounded down.
  int64_t const merge_work = int64_t(merge_tiles) * row_tiles;
  int64_t const saved_tiles = longest_row_tile - aligned.longest_part();
  if (saved_tiles * num_ctas <= merge_work && longest_row_tile <= even_end) {
    return {padded, longest_row_tile, 1, longest_row_tile, 0, 0, longest_row_tile};
  }
  int64_t const spare_tiles = even_end - aligned.longest_part();
  return merge_work < (spare_tiles + 1) * num_ctas ? aligned : even;
}

// Batch-invariant calls cut a row tile at places that depend on its own length alone. A CTA does
// the parts that begin in its range of the line, and all of each. Kernels that fold call parts
// leaves (etap_mla_fold_tree.h).

// Parts of a row tile, at most, in kernels that do not fold: as many as the warps of a CTA of the
// merge kernel load at once.
constexpr int32_t kMostFixedParts = 64;
// Longer parts than any request, whose tokens are counted in 32 bits.
constexpr int32_t kLongestFixedSplit = 1 << 25;

// A row tile of `tiles` > 0 tiles in parts of `part_tiles`; the last one may be shorter.
struct FixedSplit {
  int32_t tiles;
  int32_t part_tiles;

  ETAP_HOST_DEVICE int32_t num_parts() const { return first_part_from(tiles); }
  // Number of the first part that begins at `tile` or later; num_parts() if none does.
  ETAP_HOST_DEVICE int32_t first_part_from(int32_t tile) const {
    return divide_up(tile, part_tiles);
  }
  ETAP_HOST_DEVICE int32_t begin(int32_t part) const {
    return minimum(saturating_multiply(part, part_tiles), tiles);
  }
};

// Parts of `split_tiles` or, where that makes too many, of the smallest multiple that does not.
ETAP_HOST_DEVICE FixedSplit make_fixed_split(int32_t tiles, int32_t split_tiles,
                                             int32_t most_parts) {
  int32_t const most_tiles = saturating_multiply(split_tiles, most_parts);
  return {tiles, split_tiles * divide_up(tiles, most_tiles)};
}

// The warps that share a row tile's parts in the merge kernel: as few as load all of them at once,
// 8 each. From the number of parts alone, for the shares decide in which order sums are made.
ETAP_HOST_DEVICE int32_t log_merge_shares(int32_t num_parts) {
  return num_parts > 32 ? 3 : num_parts > 16 ? 2 : num_parts > 8 ? 1 : 0;
}

// What a batch-invariant call can need at most, whatever its index tensors say. Part p of row tile
// r, counted over the whole line, has slot r * parts + p of the workspace.
struct FixedSplitBound {
  int64_t row_tiles;
  int32_t parts;  // of a row tile

  ETAP_HOST_DEVICE int64_t slots() const { return parts > 1 ? row_tiles * parts : 0; }
};

// `longest_row_tile`: tiles of a request that has all the pages there are.
// `most_parts`: of a row tile, as these are cut.
ETAP_HOST_DEVICE FixedSplitBound bound_fixed_split(int64_t total_queries, int64_t batch,
                                                   int32_t num_heads, int32_t row_tile,
                                                   int32_t most_parts, int64_t longest_row_tile,
                                                   int32_t split_tiles) {
  // Each query, and each request, leaves at most one row tile incomplete.
  int64_t const by_query = total_queries * ((num_heads + row_tile - 1) / row_tile);
  int64_t const by_request = total_queries * num_heads / row_tile + batch;
  int64_t const parts = (longest_row_tile + split_tiles - 1) / split_tiles;
  return {by_query < by_request ? by_query : by_request,
          int32_t(parts < most_parts ? parts : most_parts)};
}

}  // namespace etap
