/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * How the work of one call is cut into CTAs. Plain integer arithmetic, no CUDA: the same code runs
 * in the kernel and in the CPU tests.
 *
 * All work lies on one line: request after request, row tile after row tile, token tile after
 * token tile. Each CTA works on one range of it, so each tile is done once, and a row tile that
 * reaches over the end of a range is split there.
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

// The line is a sequence of units of `unit_tiles`, and each unit is cut into `parts_per_unit`
// parts: the first `longer_parts` of `part_tiles + 1` tiles, the others of `part_tiles`.
struct Partition {
  int32_t total_tiles;
  int32_t unit_tiles;
  int32_t parts_per_unit;
  int32_t part_tiles;
  int32_t longer_parts;

  ETAP_HOST_DEVICE int32_t longest_part() const { return part_tiles + (longer_parts > 0 ? 1 : 0); }

  struct Range {
    int32_t begin, end;
  };

  // Tiles of CTA `cta`; empty, at total_tiles, for idle CTAs.
  ETAP_HOST_DEVICE Range range(int32_t cta) const {
    int32_t const unit = divide(cta, parts_per_unit);
    int32_t const part = cta - unit * parts_per_unit;
    int64_t const begin = int64_t(unit) * unit_tiles + int64_t(part) * part_tiles +
                          (part < longer_parts ? part : longer_parts);
    int64_t const end = begin + part_tiles + (part < longer_parts ? 1 : 0);
    return {int32_t(begin < total_tiles ? begin : total_tiles),
            int32_t(end < total_tiles ? end : total_tiles)};
  }

  // The CTA whose range holds tile `position`, 0 <= position < total_tiles.
  ETAP_HOST_DEVICE int32_t cta_of(int32_t position) const {
    int32_t const unit = divide(position, unit_tiles);
    int32_t const offset = position - unit * unit_tiles;
    int32_t const in_longer_parts = longer_parts * (part_tiles + 1);
    int32_t const part = offset < in_longer_parts
                             ? divide(offset, part_tiles + 1)
                             : longer_parts + divide(offset - in_longer_parts, part_tiles);
    return unit * parts_per_unit + part;
  }
};

// Chooses the cut. The even cut over all CTAs is the shortest, but it splits nearly every row tile
// and so pays for partial results and their merge. When all row tiles are equally long, cutting
// each into the same number of parts (or giving whole row tiles to a CTA) makes every CTA begin and
// end together; take that when it costs the slowest CTA at most 1/16 more tiles.
ETAP_HOST_DEVICE Partition make_partition(int32_t total_tiles, int32_t row_tiles,
                                          int32_t longest_row_tile, int32_t num_ctas) {
  if (total_tiles == 0) return {0, 1, 1, 1, 0};
  int32_t const parts = total_tiles < num_ctas ? total_tiles : num_ctas;
  int32_t const part_tiles = divide(total_tiles, parts);
  Partition const even = {total_tiles, total_tiles, parts, part_tiles,
                          total_tiles - part_tiles * parts};
  bool const is_uniform = int64_t(row_tiles) * longest_row_tile == total_tiles;
  if (!is_uniform) return even;

  Partition aligned = {total_tiles, longest_row_tile, 1, longest_row_tile, 0};
  if (row_tiles > num_ctas) {  // whole row tiles, the same number for each CTA
    int32_t const row_tiles_per_cta = divide(row_tiles - 1, num_ctas) + 1;
    aligned.unit_tiles = saturating_multiply(row_tiles_per_cta, longest_row_tile);
    aligned.part_tiles = aligned.unit_tiles;
  } else {  // the same number of CTAs for each row tile
    int32_t const ctas = divide(num_ctas, row_tiles);
    aligned.parts_per_unit = ctas < longest_row_tile ? ctas : longest_row_tile;
    aligned.part_tiles = divide(longest_row_tile, aligned.parts_per_unit);
    aligned.longer_parts = longest_row_tile - aligned.part_tiles * aligned.parts_per_unit;
  }
  int32_t const longest_span = even.longest_part();
  return aligned.longest_part() <= longest_span + longest_span / 16 ? aligned : even;
}

}  // namespace etap
