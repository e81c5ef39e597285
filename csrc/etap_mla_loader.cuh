/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The producer warpgroup: copies cache boxes into the shared-memory ring and queries beside it.
 */
#pragma once

#include <cutlass/arch/memory_sm80.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "etap_mla_schedule.cuh"

namespace etap {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// A place in the ring of boxes and the parity of the lap it belongs to.
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

__device__ __forceinline__ TokenPlace find_token(Params const& params, Request const& request,
                                                 int32_t token) {
  if (token >= request.kv_len) return {-1, 0};
  int32_t const page_in_request = token / params.page_size;
  return {params.kv_indices[request.page_begin + page_in_request],
          token - page_in_request * params.page_size};
}

// One warp. Lane g copies the g-th group of rows of each box; a group lies within one page.
template <class Traits>
__device__ void load_cache_by_tma(Params const& params, CUtensorMap const& ckv_map,
                                  CUtensorMap const& kpe_map,
                                  typename Traits::SharedStorage& shared, CtaWork const& work) {
  int32_t const lane = threadIdx.x % 32;
  int32_t const rows_per_copy = params.rows_per_copy;
  int32_t const token_of_lane =
      lane < kTokenTile / rows_per_copy ? lane * rows_per_copy : kTokenTile;
  uint32_t const group_bytes = rows_per_copy * kBoxColumns * sizeof(typename Traits::DType);

  SegmentWalk<Traits::kRowTile> walk(params, work);
  RingPosition<Traits::kRingBoxes> ring;
  Segment const& segment = walk.segment;
  while (walk.next()) {
    auto place_in = [&](int32_t tile) -> TokenPlace {
      bool const has_group = token_of_lane < kTokenTile && tile < segment.tile_end;
      return has_group ? find_token(params, segment.request, tile * kTokenTile + token_of_lane)
                       : TokenPlace{-1, 0};
    };
    TokenPlace next_place = place_in(segment.tile_begin);
    for (int32_t tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
      // Groups past the end of the request are not copied: their pages may not exist.
      int32_t const tokens = segment.request.kv_len - tile * kTokenTile;
      bool const copies = token_of_lane < min(tokens, kTokenTile);
      uint32_t const bytes = __popc(__ballot_sync(0xffffffff, copies)) * group_bytes;
      TokenPlace const place = next_place;
      next_place = place_in(tile + 1);

#pragma unroll 1
      for (int32_t box = 0; box < kBoxesPerTile; ++box) {
        auto const slot = ring.after(box);
        Barrier::wait(&shared.box_empty[slot.index], slot.parity ^ 1);
        if (lane == 0) {
          TransactionBarrier::arrive_and_expect_tx(&shared.box_full[slot.index], bytes);
        }
        __syncwarp();
        if (copies) {
          bool const is_kpe = box == 0;
          SM90_TMA_LOAD_3D::copy(
              is_kpe ? &kpe_map : &ckv_map, &shared.box_full[slot.index],
              static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL),
              &shared.ring[slot.index * kBoxElements + token_of_lane * kBoxColumns],
              is_kpe ? 0 : (box - 1) * kBoxColumns, place.row, place.page);
        }
      }
      ring = ring.after(kBoxesPerTile);
    }
  }
}

// Swizzled place of 16-byte chunk `chunk` of row `row` in a box, in elements of 2 bytes.
__device__ __forceinline__ int32_t swizzled_chunk(int32_t row, int32_t chunk) {
  return row * kBoxColumns + ((chunk ^ (row & 7)) * 8);
}

// Two warps. Eight lanes copy the 128 bytes that a token has in a box; a warp has 32 tokens of the
// tile, of which lane l looks up the l-th.
//
// A copy is announced (box_full) a few boxes later, when it has certainly arrived: each thread
// waits for its own copies and fences them for the tensor cores, which read shared memory through
// the asynchronous proxy. While the ring is full, everything issued is announced first: the math
// warpgroups may be waiting for just that.
template <class Traits>
class GatherLoader {
  using DType = typename Traits::DType;
  using Ring = RingPosition<Traits::kRingBoxes>;
  static constexpr int kBoxesInFlight = 8;

