/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * How the work of one call is cut into CTAs. Plain integer arithmetic, no CUDA: the same code runs
 * in the kernel and in the CPU tests.
 *
 * All work lies on one line: request after request, row tile after row tile, token tile after
 * token tile. CTA c works on [begin(c), begin(c + 1)), so each tile is done once and a row tile
 * that reaches over a CTA boundary is split there.
 */
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ETAP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ETAP_HOST_DEVICE inline
#endif

namespace etap {

// The line is a sequence of units of `unit_tiles`, and each unit is cut into `parts_per_unit`
// parts whose sizes differ by at most one tile.
struct Partition {
  int64_t total_tiles;
  int64_t unit_tiles;
  int64_t parts_per_unit;

  // First tile of CTA `cta`. begin(cta) == total_tiles from the first idle CTA on.
  ETAP_HOST_DEVICE int64_t begin(int64_t cta) const {
    int64_t const unit = cta / parts_per_unit;
    int64_t const part = cta - unit * parts_per_unit;
    int64_t const quotient = unit_tiles / parts_per_unit;
    int64_t const remainder = unit_tiles - quotient * parts_per_unit;
    int64_t const position =
        unit * unit_tiles + part * quotient + (part < remainder ? part : remainder);
    return position < total_tiles ? position : total_tiles;
  }

  // The CTA whose range holds tile `position`, 0 <= position < total_tiles.
  ETAP_HOST_DEVICE int64_t cta_of(int64_t position) const {
    int64_t const unit = position / unit_tiles;
    int64_t const offset = position - unit * unit_tiles;
    int64_t const quotient = unit_tiles / parts_per_unit;
    int64_t const remainder = unit_tiles - quotient * parts_per_unit;
    int64_t const in_longer_parts = remainder * (quotient + 1);
    int64_t const part = offset < in_longer_parts
                             ? offset / (quotient + 1)
                             : remainder + (offset - in_longer_parts) / quotient;
    return unit * parts_per_unit + part;
  }
};

// Chooses the cut. The even cut over all CTAs is the shortest, but it splits nearly every row tile
// and so pays for partial results and their merge. When all row tiles are equally long, cutting
// each into the same number of parts (or giving whole row tiles to a CTA) makes every CTA begin and
// end together; take that when it costs the slowest CTA at most 1/16 more tiles.
ETAP_HOST_DEVICE Partition make_partition(int64_t total_tiles, int64_t row_tiles,
                                          int64_t longest_row_tile, int64_t num_ctas) {
  if (total_tiles == 0) return {0, 1, 1};
  int64_t const shortest_span = (total_tiles + num_ctas - 1) / num_ctas;
  bool const is_uniform = total_tiles == row_tiles * longest_row_tile;
  if (is_uniform) {
    int64_t const units_per_cta = (row_tiles + num_ctas - 1) / num_ctas;
    int64_t parts = units_per_cta > 1 ? 1 : num_ctas / row_tiles;
    if (parts > longest_row_tile) parts = longest_row_tile;
    int64_t const unit_tiles = units_per_cta * longest_row_tile;
    int64_t const span = (unit_tiles + parts - 1) / parts;
    if (span <= shortest_span + shortest_span / 16) return {total_tiles, unit_tiles, parts};
  }
  return {total_tiles, total_tiles, total_tiles < num_ctas ? total_tiles : num_ctas};
}

}  // namespace etap
