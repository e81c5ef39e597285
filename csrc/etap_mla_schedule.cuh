/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Who works on what, found on the GPU from the index tensors as they are when the kernel runs. A
 * captured CUDA graph therefore follows changed lengths, pages and page tables by itself, and
 * nothing is ever copied to the host.
 */
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "etap_mla_partition.h"
#include "etap_mla_traits.cuh"

namespace etap {

// Token numbers, rounded up to whole tiles, stay within 32 bits.
constexpr int64_t kLongestRequest = INT32_MAX - kTokenTile;

// One request, with every number clamped so that no index tensor can lead outside the buffers.
struct Request {
  int32_t query_begin;
  int32_t query_len;
  int32_t page_begin;  // offset into kv_indices
  int32_t kv_len;
};

__device__ __forceinline__ Request load_request(Params const& params, int32_t index) {
  if (index >= params.batch) return {0, 0, 0, 0};
  int32_t const query_begin = min(max(params.qo_indptr[index], 0), params.total_queries);
  int32_t const query_end = min(max(params.qo_indptr[index + 1], query_begin), params.total_queries);
  int32_t const page_limit = int32_t(params.num_kv_indices);
  int32_t const page_begin = min(max(params.kv_indptr[index], 0), page_limit);
  int32_t const page_end = min(max(params.kv_indptr[index + 1], page_begin), page_limit);
  int64_t const capacity = min(int64_t(page_end - page_begin) * params.page_size, kLongestRequest);
  int32_t const kv_len = int32_t(min(int64_t(max(params.kv_len_arr[index], 0)), capacity));
  return {query_begin, query_end - query_begin, page_begin, kv_len};
}

// An empty request counts as one (empty) tile: some CTA has to write its zeros.
__device__ __forceinline__ int32_t count_token_tiles(Request const& request) {
  return max((request.kv_len + kTokenTile - 1) / kTokenTile, 1);
}

template <int kRowTile>
__device__ __forceinline__ int32_t count_row_tiles(Params const& params, Request const& request) {
  return int32_t((int64_t(request.query_len) * params.num_heads + kRowTile - 1) / kRowTile);
}

// One run of token tiles of one row tile: what a CTA does between loading Q and writing O.
struct Segment {
  Request request;
  int32_t row_begin;  // first packed row of the row tile, within the request
  int32_t num_rows;   // rows of it that exist
  int32_t tile_begin, tile_end;
  bool begins_row_tile, ends_row_tile;
  int32_t parts_from_here;  // CTAs, this one included, that work on the rest of the row tile

  __device__ int32_t num_tiles() const { return tile_end - tile_begin; }
  __device__ bool is_whole() const { return begins_row_tile && ends_row_tile; }
};

struct RequestTotals {
  int64_t tiles;
  int64_t row_tiles;
  int64_t longest;
};

struct AddTotals {
  __device__ RequestTotals operator()(RequestTotals const& a, RequestTotals const& b) const {
    return {a.tiles + b.tiles, a.row_tiles + b.row_tiles, max(a.longest, b.longest)};
  }
};

using TotalsReduce = cub::BlockReduce<RequestTotals, kThreads>;
using TilesScan = cub::BlockScan<int64_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct ScheduleScratch {
  union {
    typename TotalsReduce::TempStorage reduce;
    typename TilesScan::TempStorage scan;
  };
  RequestTotals totals;
};

// Run by all threads of the CTA together; afterwards all see `work`.
template <int kRowTile>
__device__ void find_cta_work(Params const& params, ScheduleScratch& scratch, CtaWork& work) {
  auto totals_of = [&](Request const& request) -> RequestTotals {
    int64_t const row_tiles = count_row_tiles<kRowTile>(params, request);
    int64_t const tiles = count_token_tiles(request);
    return {row_tiles * tiles, row_tiles, row_tiles > 0 ? tiles : 0};
  };

  RequestTotals const mine = totals_of(load_request(params, threadIdx.x));
  RequestTotals sum = mine;
  for (int32_t i = threadIdx.x + kThreads; i < params.batch; i += kThreads) {
    sum = AddTotals{}(sum, totals_of(load_request(params, i)));
  }
  sum = TotalsReduce(scratch.reduce).Reduce(sum, AddTotals{});
  if (threadIdx.x == 0) scratch.totals = sum;
  __syncthreads();

  RequestTotals const totals = scratch.totals;
  auto const partition =
      make_partition(totals.tiles, totals.row_tiles, totals.longest, gridDim.x);
  int64_t const begin = partition.begin(blockIdx.x);
  if (threadIdx.x == 0) {
    work.partition = partition;
    work.begin = begin;
    work.end = partition.begin(int64_t(blockIdx.x) + 1);
  }

  int64_t chunk_begin = 0;  // first tile of the chunk's first request
  for (int32_t chunk = 0; chunk < params.batch && chunk_begin <= begin; chunk += kThreads) {
    int32_t const index = chunk + int32_t(threadIdx.x);
    int64_t const tiles = chunk == 0 ? mine.tiles : totals_of(load_request(params, index)).tiles;
    int64_t before, chunk_tiles;
    TilesScan(scratch.scan).ExclusiveSum(tiles, before, chunk_tiles);
    before += chunk_begin;
    if (before <= begin && begin < before + tiles) {
      work.first_request = index;
      work.first_request_begin = before;
    }
    chunk_begin += chunk_tiles;
    __syncthreads();
  }
}

// Walks the segments of one CTA. Every role of the CTA walks for itself and sees the same ones.
template <int kRowTile>
class SegmentWalk {
 public:
  Segment segment;  // the current one, once next() returned true

  __device__ SegmentWalk(Params const& params, CtaWork const& work)
      : params_(params),
        work_(work),
        position_(work.begin),
        request_begin_(work.first_request_begin),
        index_(work.first_request) {
    segment.request = load_request(params, index_);
    next_request_ = load_request(params, index_ + 1);
  }

  __device__ bool next() {
    if (position_ >= work_.end) return false;
    Request& request = segment.request;
    int64_t tiles = count_token_tiles(request);
    int64_t request_end = request_begin_ + tiles * count_row_tiles<kRowTile>(params_, request);
    while (position_ >= request_end) {
      request_begin_ = request_end;
      request = next_request_;
      // Loaded one request ahead, so that nobody waits for it between two segments.
      next_request_ = load_request(params_, ++index_ + 1);
      tiles = count_token_tiles(request);
      request_end += tiles * count_row_tiles<kRowTile>(params_, request);
    }
    int64_t const offset = position_ - request_begin_;
    int64_t const row_tile = offset / tiles;
    int64_t const row_tile_end = request_begin_ + (row_tile + 1) * tiles;
    int64_t const end = min(row_tile_end, work_.end);

    segment.row_begin = int32_t(row_tile) * kRowTile;
    segment.num_rows = min(kRowTile, request.query_len * params_.num_heads - segment.row_begin);
    segment.tile_begin = int32_t(offset - row_tile * tiles);
    segment.tile_end = segment.tile_begin + int32_t(end - position_);
    segment.begins_row_tile = segment.tile_begin == 0;
    segment.ends_row_tile = end == row_tile_end;
    segment.parts_from_here =
        segment.ends_row_tile
            ? 1
            : int32_t(work_.partition.cta_of(row_tile_end - 1)) - int32_t(blockIdx.x) + 1;
    position_ = end;
    return true;
  }

 private:
  Params const& params_;
  CtaWork const& work_;
  int64_t position_;
  int64_t request_begin_;
  int32_t index_;
  Request next_request_;
};

}  // namespace etap
