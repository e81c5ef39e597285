/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The producer warpgroup: copies cache boxes into the shared-memory ring and queries beside it.
 */
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include <cuda/ptx>
#include <cute/arch/copy_sm90_tma.hpp>

#include "etap_mla_begun.cuh"
#include "etap_mla_fold_pieces.cuh"
#include "etap_mla_partial.cuh"

namespace etap {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// One arrival for the 32 threads of a warp, counted as `count`.
__device__ __forceinline__ void arrive_once_per_warp(uint64_t* barrier, uint32_t count) {
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                             barrier, count);
}

// The cache leaves L2 before what calls write, partial results above all: these are overwritten by
// the next call before they ever reach DRAM (scripts/TUNING.md).
constexpr auto kCacheHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST);

// 16 bytes of the cache to shared memory, or zeros. CUTLASS's cp_async_zfill() takes no hint.
__device__ __forceinline__ void copy_chunk(void* target, void const* source, bool exists) {
  uint32_t const address = cute::cast_smem_ptr_to_uint(target);
  int32_t const bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(address), "l"(source), "r"(bytes), "l"(kCacheHint));
}

// A place in the ring of boxes, or of barriers, and the parity of the lap it belongs to.
template <int kRingBoxes>
struct RingPosition {
  int32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ RingPosition after(int32_t boxes) const {
    RingPosition result{index + boxes, parity};
    if (result.index >= kRingBoxes) {
      result.index -= kRingBoxes;
      result.parity ^= 1;
    }
    return result;
  }
};

// Where token `token` of a request lies in the pool. A page outside the pool reads as zeros.
struct TokenPlace {
  int32_t page;
  int32_t row;
};

template <bool kGuessesPages>
__device__ __forceinline__ TokenPlace find_token(Params const& params, Request const& request,
                                                 int32_t token, GuessedPage const& guessed) {
  if (token >= request.kv_len) return {-1, 0};
  int32_t page_in_request, row;
  params.divide_by_page_size(page_in_request, row, token);
  int32_t const index = request.page_begin + page_in_request;
  bool const is_guessed = kGuessesPages && index == guessed.index;
  return {is_guessed ? guessed.page : params.kv_indices[index], row};
}

// The token of a tile whose page a lane of the two loading warps looks up: the first of a group of
// rows that are copied together, or each.
template <KvLoader kKvLoader>
__device__ __forceinline__ int32_t token_of_lane(Params const& params) {
  return kKvLoader == KvLoader::kTma ? int32_t(threadIdx.x) % 32 * params.rows_per_copy
                                     : int32_t(threadIdx.x) % kGatherThreads;
}

// The boxes of a tile, whose places lanes know: lane g that of the g-th group of rows, which lies
// within one page. `copies` groups of each box are copied; none if the request is empty. With
// FlashMLA's layout ckv_map is of whole tokens, kpe among them, and kpe_map of their scales, which
// arrive with the box of kpe.
template <class Traits>
struct TileByTma {
  using Boxes = typename Traits::Boxes;
  using SharedStorage = typename Traits::SharedStorage;
  CUtensorMap const *ckv_map, *kpe_map;
  int32_t rows_per_copy;
  int32_t warp;  // of the two that share the copies of a tile

  static constexpr bool kIsFlashMla = Traits::kKvCache == KvCache::kFp8FlashMla;
  // Whether a tile comes and goes by the barriers of its first box: its second has none.
  static constexpr bool kHasBarrierPerTile = !Traits::has_barrier(1);

  __device__ static int32_t columns(int32_t box) {
    return box == 0 ? Boxes::kKpeElements : Boxes::kColumns;
  }

  // All copies of a box, or of the tile if it has but one barrier.
  __device__ void announce(uint64_t* full, int32_t box, int32_t copies) const {
    constexpr int32_t kTokenColumns = kHeadDimCkv + kHeadDimKpe;
    int32_t const announced = kHasBarrierPerTile ? kTokenColumns : columns(box);
    int32_t row_bytes = announced * int32_t(sizeof(typename Boxes::Element));
    if (kIsFlashMla && box == 0) row_bytes += kFlashMlaScaleBytes;
    TransactionBarrier::arrive_and_expect_tx(full, copies * rows_per_copy * row_bytes);
  }

