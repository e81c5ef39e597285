/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Sizes and the shared-memory plan of the kernels that read an fp8 (e4m3) cache.
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

// Where O^T = V^T P^T has operands of e4m3: Fp8TileTraits.
template <KvCache kKvCache, int kRowTile>
constexpr bool kMultipliesCodes = kKvCache == KvCache::kFp8 && kRowTile <= 16;

// The operands of every WGMMA are fp16, of which e4m3 is a subset: the cache is converted without
// an error on its way from shared memory to the registers of WGMMA's A operand.
template <typename DType_, int kRowTile_, KvLoader kKvLoader_, KvCache kKvCache_>
struct EtapMlaFp8Traits {
  using DType = DType_;  // of queries and output
  using Operand = cutlass::half_t;
  static_assert(sizeof(DType) == sizeof(Operand), "queries are converted in place");
  static constexpr KvLoader kKvLoader = kKvLoader_;
  static constexpr KvCache kKvCache = kKvCache_;
  static constexpr bool kHasTokenScales = kKvCache == KvCache::kFp8FlashMla;
  static constexpr int kRowTile = kRowTile_;  // packed rows (query x head) on WGMMA's N
  static_assert(kRowTile == 8 || kRowTile == 16 || kRowTile == 32 || kRowTile == 64,
                "an accumulator of 256 x row_tile floats must fit a warpgroup's registers");
  static_assert(kRowTile <= 32 || !kHasTokenScales,
                "three accumulators of scores must fit, too, and P once for each scale");

  // A box is [64 tokens x 128 columns], again one 128-byte swizzled row a token; that of kpe has 64
  // columns: of e4m3, for which it uses half of its place, or of bf16.
  using KpeElement = cutlass::bfloat16_t;  // if kHasTokenScales
  using Boxes =
      CacheBoxes<uint8_t, 128, kHeadDimKpe*(kHasTokenScales ? int(sizeof(KpeElement)) : 1)>;

  static constexpr int kEmptyPlaces = kRowTile == 64 ? 4 : 2;  // as in EtapMlaTraits
  static constexpr bool kGuessesPages = kRowTile < 64;         // slower, and would spill
  static constexpr bool kPairsRowTiles = false;                // gains 1 %, and would spill
  static constexpr bool kTilesComeWhole = false;
  static constexpr bool kFolds = false;  // accumulators leave no registers for it

  static constexpr int kCtaThreads = kThreads;
  static constexpr int kQueryWarps = kMathWarps;
  static constexpr int kQueryHelpers = kRowTile == 64 ? kMathThreads : 0, kFirstQueryHelper = 0;

  // Registers a thread, after the producer gave some of its share to the math warpgroups.
  static constexpr int kMathRegisters = kRowTile == 64 ? 224 : 216;
  static constexpr int kProducerRegisters = 3 * 168 - kMathWarpgroups * kMathRegisters;

  static constexpr int kRowsPerThread = kRowTile / 4;
  static constexpr int kScaleBytes = kTokenTile * Boxes::kCkv * int(sizeof(float));  // of a tile

  // WGMMAs (16 columns or tokens each) whose A operand is converted while the group before them
  // runs; 64 rows leave no registers for more.
  static constexpr int kGroupSteps = kRowTile == 64 ? 2 : 4;
  static constexpr int kQueryBoxes = (kHeadDimCkv + kHeadDimKpe) / kBoxColumns;

  using KAtom = GMMA::Layout_K_SW128_Atom<Operand>;
  using LayoutQ =
      decltype(tile_to_shape(KAtom{}, Shape<Int<kRowTile>, Int<kBoxColumns>, Int<kQueryBoxes>>{}));
  // P of each tile of the pair, times each scale of its tokens. The products are rounded to fp16,
  // whatever weight a token has; where the result is of fp16, too, they have a second part.
  static constexpr int kProbabilityCopies = kHasTokenScales ? Boxes::kCkv : 1;
  static constexpr int kProbabilityParts =
      kHasTokenScales && std::is_same_v<DType, Operand> ? 2 : 1;
  using LayoutP = decltype(tile_to_shape(
      KAtom{}, Shape<Int<kRowTile>, Int<kTokenTile>,
                     Int<kMathWarpgroups * kProbabilityCopies * kProbabilityParts>>{}));

  // Of bf16, so that they hold the pe part of a query exactly, if kHasTokenScales.
  static constexpr int kQueryPeParts = std::is_same_v<DType, KpeElement> ? 1 : 2;

