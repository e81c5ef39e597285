/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Sizes, arguments and the shared-memory plan of the ETAP MLA kernels.
 */
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/fast_math.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/tensor.hpp>

#include "etap_mla_fold_tree.h"

namespace etap {

using namespace cute;

constexpr int kHeadDimCkv = 512;
constexpr int kHeadDimKpe = 64;
constexpr int kTokenTile = 64;  // tokens on WGMMA's M, which is 64 for every shape

// A box is [64 tokens x 64 columns], one 128-byte swizzled row a token: the unit of copying and of
// the shared-memory ring. A token tile is nine boxes: kpe first, because only S = K Q^T needs it
// and its place is free again soonest, then the eight of ckv.
constexpr int kBoxColumns = 64;
constexpr int kBoxesPerTile = (kHeadDimCkv + kHeadDimKpe) / kBoxColumns;
constexpr int kCkvBoxes = kHeadDimCkv / kBoxColumns;
constexpr int kBoxElements = kTokenTile * kBoxColumns;

constexpr int kWarpgroupThreads = 128;
constexpr int kMathWarpgroups = 2;
constexpr int kMathThreads = kMathWarpgroups * kWarpgroupThreads;
constexpr int kMathWarps = kMathThreads / 32;
constexpr int kThreads = kMathThreads + kWarpgroupThreads;
constexpr int kBoxesPerWarpgroup = kCkvBoxes / kMathWarpgroups;  // of d_v: 256 columns each

// Warps of the producer warpgroup: 0 and 1 load the cache, 2 and 3 load the queries.
constexpr int kCacheThreads = 64;
constexpr int kTmaWarps = 2;  // they share the copies of a tile
constexpr int kGatherThreads = kCacheThreads;
constexpr int kQueryLoadThreads = 64;

// Barriers among math threads, in CUTLASS's numbering of user barriers.
constexpr uint32_t kWarpgroupBarrier = 0;  // and 1: one for each math warpgroup
constexpr uint32_t kMathBarrier = 2;

// Of all math threads.
__device__ __forceinline__ void sync_math() {
  cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
}

// The same; returns whether the value is true of any. CUTLASS has no such barrier.
__device__ __forceinline__ bool sync_math_or(bool value) {
  constexpr auto kFirst = uint32_t(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier);
  uint32_t any;
  asm volatile(
      "{ .reg .pred own, any; setp.ne.u32 own, %1, 0; "
      "barrier.cta.red.or.aligned.pred any, %2, %3, own; selp.u32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(uint32_t(value)), "n"(kFirst + kMathBarrier), "n"(kMathThreads)
      : "memory");
  return any != 0;
}

constexpr int kSharedMemoryLimit = 227 * 1024;

// kTma: bulk tensor copies; a page must hold whole groups of 8 rows (one swizzle atom).
// kGather: 16-byte asynchronous copies, token by token, for every other page size.
enum class KvLoader { kTma, kGather };

// What the cache stores. kSame: the type of the queries. kFp8: e4m3 with a scale for all of ckv and
// one for all of kpe. kFp8FlashMla: 656 bytes a token: 512 e4m3, the fp32 scales of each 128 of
// them, 64 bf16 of kpe.
enum class KvCache { kSame, kFp8, kFp8FlashMla };

// A token of kFp8FlashMla, in bytes: codes, scales, kpe.
constexpr int kFlashMlaTokenBytes = 656;
constexpr int kFlashMlaScaleOffset = kHeadDimCkv;
constexpr int kFlashMlaScaleBytes = 16;
constexpr int kFlashMlaKpeOffset = kFlashMlaScaleOffset + kFlashMlaScaleBytes;

// How the cache lies in the ring: boxes of [64 tokens x kColumns], 128 bytes a token. A token tile
// is a box of kpe, which has 64 columns of any type, in all kKpeElements of Element, and then those
// of ckv.
template <typename Element_, int kColumns_, int kKpeElements_ = kHeadDimKpe>
struct CacheBoxes {
  using Element = Element_;
  static constexpr int kKpeElements = kKpeElements_;
  static constexpr int kColumns = kColumns_;
  static_assert(kColumns * sizeof(Element) == 128, "rows of one 128-byte swizzle");
  static constexpr int kCkv = kHeadDimCkv / kColumns;
  static constexpr int kPerTile = kCkv + 1;
  static constexpr int kElements = kTokenTile * kColumns;
  static constexpr int kChunk = 16 / int(sizeof(Element));  // elements of a 16-byte chunk
  static constexpr int kKpeChunks = kKpeElements / kChunk;  // of a token, in a row of 8