  __device__ void copy_group(SharedStorage& shared, uint64_t* full, int32_t slot, int32_t box,
                             int32_t group, TokenPlace const& place) const {
    auto copy = [&](CUtensorMap const* map, void* target, int32_t column) {
      SM90_TMA_LOAD_3D::copy(map, full, kCacheHint, target, column, place.row, place.page);
    };
    auto* const rows = &shared.ring[Boxes::begin(slot) + group * rows_per_copy * columns(box)];
    if constexpr (kIsFlashMla) {
      copy(ckv_map, rows, box == 0 ? kFlashMlaKpeOffset : (box - 1) * Boxes::kColumns);
      if (box == 0) {
        auto* const scales = shared.scales[slot / Boxes::kPerTile][group * rows_per_copy];
        copy(kpe_map, scales, 0);
      }
    } else {
      copy(box == 0 ? kpe_map : ckv_map, rows, box == 0 ? 0 : (box - 1) * Boxes::kColumns);
    }
  }

  // Lane b copies box b, once there is room for all boxes: a token's boxes share a DRAM page. Where
  // a box takes several copies, the warps take turns; the first announces them all.
  __device__ void copy_at_once(SharedStorage& shared, RingPosition<Traits::kRingBoxes> const& ring,
                               TokenPlace const& place, int32_t copies) const {
    int32_t const box = threadIdx.x % 32;
    bool const has_box = box < Boxes::kPerTile;
    auto const slot = ring.after(box % Boxes::kPerTile);
    bool const has_barrier = has_box && Traits::has_barrier(box);
    auto const& barrier = kHasBarrierPerTile ? ring : slot;
    uint64_t* const full = &shared.box_full[barrier.index];
    if (has_box) Barrier::wait(&shared.box_empty[barrier.index], barrier.parity ^ 1);
    __syncwarp();
    if (has_barrier && warp == 0) announce(full, box, copies);
    if constexpr (kHasBarrierPerTile) __syncwarp();  // one lane announced what all copy
    for (int32_t group = warp; group < copies; group += kTmaWarps) {
      TokenPlace const group_place = {__shfl_sync(0xffffffff, place.page, group),
                                      __shfl_sync(0xffffffff, place.row, group)};
      if (has_box) copy_group(shared, full, slot.index, box, group, group_place);
    }
  }

  // The boxes of a stage as soon as there is room for them: kpe, then pairs of ckv's; the warps
  // take turns. A warp takes 200 cycles to announce a copy and to issue it, whatever its size, and
  // it does so while the math waits: hence pairs. Pages of fewer than 64 tokens take two copies a
  // pair. Not unrolled: a short request would wait for the instructions.
  __device__ void copy_as_freed(SharedStorage& shared,
                                RingPosition<Traits::kRingBoxes> const& stage,
                                TokenPlace const& place, int32_t copies) const {
#pragma unroll 1
    for (int32_t pair = warp; pair <= kCkvBoxes / Traits::kBoxesPerPair; pair += kTmaWarps) {
      int32_t const box = pair == 0 ? 0 : Traits::kBoxesPerPair * (pair - 1) + 1;
      Barrier::wait(&shared.box_empty[stage.index + box], stage.parity ^ 1);
      announce_and_copy_pair(shared, stage.index, box, place, copies);
    }
  }

  // The same of a seesaw, whose halves of a stage are free one after the other. The stage is this
  // warp's alone: first the half of the warpgroup that has the scores of its tiles, then the
  // other's and kpe.
  __device__ void copy_halves_as_freed(SharedStorage& shared,
                                       RingPosition<Traits::kRingBoxes> const& stage,
                                       TokenPlace const& place, int32_t copies) const {
#pragma unroll 1
    for (int32_t i = 0; i < kMathWarpgroups; ++i) {
      int32_t const first_box = 1 + (warp ^ i) * kBoxesPerWarpgroup;
      Barrier::wait(&shared.box_empty[stage.index + first_box], stage.parity ^ 1);
#pragma unroll 1
      for (int32_t j = 0; j < kBoxesPerWarpgroup; j += Traits::kBoxesPerPair) {
        announce_and_copy_pair(shared, stage.index, first_box + j, place, copies);
      }
    }
    announce_and_copy_pair(shared, stage.index, 0, place, copies);
  }

