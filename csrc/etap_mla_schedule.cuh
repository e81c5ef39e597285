/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Who works on what, found on the GPU from the index tensors as they are when the kernel runs. A
 * captured CUDA graph therefore follows changed lengths, pages and page tables by itself, and
 * nothing is ever copied to the host. Every CTA does this before its first load, so it is short:
 *
 *   load what the call before kept, and the requests as they are: one trip to memory
 *   all as in that call (a step's layers differ in their caches alone)? then so is the work
 *   otherwise find the work (one barrier, 32-bit divisions), and keep it
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

// Token numbers, rounded up to whole tiles, stay within 32 bits.
constexpr int64_t kLongestRequest = INT32_MAX - kTokenTile;

// What the index tensors say of one request. Loading takes a while; use it as late as possible.
struct RawRequest {
  int32_t query_begin, query_end, page_begin, page_end, kv_len;
};

__device__ __forceinline__ RawRequest load_request(Params const& params, int32_t index) {
  if (index >= params.batch) return {0, 0, 0, 0, 0};
  return {params.qo_indptr[index], params.qo_indptr[index + 1], params.kv_indptr[index],
          params.kv_indptr[index + 1], params.kv_len_arr[index]};
}

// Brings index tensors and kept schedule to L2 while the kernel before still runs. It may be
// writing them: L2 is where its results appear, and nothing is read yet. A line of 128 bytes a
// thread; where there are more, the first ones have to do.
__device__ __forceinline__ void prefetch_schedule(Params const& params) {
  auto prefetch = [](void const* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
  };
  KeptSchedule const& kept = params.kept_schedules[blockIdx.x];
  if (threadIdx.x == 0) prefetch(&kept);
  if (threadIdx.x == 1) prefetch(&kept.work.segment.begins_row_tile);  // in the second line
  int32_t const request = threadIdx.x * 8;
  if (request < min(params.batch, kThreads)) {
    prefetch(&kept.offsets[request]);
    if (threadIdx.x % 4 == 0) prefetch(&kept.kv_len[request]);
  }
  int32_t const first = (blockIdx.x * kThreads + threadIdx.x) * 32;
  if (first < params.num_kv_indices) prefetch(params.kv_indices + first);
  if (first >= params.batch) return;
  prefetch(params.kv_len_arr + first);
  prefetch(params.qo_indptr + first);
  prefetch(params.kv_indptr + first);
}

// Where the page of a token in this CTA's first tile stands in kv_indices, if this call is like the
// one before; -1 if nowhere. A guess, made before the kernel before has ended, which may be writing
// what is read here: whoever uses it compares.
__device__ __forceinline__ int32_t guess_page_index(Params const& params, int32_t token_of_tile) {
  if (token_of_tile >= kTokenTile) return -1;
  Segment const& segment = params.kept_schedules[blockIdx.x].work.segment;
  int32_t const tile = __ldcg(&segment.tile_begin),
                page_begin = __ldcg(&segment.request.page_begin);
  int32_t const page = params.divide_by_page_size.div(tile * kTokenTile + token_of_tile);
  int32_t const index = page_begin + page;
  return uint32_t(index) < uint32_t(params.num_kv_indices) ? index : -1;
}

// A page number, loaded before it was known to be needed.
struct GuessedPage {
  int32_t index = -1;  // in kv_indices
  int32_t page = 0;

  __device__ __forceinline__ GuessedPage(Params const& params, int32_t guessed_index)
      : index(guessed_index) {
    if (index >= 0) page = __ldcg(params.kv_indices + index);
  }
};

// Every number is clamped so that no index tensor can lead outside the buffers.
__device__ __forceinline__ Request clamp_request(Params const& params, RawRequest const& raw) {
  int32_t const query_begin = min(max(raw.query_begin, 0), params.total_queries);
  int32_t const query_end = min(max(raw.query_end, query_begin), params.total_queries);
  int32_t const page_begin = min(max(raw.page_begin, 0), params.num_kv_indices);
  int32_t const page_end = min(max(raw.page_end, page_begin), params.num_kv_indices);
  int64_t const capacity = min(int64_t(page_end - page_begin) * params.page_size, kLongestRequest);
  int32_t const kv_len = int32_t(min(int64_t(max(raw.kv_len, 0)), capacity));
  return {query_begin, query_end - query_begin, page_begin, kv_len};
}

// Tokens that a packed row of the request sees: all or, causal, those up to its own query's.
__device__ __forceinline__ int32_t visible_tokens(Params const& params, Request const& request,
                                                  int32_t packed_row) {
  if (!params.causal) return request.kv_len;
  int32_t const query = params.divide_by_heads.div(packed_row);
  return min(request.kv_len - request.query_len + query + 1, request.kv_len);
}

// An empty request counts as one (empty) tile: some CTA has to write its zeros.
__device__ __forceinline__ int32_t count_token_tiles(Request const& request) {
  return max((request.kv_len + kTokenTile - 1) / kTokenTile, 1);
}

// A worker is one CTA or, where row tiles are done in pairs, two.
template <class Traits>
struct Worker {
  int32_t log_ctas, index, rank, count;

  __device__ __forceinline__ explicit Worker(Params const& params)
      : log_ctas(log_row_tiles_together<Traits>(params)),
        index(blockIdx.x >> log_ctas),
        rank(blockIdx.x & ((1 << log_ctas) - 1)),
        count(gridDim.x >> log_ctas) {}

  // Of this CTA among those of the same rank, which may split a row tile: one after another.
  __device__ __forceinline__ int32_t cta() const {
    return index < count ? rank * count + index : blockIdx.x;
  }
};

// Those that are done together count once.
template <class Traits>
__device__ __forceinline__ int32_t count_row_tiles(Params const& params, Request const& request) {
  int32_t const row_tiles =
      (request.query_len * params.num_heads + Traits::kRowTile - 1) / Traits::kRowTile;
  return row_tiles >> log_row_tiles_together<Traits>(params);
}

// Of all its row tiles.
template <class Traits>
__device__ __forceinline__ int32_t count_tiles(Params const& params, Request const& request) {
  return saturating_multiply(count_token_tiles(request), count_row_tiles<Traits>(params, request));
}

template <class Traits>
__device__ __forceinline__ int32_t count_places(Params const& params, Request const& request,
                                                Partition const& partition) {
  return saturating_multiply(partition.places_of_row_tile(count_token_tiles(request)),
                             count_row_tiles<Traits>(params, request));
}

// What some requests add up to.
struct WorkSums {
  int32_t tiles, row_tiles, longest_row_tile;
};

template <class Traits>
__device__ __forceinline__ void add_request(Params const& params, Request const& request,
                                            WorkSums& sums) {
  int32_t const row_tiles = count_row_tiles<Traits>(params, request);
  sums.tiles = saturating_add(sums.tiles, count_tiles<Traits>(params, request));
  sums.row_tiles = saturating_add(sums.row_tiles, row_tiles);
  sums.longest_row_tile =
      max(sums.longest_row_tile, row_tiles > 0 ? count_token_tiles(request) : 0);
}

// Sum over the lanes before this one; `value` becomes the sum over all.
__device__ __forceinline__ int32_t add_lanes_before(int32_t& value) {
  int32_t const lane = threadIdx.x % 32;
  int32_t through = value;
#pragma unroll
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    int32_t const earlier = __shfl_up_sync(0xffffffff, through, distance);
    if (lane >= distance) through = saturating_add(through, earlier);
  }
  value = __shfl_sync(0xffffffff, through, 31);
  int32_t const before = __shfl_up_sync(0xffffffff, through, 1);
  return lane > 0 ? before : 0;
}