  // Where the box in a slot of the ring begins.
  __device__ static constexpr int32_t begin(int32_t slot) { return slot * kElements; }
};

// One request, as the kernel sees it.
struct Request {
  int32_t query_begin;
  int32_t query_len;
  int32_t page_begin;  // offset into kv_indices
  int32_t kv_len;
};

// One run of token tiles of one row tile: what a CTA does between loading Q and writing O. Aligned
// for copies in words of 16 bytes.
struct alignas(16) Segment {
  Request request;
  int32_t row_begin;  // first packed row of the row tile, within the request
  int16_t num_rows;   // rows of it that exist
  bool begins_row_tile, ends_row_tile;
  int32_t packed_row;  // of its first row: query * num_heads + head over the whole batch
  int32_t tile_begin, tile_end;
  int32_t masked_tile_begin;  // from here on some row may not see all of a tile
  int32_t slot;               // of the workspace, for its partial result
  int32_t part_tiles;         // FixedSplit, in batch-invariant calls

  __device__ int32_t num_tiles() const { return tile_end - tile_begin; }
  __device__ bool is_whole() const { return begins_row_tile && ends_row_tile; }
};
static_assert(sizeof(Segment) == 48, "short calls wait for copies of it");

// What one CTA does: a range of the line. Its first segment, and where the walk over the others
// stands behind that one.
struct alignas(16) CtaWork {
  Partition partition;
  int32_t end;               // of the range
  int32_t position;          // behind the segment
  int32_t request_begin;     // of the segment's request on the line
  int32_t request_index;     // of that request
  int32_t row_tiles_before;  // the request's
  int32_t row_tiles;         // of the whole call
  int32_t granule_leaves;    // FoldPartition, in batch-invariant calls that fold
  int32_t has_segment;       // 0: there is nothing to do
  Segment segment;
};

// Of what a schedule depends on beside the requests.
constexpr int kScheduleKeyWords = 12;

// Of a row tile that is split in a call that folds: the pieces, in the order of their tokens, which
// are joined to groups (quads, or one piece each where that is more than a quad) and these to
// blocks. The leading blocks, which are one piece, count as a block of one group.
struct alignas(16) FoldPieceList {
  struct Piece {
    int16_t slot;
    bool ends_group, ends_block;
  };
  int32_t num_pieces, num_blocks;

  __device__ int32_t num_groups() const { return begin_of_block[num_blocks]; }

  int16_t begin_of_block[kMostBlocks + 1];                // its first group
  int16_t begin_of_group[kMostLeaves / kQuadLeaves + 1];  // its first piece
  Piece pieces[kMostLeaves];
};
constexpr int32_t kMostSms = 144;  // of a GH100, the chip of sm_90a; as many CTAs have slots
static_assert(kMostSms * count_fold_slots(kMostLeaves) <= INT16_MAX, "Piece::slot has 16 bits");
static_assert(sizeof(FoldPieceList) % sizeof(int4) == 0, "lists are copied in words of 16 bytes");

// What a CTA keeps of a call for the next one, which is like it but for the layer, most of the
// time. Larger batches than that of one request a thread are not kept.
struct alignas(128) KeptSchedule {
  int32_t key[kScheduleKeyWords];
  CtaWork work;
  alignas(128) int4 offsets[kThreads];  // of each request: its queries' and pages' begin and end
  int32_t kv_len[kThreads];
  FoldPieceList fold_lists[2];  // as SharedStorage has them