  __device__ void announce_and_copy_pair(SharedStorage& shared, int32_t stage, int32_t box,
                                         TokenPlace const& place, int32_t copies) const {
    int32_t const group = threadIdx.x % 32;
    int32_t const boxes = box == 0 ? 1 : Traits::kBoxesPerPair;
    if (group == 0) announce(&shared.box_full[stage + box], box, copies * boxes);
    __syncwarp();
    if (group < copies) copy_pair(shared, stage, box, place);
  }

  // This lane's group of rows of kpe, or of the pair of ckv's boxes that `box` begins.
  __device__ void copy_pair(SharedStorage& shared, int32_t stage, int32_t box,
                            TokenPlace const& place) const {
    bool const is_kpe = box == 0;
    int32_t const boxes = is_kpe ? 1 : Traits::kBoxesPerPair;
    int32_t const boxes_per_copy = rows_per_copy == kTokenTile ? Traits::kBoxesPerPair : 1;
    int32_t const first_row = threadIdx.x % 32 * rows_per_copy;
#pragma unroll 1
    for (int32_t j = 0; j < boxes; j += boxes_per_copy) {
      SM90_TMA_LOAD_4D::copy(is_kpe ? kpe_map : ckv_map, &shared.box_full[stage + box], kCacheHint,
                             &shared.ring[Boxes::begin(stage + box + j) + first_row * columns(box)],
                             0, place.row, is_kpe ? 0 : box - 1 + j, place.page);
    }
  }
};

// Two warps.
template <class Traits>
__device__ void load_cache_by_tma(Params const& params, CUtensorMap const& ckv_map,
                                  CUtensorMap const& kpe_map,
                                  typename Traits::SharedStorage& shared, CtaWork const& work,
                                  GuessedPage const& guessed) {
  int32_t const lane = threadIdx.x % 32;
  int32_t const rows_per_copy = params.rows_per_copy;
  int32_t const groups = kTokenTile / rows_per_copy;
  TileByTma<Traits> const tile_copies = {&ckv_map, &kpe_map, rows_per_copy,
                                         int32_t(threadIdx.x) / 32 % kTmaWarps};

  // In a seesaw, each warp has a stage and with it every second tile of a segment.
  constexpr int32_t kStep = Traits::kIsSeesaw ? kTmaWarps : 1;
  int32_t const first = Traits::kIsSeesaw ? tile_copies.warp : 0;

  SegmentWalk<Traits> walk(params, work);
  RingPosition<Traits::kRingBoxes> ring{first * Traits::Boxes::kPerTile};
  Segment const& segment = walk.segment;
  do {
    auto place_in = [&](int32_t tile) -> TokenPlace {
      bool const has_group = lane < groups && tile < segment.tile_end;
      int32_t const token = tile * kTokenTile + token_of_lane<KvLoader::kTma>(params);
      return has_group ? find_token<Traits::kGuessesPages>(params, segment.request, token, guessed)
                       : TokenPlace{-1, 0};
    };
    TokenPlace next_place = place_in(segment.tile_begin + first);
    for (int32_t tile = segment.tile_begin + first; tile < segment.tile_end; tile += kStep) {
      TokenPlace const place = next_place;
      next_place = place_in(tile + kStep);
      // Groups past the end of the request are not copied: their pages may not exist.
      int32_t const tokens = min(segment.request.kv_len - tile * kTokenTile, kTokenTile);
      int32_t const copies = tokens <= 0 ? 0 : (tokens - 1) / rows_per_copy + 1;
      if constexpr (Traits::kIsSeesaw) {
        tile_copies.copy_halves_as_freed(shared, ring, place, copies);
        ring.parity ^= 1;
      } else if constexpr (Traits::kBoxesPerPair > 0) {
        tile_copies.copy_as_freed(shared, ring, place, copies);
        ring = ring.after(Traits::Boxes::kPerTile);
      } else {
        tile_copies.copy_at_once(shared, ring, place, copies);
        ring = ring.after(Traits::Boxes::kPerTile);
      }
    }
  } while (walk.next());
}