  static constexpr int kRingBoxes = [] {
    int const operands = (cosize_v<LayoutQ> + cosize_v<LayoutP>)*int(sizeof(Operand));
    int const statistics = (4 + kMathWarps) * kRowTile * int(sizeof(float));
    int const fixed = operands + statistics +
                      int(2 * sizeof(Segment) + sizeof(CtaWork) + sizeof(ScheduleScratch)) +
                      int(sizeof(MergeWork)) + 64;
    int const box = Boxes::kElements + 16;
    if (!kHasTokenScales) return (kSharedMemoryLimit - fixed) / box;
    int const low_part = 1024 + (kQueryPeParts - 1) * kRowTile * kHeadDimKpe * 2;
    return (kSharedMemoryLimit - fixed - low_part - kScaleBytes) /
           (box + kScaleBytes / Boxes::kPerTile + 1);
  }();
  static_assert(kRingBoxes >= 2 * Boxes::kPerTile, "the ring must hold the pair of tiles in work");
  static constexpr bool kIsSeesaw = false;
  static constexpr int kBoxesPerPair = 0;  // boxes come and go one by one
  __device__ static constexpr bool has_barrier(int32_t /*box*/) { return true; }

  // Both S^T = K Q^T (tokens x rows) and O^T = V^T P^T (columns x rows).
  using Mma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Operand, Operand, float, Shape<_64, Int<kRowTile>, _16>, GMMA::Major::K,
                           GMMA::Major::K>()));
  using MmaQk = Mma;  // its name where the two differ
  // The part of kpe in bf16.
  using KpeAtom = GMMA::Layout_K_SW128_Atom<KpeElement>;
  using LayoutKpe = decltype(tile_to_shape(
      KpeAtom{}, Shape<Int<kTokenTile>, Int<kHeadDimKpe>, Int<kRingBoxes>>{}));
  using LayoutQueryPe =
      decltype(tile_to_shape(KpeAtom{}, Shape<Int<kRowTile>, Int<kHeadDimKpe>>{}));
  using MmaKpe = decltype(make_tiled_mma(
      GMMA::ss_op_selector<KpeElement, KpeElement, float, Shape<_64, Int<kRowTile>, _16>,
                           GMMA::Major::K, GMMA::Major::K>()));

  struct Storage {
    alignas(1024) uint8_t ring[kRingBoxes * Boxes::kElements];
    alignas(1024) Operand query[cosize_v<LayoutQ>];
    alignas(1024) Operand probability[cosize_v<LayoutP>];  // of the pair's tiles
    alignas(16) float warp_sum[kRowTile][kMathWarps];      // of each row, at the end of a segment
    int32_t score_max[kRowTile];   // running maxima in the order of integers: comparable_bits
    float reference[2][kRowTile];  // what P is relative to: in this pair of tiles, the one before
    float score_scale[kRowTile];   // of the query operand's products, to units of log2
    uint64_t box_full[kRingBoxes], box_empty[kRingBoxes];
    uint64_t query_full, query_empty;
    Segment segments[2];  // [segment number % 2]; one without tiles is the end
    CtaWork work;
    MergeWork merge;
    ScheduleScratch schedule;
  };

  // Tiles whose kpe lies within the same kPerTile boxes of the ring share a place for scales: one
  // needs boxes that the other gives back after its scales were read.
  static constexpr int kScalePlaces = (kRingBoxes + Boxes::kPerTile - 1) / Boxes::kPerTile;
  struct StorageWithScales : Storage {
    alignas(1024) KpeElement query_pe_low[kQueryPeParts == 2 ? kRowTile * kHeadDimKpe : 1];
    alignas(128) float scales[kScalePlaces][kTokenTile][Boxes::kCkv];
    alignas(16) int32_t largest_scale[Boxes::kCkv];  // bits of those above their references
  };
  using SharedStorage = std::conditional_t<kHasTokenScales, StorageWithScales, Storage>;
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

// A tile of codes lies in one piece: the box of kpe, which has half the bytes of the others, and
// those of ckv.
struct CodeBoxes : CacheBoxes<uint8_t, 128> {
  static constexpr int kKpeBytes = kTokenTile * kHeadDimKpe;
  static constexpr int kTileBytes = kKpeBytes + kCkv * kElements;

  __device__ static constexpr int32_t begin(int32_t slot) {
    int32_t const box = slot % kPerTile;
    return slot / kPerTile * kTileBytes + (box == 0 ? 0 : kKpeBytes + (box - 1) * kElements);
  }
};

// Up to 16 rows over a cache of e4m3 with one scale. S^T has operands of fp16, to which K is
// converted as above. Those of O^T are of e4m3: V^T is as it lies in the cache, P^T the sum of
// kParts numbers, each of which takes what the one before left, times 2^kPartShift. Two have 9
// bits, one more than bf16; next to a result of fp16 there are three.
template <typename DType_, int kRowTile_, KvLoader kKvLoader_>
struct Fp8TileTraits {
  using DType = DType_;  // of queries and output
  using Operand = cutlass::half_t;
  static_assert(sizeof(DType) == sizeof(Operand), "queries are converted in place");
  using Code = cutlass::float_e4m3_t;
  static constexpr KvLoader kKvLoader = kKvLoader_;
  static constexpr KvCache kKvCache = KvCache::kFp8;
  static constexpr bool kHasTokenScales = false;
  static constexpr int kRowTile = kRowTile_;  // packed rows (query x head) on WGMMA's N
  static_assert(
      kRowTile == 8 || kRowTile == 16,
      "512 x row_tile floats of accumulators must fit a warpgroup's registers, and 32 rows "
      "take longer than a pair of tiles whose O^T is halved (scripts/TUNING.md)");