 public:
  __device__ GatherLoader(Params const& params, typename Traits::SharedStorage& shared)
      : params_(params), shared_(shared), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32 % 2) {}

  __device__ void run(CtaWork const& work) {
    SegmentWalk<Traits::kRowTile> walk(params_, work);
    Segment const& segment = walk.segment;
    while (walk.next()) {
      int32_t const token = warp_ * 32 + lane_;
      auto place_in = [&](int32_t tile) {
        return find_token(params_, segment.request, tile * kTokenTile + token);
      };
      TokenPlace next_place = place_in(segment.tile_begin);
      for (int32_t tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
        TokenPlace const place = next_place;
        if (tile + 1 < segment.tile_end) next_place = place_in(tile + 1);
        copy_tile(place);
      }
    }
    announce_all();
  }

 private:
  __device__ void copy_tile(TokenPlace const& place) {
    bool const exists = uint32_t(place.page) < uint32_t(params_.num_pages);
    int64_t const page = exists ? place.page : 0;
    int64_t const row = exists ? place.row : 0;
    int64_t const ckv_offset = page * params_.ckv_stride_page + row * params_.ckv_stride_token;
    int64_t const kpe_offset = page * params_.kpe_stride_page + row * params_.kpe_stride_token;
    uint32_t const exists_mask = __ballot_sync(0xffffffff, exists);
#pragma unroll 1
    for (int32_t box = 0; box < kBoxesPerTile; ++box) {
      wait_for_place();
      bool const is_kpe = box == 0;
      auto const* source = static_cast<DType const*>(is_kpe ? params_.kpe : params_.ckv) +
                           (is_kpe ? 0 : (box - 1) * kBoxColumns) + lane_ % 8 * 8;
      int64_t const offset = is_kpe ? kpe_offset : ckv_offset;
      DType* const destination = &shared_.ring[head_.index * kBoxElements];
#pragma unroll 4
      for (int32_t i = 0; i < 8; ++i) {
        int32_t const owner = i * 4 + lane_ / 8;
        int64_t const token_offset = __shfl_sync(0xffffffff, offset, owner);
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            destination + swizzled_chunk(warp_ * 32 + owner, lane_ % 8), source + token_offset,
            exists_mask >> owner & 1);
      }
      cutlass::arch::cp_async_fence();
      head_ = head_.after(1);
      if (++in_flight_ > kBoxesInFlight) {
        cutlass::arch::cp_async_wait<kBoxesInFlight>();
        announce(1);
      }
    }
  }

  __device__ void wait_for_place() {
    uint64_t* const empty = &shared_.box_empty[head_.index];
    if (!__all_sync(0xffffffff, Barrier::try_wait(empty, head_.parity ^ 1))) {
      announce_all();
      Barrier::wait(empty, head_.parity ^ 1);
    }
  }

  __device__ void announce(int32_t boxes) {
    cutlass::arch::fence_view_async_shared();
    for (int32_t i = 0; i < boxes; ++i) {
      Barrier::arrive(&shared_.box_full[tail_.index]);
      tail_ = tail_.after(1);
    }
    in_flight_ -= boxes;
  }

  __device__ void announce_all() {
    cutlass::arch::cp_async_wait<0>();
    announce(in_flight_);
  }

  Params const& params_;
  typename Traits::SharedStorage& shared_;
  int32_t const lane_, warp_;
  Ring head_, tail_;  // next box to copy, next box to announce
  int32_t in_flight_ = 0;
};

// Two warps. Loads the row tile's queries, whatever their strides, into the order of the boxes:
// pe first. Rows that do not exist become zeros.
template <class Traits>
__device__ void load_queries(Params const& params, typename Traits::SharedStorage& shared,
                             CtaWork const& work) {
  using DType = typename Traits::DType;
  constexpr int kRowsPerPass = kQueryLoadThreads / 8;
  int32_t const thread = threadIdx.x % kQueryLoadThreads;
  int32_t const chunk = thread % 8;

  SegmentWalk<Traits::kRowTile> walk(params, work);
  Segment const& segment = walk.segment;
  uint32_t parity = 0;
  while (walk.next()) {
    Barrier::wait(&shared.query_empty, parity ^ 1);
#pragma unroll 1
    for (int32_t row = thread / 8; row < Traits::kRowTile; row += kRowsPerPass) {
      bool const exists = row < segment.num_rows;
      int32_t const packed_row = segment.row_begin + (exists ? row : 0);
      int64_t const query = segment.request.query_begin + packed_row / params.num_heads;
      int64_t const head = packed_row % params.num_heads;
      auto const* nope = static_cast<DType const*>(params.q_nope) +
                         query * params.q_nope_stride_token + head * params.q_nope_stride_head;
      auto const* pe = static_cast<DType const*>(params.q_pe) +
                       query * params.q_pe_stride_token + head * params.q_pe_stride_head;
      DType* const destination = &shared.query[swizzled_chunk(row, chunk)];
#pragma unroll
      for (int32_t box = 0; box < kBoxesPerTile; ++box) {
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            destination + box * Traits::kRowTile * kBoxColumns,
            (box == 0 ? pe : nope + (box - 1) * kBoxColumns) + chunk * 8, exists);
      }
    }
    cutlass::arch::cp_async_fence();
    cutlass::arch::cp_async_wait<0>();
    cutlass::arch::fence_view_async_shared();
    Barrier::arrive(&shared.query_full);
    parity ^= 1;
  }
}

}  // namespace etap