// Sums over the warp's lanes; returns those of the lanes before this one.
__device__ __forceinline__ WorkSums add_over_warp(WorkSums& sums) {
  WorkSums before = {};
  before.tiles = add_lanes_before(sums.tiles);
  before.row_tiles = add_lanes_before(sums.row_tiles);
  sums.longest_row_tile = __reduce_max_sync(0xffffffff, sums.longest_row_tile);
  return before;
}

// Sums over the CTA's warps; adds those of the warps before this one to `before`.
__device__ __forceinline__ void add_over_cta(ScheduleScratch& scratch, WorkSums& sums,
                                             WorkSums& before) {
  int32_t const warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0 && warp < kThreads / 32) {
    scratch.warps[warp] = make_int4(sums.tiles, sums.row_tiles, sums.longest_row_tile, 0);
  }
  __syncthreads();
  WorkSums warps_before = {};
  sums = {};
#pragma unroll
  for (int32_t i = 0; i < kThreads / 32; ++i) {
    int4 const of_warp = scratch.warps[i];
    if (i == warp) warps_before = sums;
    sums.tiles = saturating_add(sums.tiles, of_warp.x);
    sums.row_tiles = saturating_add(sums.row_tiles, of_warp.y);
    sums.longest_row_tile = max(sums.longest_row_tile, of_warp.z);
  }
  before.tiles = saturating_add(before.tiles, warps_before.tiles);
  before.row_tiles = saturating_add(before.row_tiles, warps_before.row_tiles);
}