// Swizzled place of 16-byte chunk `chunk` of row `row` in a box, in elements of 2 bytes.
__device__ __forceinline__ int32_t swizzled_chunk(int32_t row, int32_t chunk) {
  return row * kBoxColumns + ((chunk ^ (row & 7)) * 8);
}

// The same, in bytes, where rows have 64 of them: four chunks take part in the swizzle.
__device__ __forceinline__ int32_t swizzled_half_chunk(int32_t row, int32_t chunk) {
  return row * 64 + ((chunk ^ (row / 2 & 3)) * 16);
}

// Two warps. Eight lanes copy the 128 bytes that a token has in a box; a warp has 32 tokens of the
// tile, of which lane l looks up the l-th. A warp issues in order, so there is no more than one
// copy instruction after another: token by token, all boxes at once. The copies themselves
// arrive on box_full when they are complete. They write through the generic proxy: whoever reads
// the box with WGMMA fences first.
template <class Traits>
__device__ void load_cache_by_gather(Params const& params, typename Traits::SharedStorage& shared,
                                     CtaWork const& work, GuessedPage const& guessed) {
  using Boxes = typename Traits::Boxes;
  using Element = typename Boxes::Element;
  constexpr int32_t kTokensAtOnce = 32 / 8;
  int32_t lane = threadIdx.x % 32;
  // Not asked for again in each round, which takes as long as a copy.
  asm volatile("" : "+r"(lane));
  int32_t const chunk = lane % 8, first_token = threadIdx.x / 32 % 2 * 32;
  auto const* const ckv = static_cast<Element const*>(params.ckv) + chunk * Boxes::kChunk;
  auto const* const kpe = static_cast<Element const*>(params.kpe) + chunk * Boxes::kChunk;
  int32_t const first_row = first_token + lane / 8;
  int32_t const first_place = swizzled_chunk(first_row, chunk) / 8 * Boxes::kChunk;
  int32_t const first_half_place = swizzled_half_chunk(first_row, chunk);

  SegmentWalk<Traits> walk(params, work);
  RingPosition<Traits::kRingBoxes> ring;
  uint32_t tile_barrier = 0;    // if tiles come whole
  uint32_t stage_parities = 0;  // in a seesaw, where a segment's tiles have the stages in turns
  Segment const& segment = walk.segment;
  do {
    auto place_in = [&](int32_t tile) {
      int32_t const token = tile * kTokenTile + first_token + lane;
      return find_token<Traits::kGuessesPages>(params, segment.request, token, guessed);
    };
    TokenPlace next_place = place_in(segment.tile_begin);
#pragma unroll 1
    for (int32_t tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
      TokenPlace const place = next_place;
      if (tile + 1 < segment.tile_end) next_place = place_in(tile + 1);
      bool const exists = uint32_t(place.page) < uint32_t(params.num_pages);
      int64_t const page = exists ? place.page : 0, row = exists ? place.row : 0;
      int64_t const ckv_offset = page * params.ckv_stride_page + row * params.ckv_stride_token;
      int64_t const kpe_offset = page * params.kpe_stride_page + row * params.kpe_stride_token;
      uint32_t const existing = __ballot_sync(0xffffffff, exists);

      if constexpr (Traits::kIsSeesaw) {
        int32_t const stage = (tile - segment.tile_begin) % kMathWarpgroups;
        ring = {stage * Boxes::kPerTile, stage_parities >> stage & 1};
        stage_parities ^= 1u << stage;
      }
      bool const is_given_back =
          Traits::kIsSeesaw ? lane % kBoxesPerWarpgroup == 1 : Traits::has_barrier(lane);
      if (lane < Boxes::kPerTile && is_given_back) {
        auto const slot = ring.after(lane);
        Barrier::wait(&shared.box_empty[slot.index], slot.parity ^ 1);
      }
      __syncwarp();
      int32_t ckv_place = first_place, half_place = first_half_place;
#pragma unroll 1
      for (int32_t i = 0; i < 32; i += kTokensAtOnce) {
        int32_t const owner = i + lane / 8;
        bool const token_exists = existing >> owner & 1;
        Element const* const token_ckv = ckv + __shfl_sync(0xffffffff, ckv_offset, owner);
        Element const* const token_kpe = kpe + __shfl_sync(0xffffffff, kpe_offset, owner);
        int32_t const kpe_place = Boxes::kKpeChunks == 8 ? ckv_place : half_place;
#pragma unroll
        for (int32_t box = 0; box < Boxes::kPerTile; ++box) {
          if (box == 0 && chunk >= Boxes::kKpeChunks) continue;
          copy_chunk(shared.ring + Boxes::begin(ring.after(box).index) +
                         (box == 0 ? kpe_place : ckv_place),
                     box == 0 ? token_kpe : token_ckv + (box - 1) * Boxes::kColumns, token_exists);
        }
        if constexpr (Traits::kKvCache == KvCache::kFp8FlashMla) {
          static_assert(kFlashMlaScaleBytes == 16, "a chunk");
          auto* const scales = shared.scales[ring.index / Boxes::kPerTile][first_row + i];
          if (chunk == 0) copy_chunk(scales, token_ckv + kFlashMlaScaleOffset, token_exists);
        }
        // Of the same chunk four rows on: the swizzle's pattern repeats after eight rows.
        static_assert(kTokensAtOnce == 4);
        ckv_place = (ckv_place ^ 4 * Boxes::kChunk) + kTokensAtOnce * Boxes::kColumns;
        half_place = (half_place ^ 2 * 16) + kTokensAtOnce * 64;
      }
      if constexpr (Traits::kTilesComeWhole) {
        cutlass::arch::cpasync_barrier_arrive_noinc(&shared.box_full[tile_barrier]);
        tile_barrier = tile_barrier + 1 == Traits::kTileBarriers ? 0 : tile_barrier + 1;
      } else {
#pragma unroll
        for (int32_t box = 0; box < Boxes::kPerTile; ++box) {
          if (!Traits::has_barrier(box)) continue;
          cutlass::arch::cpasync_barrier_arrive_noinc(&shared.box_full[ring.after(box).index]);
        }
      }
      ring = ring.after(Boxes::kPerTile);
    }
  } while (walk.next());
  // The copies must not outlive the threads that issued them.
  cutlass::arch::cp_async_wait<0>();
}