  using Boxes = CodeBoxes;
  static constexpr int kEmptyPlaces = 2;  // as in EtapMlaTraits
  static constexpr bool kGuessesPages = true;
  static constexpr bool kPairsRowTiles = false;
  static constexpr bool kTilesComeWhole = false;
  static constexpr bool kFolds = false;  // accumulators leave no registers for it

  static constexpr int kCtaThreads = kThreads;
  static constexpr int kQueryWarps = kMathWarps;
  static constexpr int kQueryHelpers = 0;

  // Registers a thread, after the producer gave some of its share to the math warpgroups.
  static constexpr int kMathRegisters = 216;
  static constexpr int kProducerRegisters = 3 * 168 - kMathWarpgroups * kMathRegisters;

  static constexpr int kRowsPerThread = kRowTile / 4;

  static constexpr int kQueryBoxes = (kHeadDimCkv + kHeadDimKpe) / kBoxColumns;
  // WGMMAs of S^T (16 columns each) whose A operand is converted while the group before them runs.
  static constexpr int kGroupSteps = 4;

  static constexpr int kParts = std::is_same_v<DType, Operand> ? 3 : 2;
  static constexpr int kPartShift = 4;
  // Parts that an instruction multiplies side by side on N, where 32 columns cost little more than
  // 16.
  static constexpr int kPartsAtOnce = kParts == 2 ? 2 : 1;
  static constexpr int kPvSteps = kTokenTile / 32;

  using MmaQk = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Operand, Operand, float, Shape<_64, Int<kRowTile>, _16>, GMMA::Major::K,
                           GMMA::Major::K>()));
  using MmaPv = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Code, Code, float, Shape<_64, Int<kPartsAtOnce * kRowTile>, _32>,
                           GMMA::Major::K, GMMA::Major::K>()));
  using LayoutQ =
      decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Operand>{},
                             Shape<Int<kRowTile>, Int<kBoxColumns>, Int<kQueryBoxes>>{}));
  // P^T of a warpgroup: [part, row][token], 64 bytes a row.
  using LayoutP = decltype(tile_to_shape(GMMA::Layout_K_SW64_Atom<Code>{},
                                         Shape<Int<kParts * kRowTile>, Int<kTokenTile>>{}));

  // The ring is one of whole tiles, which come and go by the barriers of their first slot. Whoever
  // waits for a lap of a stage must know that the lap before is complete, which has the other
  // parity. An even number of stages sees to that within a segment: that lap was of the same
  // warpgroup's tiles, who waited for it. Where it was of a segment before, both warpgroups met at
  // that one's end, behind the waits for all of its tiles.
  static constexpr int kStages = [] {
    int const operands =
        cosize_v<LayoutQ> * int(sizeof(Operand)) + kMathWarpgroups * cosize_v<LayoutP>;
    int const statistics = (2 * kMathWarps + kMathWarpgroups + 1) * kRowTile * int(sizeof(float));
    int const fixed = operands + statistics +
                      int(2 * sizeof(Segment) + sizeof(CtaWork) + sizeof(MergeWork)) +
                      int(sizeof(ScheduleScratch)) + 5 * Boxes::kPerTile * 16 + 128;
    return (kSharedMemoryLimit - fixed) / Boxes::kTileBytes / kMathWarpgroups * kMathWarpgroups;
  }();
  static_assert(kStages > kMathWarpgroups, "the tiles in work, and others on their way");
  static constexpr int kRingBoxes = kStages * Boxes::kPerTile;
  static constexpr bool kIsSeesaw = false;
  static constexpr int kBoxesPerPair = 0;
  __device__ static constexpr bool has_barrier(int32_t box) { return box == 0; }
  static_assert(kTokenTile * kRowTile * int(sizeof(float)) <= Boxes::kElements,
                "a box takes 64 columns of O^T when warpgroups exchange them");

  struct SharedStorage {
    alignas(1024) uint8_t ring[kStages * Boxes::kTileBytes];
    alignas(1024) Operand query[cosize_v<LayoutQ>];
    alignas(1024) Code probability[kMathWarpgroups][cosize_v<LayoutP>];
    alignas(16) float warp_max[kMathWarpgroups][kRowTile][4];  // over a warp's tokens of a tile
    alignas(16) float warp_sum[kMathWarpgroups][kRowTile][4];  // over all its tokens of a segment
    float reference[kMathWarpgroups][kRowTile];  // that those sums and O^T are relative to
    float score_scale[kRowTile];                 // of the products, to units of log2
    uint64_t box_full[kRingBoxes], box_empty[kRingBoxes];
    uint64_t query_full, query_empty;
    Segment segments[2];  // [segment number % 2]; one without tiles is the end
    CtaWork work;
    MergeWork merge;
    ScheduleScratch schedule;
  };
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

}  // namespace etap