// Into parts or, in kernels that fold, leaves. Of a batch-invariant call.
template <class Traits>
__device__ __forceinline__ FixedSplit split_row_tile(Params const& params, int32_t tiles) {
  return Traits::kFolds ? make_leaf_split(tiles, params.fixed_split_tiles)
                        : make_fixed_split(tiles, params.fixed_split_tiles, kMostFixedParts);
}

// Walks the segments of one CTA, from the one in its work on. Both loaders walk for themselves and
// see the same ones; the math warpgroups are told by the loader of the queries.
template <class Traits>
class SegmentWalk {
 public:
  Segment segment;

  __device__ SegmentWalk(Params const& params, CtaWork const& work)
      : segment(work.segment),
        params_(params),
        work_(work),
        position_(work.position),
        request_begin_(work.request_begin),
        row_tiles_before_(work.row_tiles_before),
        index_(work.request_index) {
    next_request_ = load_request(params, index_ + 1);
  }

  // The work, of which position and request are known, with its first segment.
  __device__ static CtaWork begin(Params const& params, CtaWork const& unwalked) {
    SegmentWalk walk(params, unwalked);
    if (is_batch_invariant(params)) walk.skip_what_began_before();
    CtaWork work = unwalked;
    work.has_segment = walk.next();
    work.position = walk.position_;
    work.request_begin = walk.request_begin_;
    work.row_tiles_before = walk.row_tiles_before_;
    work.request_index = walk.index_;
    work.segment = walk.segment;
    return work;
  }