// For the next call but one, by the CTA whose slots they are.
template <class Traits>
__device__ __forceinline__ void note_used_slots(Params const& params, MergeWork const& merge,
                                                uint32_t used_slots) {
  KeptSchedule& kept = params.kept_schedules[Worker<Traits>(params).cta()];
  kept.used_slots[merge.call % 2] = used_slots;
}

// Begins to copy an eighth of a row tile's row, whatever the queries' strides, into the order of
// the boxes: pe first. Rows that do not exist become zeros.
template <class Traits>
__device__ __forceinline__ void copy_query(Params const& params,
                                           typename Traits::SharedStorage& shared,
                                           Segment const& segment, int32_t row, int32_t chunk) {
  using DType = typename Traits::DType;
  bool const exists = row < segment.num_rows;
  int32_t query, head;
  params.divide_by_heads(query, head, segment.row_begin + (exists ? row : 0));
  query += segment.request.query_begin;
  int64_t const nope = query * params.q_nope_stride_token + head * params.q_nope_stride_head;
  int64_t const pe = query * params.q_pe_stride_token + head * params.q_pe_stride_head;
  auto* destination = &shared.query[swizzled_chunk(row, chunk)];
  auto copy = [&](void const* base, int64_t offset) {
    cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
        destination, static_cast<DType const*>(base) + offset + chunk * 8, exists);
    destination += Traits::kRowTile * kBoxColumns;
  };
  copy(params.q_pe, pe);