  // The number of the call, the same in all CTAs; and of the call behind the one that the CTA with
  // this one's slots has begun. Then, of the last even and the last odd call: which of the two
  // slots were used (etap_mla_partial.cuh); and of the merge of the row tile that goes on behind
  // this CTA's range, kNobody plus those who have come to it, if parts are counted, else kNobody,
  // or that someone gave up.
  alignas(128) uint32_t call;
  uint32_t begun;
  uint32_t used_slots[2];
  uint32_t merges[2];
};
constexpr uint32_t kNobody = 0xffffffff;  // as before the first call

// Sums of each warp, while the schedule is made: tiles, row tiles, longest row tile.
struct ScheduleScratch {
  alignas(16) int4 warps[kThreads / 32];
};

// Of a row over the tiles so far, base 2, and 2^(maximum before this tile - maximum).
struct RunningMax {
  float max, factor;
};

// A split row tile; num_parts is 0 for none.
struct alignas(16) MergeDescriptor {
  int32_t num_parts;
  int32_t num_rows;    // rows of the tile that exist
  int32_t packed_row;  // of its first row: query * num_heads + head over the whole batch
};

// `number`: the CTA that has the first of the parts, of which CTAs c, c + 1, ... hold one each; in
// a batch-invariant call, the row tile.
struct SplitRowTile {
  MergeDescriptor descriptor;
  int32_t number;
  int32_t part;   // this CTA's
  int32_t begin;  // of the row tile on the line
  int32_t tiles;
};

// CTAs that do their share of a merge; those before `end` from `first` on. If parts are counted,
// whether some refer to the workspace.
struct MergeShares {
  int32_t first, end;
  bool some_refer;
};

// What a CTA's threads tell each other of the merge.
struct MergeWork {
  SplitRowTile split_row_tiles[2];  // one that began in an earlier CTA, one that goes on in a later
  uint32_t call;                    // its number
  // If parts are polled: this CTA's slots that the call before used; and, of each row tile, whether
  // parts have been missing for too long for another CTA, or for this one, and will all come.
  uint32_t slots_used_before;
  bool others_gave_up[2], waits_on[2];
  // If they are counted: of each row tile, the shares that this CTA does; and whether a part that
  // it leaves refers to the workspace.
  MergeShares shares[2];
  bool refers_to_workspace;
};

struct Params {
  // First what the schedule needs: every CTA waits for these constants before anything else.
  int32_t const* qo_indptr;   // [batch + 1]
  int32_t const* kv_indptr;   // [batch + 1], in pages
  int32_t const* kv_len_arr;  // [batch], in tokens
  int32_t const* kv_indices;  // [num_kv_indices]
  int32_t num_kv_indices;
  int32_t batch;
  int32_t requests_per_thread;   // ceil(batch / kThreads)
  KeptSchedule* kept_schedules;  // [num_ctas], ones in all bits before the first call
  int32_t schedule_key[kScheduleKeyWords];
  int32_t fixed_split_tiles;  // of a part, in batch-invariant calls; 0 in others
  int32_t most_row_tiles;     // FixedSplitBound, in batch-invariant calls that do not fold
  int32_t most_parts;
  int32_t fold_slots;  // of a CTA, in those that do
  int32_t log_row_tiles_together;
  int32_t num_heads;
  int32_t total_queries;
  int32_t num_pages;
  int32_t page_size;
  int32_t rows_per_copy;                    // kTma: gcd(page_size, 64)
  cutlass::FastDivmod divide_by_heads;      // packed row -> query, head
  cutlass::FastDivmod divide_by_page_size;  // token -> page of the request, row in the page

  void const* q_nope;                               // [total_queries, num_heads, 512]
  void const* q_pe;                                 // [total_queries, num_heads, 64]
  void const* ckv;                                  // [num_pages, page_size, 512]
  void const* kpe;                                  // [num_pages, page_size, 64]
  int64_t q_nope_stride_token, q_nope_stride_head;  // strides in elements
  int64_t q_pe_stride_token, q_pe_stride_head;
  int64_t ckv_stride_page, ckv_stride_token;
  int64_t kpe_stride_page, kpe_stride_token;

  float ckv_scale;           // of an fp8 cache: what its codes are multiplied with
  float kpe_over_ckv_scale;  // and those of kpe, over that
  float scale_log2;          // sm_scale * log2(e): the softmax works in powers of two
  float lse_factor;          // 1, or ln(2) for an LSE to base e
  bool causal;