  // Goes on to the next segment; false if there is none.
  __device__ bool next() {
    if (position_ >= work_.end) return false;
    Request& request = segment.request;
    Partition const& partition = work_.partition;
    int32_t places = count_places<Traits>(params_, request, partition);
    while (position_ >= saturating_add(request_begin_, places)) {
      request_begin_ += places;
      row_tiles_before_ += count_row_tiles<Traits>(params_, request);
      request = clamp_request(params_, next_request_);
      if (++index_ >= params_.batch) return false;
      // Loaded one request ahead, so that nobody waits for it between two segments.
      next_request_ = load_request(params_, index_ + 1);
      places = count_places<Traits>(params_, request, partition);
    }
    int32_t const tiles = count_token_tiles(request);
    int32_t const offset = position_ - request_begin_;
    // Most requests have a single row tile; spare them the division.
    int32_t const places_of_row_tile = partition.places_of_row_tile(tiles);
    int32_t const row_tile = offset < places_of_row_tile ? 0 : offset / places_of_row_tile;
    // Negative in an empty place.
    int32_t const tile = offset - row_tile * places_of_row_tile - (places_of_row_tile - tiles);
    Worker<Traits> const worker(params_);
    segment.row_begin = ((row_tile << worker.log_ctas) + worker.rank) * Traits::kRowTile;
    segment.num_rows =
        min(Traits::kRowTile, request.query_len * params_.num_heads - segment.row_begin);
    segment.packed_row = request.query_begin * params_.num_heads + segment.row_begin;
    segment.tile_begin = max(tile, 0);
    segment.tile_end = tile + (work_.end - position_);
    if (segment.tile_end <= 0) return false;  // the range ends before the row tile's first tile
    segment.slot = 2 * worker.cta() + (segment.tile_begin == 0 ? 1 : 0);
    if (is_batch_invariant(params_)) {
      FixedSplit const split = split_row_tile<Traits>(params_, tiles);
      segment.part_tiles = split.part_tiles;
      if constexpr (Traits::kFolds) {
        segment.tile_end =
            split.begin(leaves_before_cut(split, segment.tile_end, work_.granule_leaves));
        // The first slot of a beginning is left to the leading blocks.
        segment.slot =
            worker.cta() * params_.fold_slots +
            (segment.tile_begin == 0 ? params_.fold_slots - kFoldSlotsOfBeginning + 1 : 0);
      } else {
        // Index tensors that are wrong may have more.
        if (row_tile_number() >= params_.most_row_tiles) return false;
        segment.tile_end = segment.tile_begin + split.part_tiles;
        segment.slot =
            row_tile_number() * params_.most_parts + split.first_part_from(segment.tile_begin);
      }
    }
    segment.tile_end = min(segment.tile_end, tiles);
    segment.masked_tile_begin = visible_tokens(params_, request, segment.row_begin) / kTokenTile;
    segment.begins_row_tile = segment.tile_begin == 0;
    segment.ends_row_tile = segment.tile_end == tiles;
    position_ += segment.tile_end - tile;
    return true;
  }

  // What the merge has to know of the segment's row tile, if it is split.
  __device__ void describe_split(SplitRowTile (&split_row_tiles)[2]) const {
    MergeDescriptor descriptor = {0, segment.num_rows, segment.packed_row};
    if (is_batch_invariant(params_) && !Traits::kFolds) {
      if (!segment.begins_row_tile) return;
      int32_t const num_parts = split_of_row_tile().num_parts();
      descriptor.num_parts = num_parts > 1 ? num_parts : 0;
      params_.merge_descriptors[row_tile_number()] = descriptor;
    } else if (!segment.is_whole()) {
      Worker<Traits> const worker(params_);
      int32_t const row_tile_begin = position_ - segment.tile_end;
      int32_t const last = work_.partition.cta_of(row_tile_begin + begin_of_last_cut());
      int32_t const first =
          segment.begins_row_tile ? worker.index : work_.partition.cta_of(row_tile_begin);
      int32_t const part = worker.index - first;
      descriptor.num_parts = min(last, worker.count - 1) - first + 1;
      split_row_tiles[segment.begins_row_tile] = {descriptor, worker.cta() - part, part,
                                                  row_tile_begin, split_of_row_tile().tiles};
    }
  }

 private:
  // Of the segment's; as next() found it.
  __device__ FixedSplit split_of_row_tile() const {
    return {count_token_tiles(segment.request), segment.part_tiles};
  }

  // Of a batch-invariant call: a part (leaf, block) that begins in an earlier CTA's range is that
  // CTA's.
  __device__ void skip_what_began_before() {
    int32_t const tiles = count_token_tiles(segment.request);
    int32_t const offset = position_ - request_begin_;
    int32_t const tile = offset - divide(offset, tiles) * tiles;
    FixedSplit const split = split_row_tile<Traits>(params_, tiles);
    int32_t const part = Traits::kFolds ? leaves_before_cut(split, tile, work_.granule_leaves)
                                        : split.first_part_from(tile);
    position_ += split.begin(part) - tile;
  }