#pragma unroll
  for (int32_t box = 0; box < kCkvBoxes; ++box) copy(params.q_nope, nope + box * kBoxColumns);
}

// What thread `thread` of `threads` has to copy of a row tile's queries.
template <class Traits>
__device__ __forceinline__ void copy_queries(Params const& params,
                                             typename Traits::SharedStorage& shared,
                                             Segment const& segment, int32_t thread,
                                             int32_t threads) {
#pragma unroll 1
  for (int32_t row = thread / 8; row < Traits::kRowTile; row += threads / 8) {
    copy_query<Traits>(params, shared, segment, row, thread % 8);
  }
  cutlass::arch::cp_async_fence();
}

// Those that this thread began are there, for WGMMA, too. Of others', the barrier says so behind
// which they have done the same.
__device__ __forceinline__ void await_queries() {
  cutlass::arch::cp_async_wait<0>();
  cutlass::arch::fence_view_async_shared();
}

// At its beginning a CTA waits for the queries of its first row tile. Two warps take 1,600 cycles
// to ask for 64 rows, so threads that have nothing else to do then help.
template <class Traits>
constexpr int32_t kFirstQueryThreads = kQueryLoadThreads + Traits::kQueryHelpers;

template <class Traits>
__device__ __forceinline__ void help_with_first_queries(Params const& params,
                                                        typename Traits::SharedStorage& shared) {
  if constexpr (Traits::kQueryHelpers > 0) {
    int32_t const helper = int32_t(threadIdx.x) - Traits::kFirstQueryHelper;
    if (uint32_t(helper) >= uint32_t(Traits::kQueryHelpers)) return;
    copy_queries<Traits>(params, shared, shared.work.segment, kQueryLoadThreads + helper,
                         kFirstQueryThreads<Traits>);
  }
}

// Two warps. With a row tile's queries goes the segment they belong to, and what the merge has to
// know of it: behind the barrier of the next segment, or of the end. At last, while the math is at
// its last products and nothing is copied any more, they empty the places of the next call's parts.
template <class Traits>
__device__ void load_queries(Params const& params, typename Traits::SharedStorage& shared,
                             CtaWork const& work, bool has_fold_lists) {
  int32_t const thread = threadIdx.x % kQueryLoadThreads;
  SegmentWalk<Traits> walk(params, work);
  Segment& segment = walk.segment;
  bool has_segment = true;
  uint32_t used_slots = 0;
  for (uint32_t number = 0;; ++number) {
    if (!has_segment) segment.tile_end = segment.tile_begin;  // the end
    Barrier::wait(&shared.query_empty, number & 1 ^ 1);
    if (has_segment) {
      int32_t const threads = number == 0 ? kFirstQueryThreads<Traits> : kQueryLoadThreads;
      copy_queries<Traits>(params, shared, segment, thread, threads);
    }
    if (thread == 0) {
      shared.segments[number & 1] = segment;
      if (has_segment) walk.describe_split(shared.merge.split_row_tiles);
    }
    await_queries();
    Barrier::arrive(&shared.query_full);
    if (!has_segment) break;
    if constexpr (kPollsParts<Traits>) {
      if (number == 0 && thread == 0) fence_beginning();
      if (!segment.is_whole() && !is_batch_invariant(params)) {
        used_slots |= 1 << segment.begins_row_tile;
        if (thread == 0) look_who_gave_up(params, shared.merge, segment.begins_row_tile);
      }
    }
    if constexpr (Traits::kFolds) {
      if (folds<Traits>(params) && !has_fold_lists && thread < 32) {
        list_pieces<Traits>(params, shared, segment);
      }
    }
    has_segment = walk.next();
  }
  if constexpr (kPollsParts<Traits>) {
    if (thread == 0) note_used_slots<Traits>(params, shared.merge, used_slots);
    empty_parts_of_next_call<Traits>(params, shared.merge, thread, kQueryLoadThreads);
  }
}

}  // namespace etap