  void* out;  // [total_queries, num_heads, 512]
  int64_t out_stride_token, out_stride_head;
  float* lse;  // [total_queries, num_heads], or null

  // A CTA leaves at most two partial results: the end of a row tile that began in an earlier CTA
  // (slot 2c) and the beginning of one that ends in a later CTA (slot 2c + 1).
  void* parts;  // [sets of places, slots], each PartPlaces (etap_mla_partial.cuh)

  // Workspace: those of batch-invariant calls, where part p of row tile r has slot r * most_parts +
  // p; in those that fold, CTA c leaves its pieces in fold_slots slots from c * fold_slots on, of
  // which the last kFoldSlotsOfBeginning are for beginnings. In others, numbers that do not suit
  // fp16.
  float* partial_out;                  // [slots, 512 * row_tile]
  float2* partial_ml;                  // [slots, row_tile]: running maximum (base 2) and sum
  MergeDescriptor* merge_descriptors;  // [most_row_tiles]
};

// Others must not pay for what only these calls do: their branches are the unlikely ones.
__device__ __forceinline__ bool is_batch_invariant(Params const& params) {
  return __builtin_expect(params.fixed_split_tiles > 0, 0);
}

// Whether a batch-invariant call joins partial results in registers (etap_mla_fold_tree.h).
template <class Traits>
__device__ __forceinline__ bool folds(Params const& params) {
  return Traits::kFolds && is_batch_invariant(params);
}

// Where every request has an even number of row tiles of 64, two CTAs work together, each on one of
// two row tiles: they read the same tokens at the same time, which then come from DRAM once.
template <class Traits>
__device__ __forceinline__ int32_t log_row_tiles_together(Params const& params) {
  return Traits::kPairsRowTiles ? params.log_row_tiles_together : 0;
}

template <typename DType_, int kRowTile_, KvLoader kKvLoader_>
struct EtapMlaTraits {
  using DType = DType_;
  using Boxes = CacheBoxes<DType, kBoxColumns>;
  static constexpr KvLoader kKvLoader = kKvLoader_;
  static constexpr KvCache kKvCache = KvCache::kSame;
  static constexpr int kRowTile = kRowTile_;  // packed rows (query x head) on WGMMA's N
  static_assert(kRowTile == 8 || kRowTile == 16 || kRowTile == 32,
                "256 x 2 row_tile floats of accumulators must fit a warpgroup's registers");

  // In the schedule, before each of the row tiles of a call where they differ in length: with so
  // many, calls were fastest (scripts/TUNING.md).
  static constexpr int kEmptyPlaces = kRowTile == 32 ? 2 : 1;
  static constexpr bool kGuessesPages = true;
  static constexpr bool kPairsRowTiles = false;
  // Batch-invariant calls: registers for three outputs, the leaf's, the quad's and the block's; the
  // row tile's lies where low parts of P would make theirs.
  static constexpr bool kFolds = kRowTile <= 16;
  static constexpr int kSumSlots = kFolds ? 2 : 1;

  static constexpr int kCtaThreads = kThreads;
  static constexpr int kQueryWarps = kMathWarps;
  static constexpr int kQueryHelpers = 0;

  // Of the row tiles that MergeWork has.
  struct NoFoldPieces {};
  struct FoldPieces {
    FoldPieceList lists[2];
  };
  using FoldedPieces = std::conditional_t<kFolds, FoldPieces, NoFoldPieces>;

  // Registers a thread, after the producer gave some of its share to the math warpgroups.
  static constexpr int kMathRegisters = 216;
  static constexpr int kProducerRegisters = 3 * 168 - kMathWarpgroups * kMathRegisters;
  static_assert(kThreads == 3 * 128, "a CTA of 384 threads starts with 168 registers a thread");

  // P in a high and a low part of DType adds nothing to the error of the result. The parts stand
  // side by side on N, where an instruction is bound by reading A and the second costs little.
  static constexpr int kPvColumns = 2 * kRowTile;