  // The last tile of a row tile, or of those that begin a leaf or block, where CTAs can be cut.
  __device__ int32_t begin_of_last_cut() const {
    FixedSplit const leaves = split_of_row_tile();
    if (!folds<Traits>(params_)) return leaves.tiles - 1;
    int32_t const last_leaf = leaves.num_parts() - 1;
    return leaves.begin(last_leaf - last_leaf % work_.granule_leaves);
  }

  // Of the segment's row tile, over the whole line.
  __device__ int32_t row_tile_number() const {
    return row_tiles_before_ + segment.row_begin / Traits::kRowTile;
  }

  Params const& params_;
  CtaWork const& work_;
  int32_t position_;
  int32_t request_begin_;
  int32_t row_tiles_before_;  // the request's
  int32_t index_;
  RawRequest next_request_;
};

template <class Traits>
__device__ FoldPartition cut_line(Params const& params, WorkSums const& sums, int32_t num_ctas) {
  int32_t const row_tiles = max(sums.row_tiles, 1);
  if (folds<Traits>(params)) {
    return make_fold_partition(sums.tiles, row_tiles, sums.longest_row_tile, num_ctas,
                               Traits::kRowTile, params.fixed_split_tiles);
  }
  int32_t const empty_places = is_batch_invariant(params) ? 0 : Traits::kEmptyPlaces;
  return {make_partition(sums.tiles, row_tiles, sums.longest_row_tile, num_ctas, Traits::kRowTile,
                         empty_places),
          0};
}

// Run by all threads of the CTA together; `work` is there for all after the next barrier. Up to 32
// requests, the first warp looks at all of them, one a lane, and needs no other warp. Of more,
// thread t counts the t-th of kThreads equal shares.
template <class Traits>
__device__ void find_cta_work(Params const& params, ScheduleScratch& scratch, CtaWork& work) {
  bool const is_small = params.batch <= 32;
  if (is_small && threadIdx.x >= 32) return;
  int32_t const requests = params.requests_per_thread;
  int32_t const first = int32_t(threadIdx.x) * requests;
  WorkSums sums = {};
  Request request;
  for (int32_t i = 0; i < requests; ++i) {
    request = clamp_request(params, load_request(params, first + i));
    add_request<Traits>(params, request, sums);
  }
  WorkSums const own = sums;
  WorkSums before = add_over_warp(sums);
  if (!is_small) add_over_cta(scratch, sums, before);
  // A line cut off would leave row tiles without a descriptor; then nothing is done at all.
  if (is_batch_invariant(params) && sums.tiles == kMaxTiles) sums = {};
  Worker<Traits> const worker(params);
  auto const [partition, granule_leaves] = cut_line<Traits>(params, sums, worker.count);
  auto const [begin, end] = partition.range(worker.index);
  CtaWork found = {};
  found.partition = partition;
  found.granule_leaves = granule_leaves;
  found.row_tiles = sums.row_tiles;
  if (begin >= end && threadIdx.x == 0) work = found;
  int32_t place = partition.places_of_row_tiles(before.row_tiles, before.tiles);
  int32_t const places = partition.places_of_row_tiles(own.row_tiles, own.tiles);
  if (begin >= end || begin < place || begin >= saturating_add(place, places)) return;
  int32_t index = first;  // this thread's share holds the CTA's first place
  if (requests > 1) {
    request = clamp_request(params, load_request(params, index));
    int32_t places_of_request = count_places<Traits>(params, request, partition);
    while (begin >= saturating_add(place, places_of_request)) {
      place += places_of_request;
      before.row_tiles += count_row_tiles<Traits>(params, request);
      request = clamp_request(params, load_request(params, ++index));
      places_of_request = count_places<Traits>(params, request, partition);
    }
  }
  found.end = end;
  found.position = begin;
  found.request_begin = place;
  found.request_index = index;
  found.row_tiles_before = before.row_tiles;
  found.segment.request = request;
  work = SegmentWalk<Traits>::begin(params, found);
}

}  // namespace etap