  // Longer requests have the high part alone. Rounding P shows less the more tokens share the
  // weight, while the second part takes time (15 % of a call with 32 rows) and power, which bounds
  // the clock in long runs. Depends on the request alone, not on its batch.
  static constexpr int kLongestSplitPRequest = kRowTile == 32 ? 512 : 1024;

  // Rows that one thread sees of an accumulator: 2 neighbours in every 8 columns.
  static constexpr int kRowsPerThread = kRowTile / 4;

  // Shared-memory operands, all 128-byte swizzled. One box is seen in three ways: as K [tokens x
  // columns], transposed as V^T [columns x tokens], and, once S^T is there, the box of kpe takes P
  // [rows, high parts then low parts, x tokens].
  static constexpr int kRingBoxes = [] {
    int const query = kRowTile * (kHeadDimCkv + kHeadDimKpe) * int(sizeof(DType));
    int const sums = kSumSlots * kMathWarpgroups * kRowTile * 4 * int(sizeof(float));
    int const statistics = kRowTile * (2 * int(sizeof(RunningMax)) + 4 * int(sizeof(float)));
    int const fixed = query + sums + statistics + int(2 * sizeof(Segment) + sizeof(CtaWork)) +
                      int(sizeof(MergeWork) + sizeof(FoldedPieces)) + 64;
    return (kSharedMemoryLimit - fixed) / (kBoxElements * int(sizeof(DType)) + 16);
  }();
  static_assert(kRingBoxes > 2 * kBoxesPerTile, "the ring must hold a tile in work and the next");
  static constexpr int kRingBytes = kRingBoxes * kBoxElements * int(sizeof(DType));

  static constexpr bool kIsSeesaw = false;
  static constexpr int kBoxesPerPair = 0;  // boxes come and go one by one
  __device__ static constexpr bool has_barrier(int32_t /*box*/) { return true; }
  // But a gathered tile comes as a whole: tiles have the barriers of the first boxes in turns. The
  // ring never has room for a tile before all have read the one whose turn it was last.
  static constexpr bool kTilesComeWhole = kKvLoader == KvLoader::kGather;
  static constexpr int kTileBarriers = 3;
  static_assert(kRingBoxes <= kTileBarriers * kBoxesPerTile);

  using KAtom = GMMA::Layout_K_SW128_Atom<DType>;
  using LayoutK =
      decltype(tile_to_shape(KAtom{}, Shape<Int<kTokenTile>, Int<kBoxColumns>, Int<kRingBoxes>>{}));
  using LayoutV =
      decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<DType>{},
                             Shape<Int<kBoxColumns>, Int<kTokenTile>, Int<kRingBoxes>>{}));
  using LayoutQ = decltype(tile_to_shape(
      KAtom{}, Shape<Int<kRowTile>, Int<kBoxColumns>, Int<kBoxesPerTile>>{}));
  using LayoutP = LayoutK;  // of which the first rows are used

  using MmaQk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<DType, DType, float, Shape<Int<kTokenTile>, Int<kRowTile>, _16>,
                           GMMA::Major::K, GMMA::Major::K>()));
  template <int kColumns>
  using MmaPv = decltype(make_tiled_mma(
      GMMA::ss_op_selector<DType, DType, float, Shape<Int<kBoxColumns>, Int<kColumns>, _16>,
                           GMMA::Major::MN, GMMA::Major::K>()));

  struct SharedStorage {
    alignas(1024) DType ring[kRingBoxes * kBoxElements];
    alignas(1024) DType query[cosize_v<LayoutQ>];
    alignas(16) float row_sum[kSumSlots][kMathWarpgroups][kRowTile][4];  // of each warp, at an end
    RunningMax running_max[2][kRowTile];                                 // [tile number % 2]
    union {
      alignas(16) float tile_max[kRowTile][4];  // of each warp of the tile's owner
      ScheduleScratch schedule;                 // before the first tile
    };
    uint64_t box_full[kRingBoxes], box_empty[kRingBoxes];
    uint64_t query_full, query_empty;
    Segment segments[2];  // [segment number % 2]; one without tiles is the end
    CtaWork work;
    MergeWork merge;
    FoldedPieces fold;
  };
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

}  // namespace etap
