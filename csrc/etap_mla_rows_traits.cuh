/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Sizes and the shared-memory plan of the kernel for row tiles of 64, which has rows on WGMMA's M.
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

// 64 rows fill WGMMA's M without padding. Then the usual orientation (S = Q K^T, O = P V) costs the
// tensor cores the same as ETAP's, and its softmax costs less: a row lies in four lanes of a warp
// instead of in all lanes of four warps, and P is an operand in the registers where it was made.
template <typename DType_, KvLoader kKvLoader_>
struct RowsMlaTraits {
  using DType = DType_;
  using Boxes = CacheBoxes<DType, kBoxColumns>;
  static constexpr KvLoader kKvLoader = kKvLoader_;
  static constexpr KvCache kKvCache = KvCache::kSame;
  static constexpr int kRowTile = 64;  // packed rows (query x head) on WGMMA's M

  static constexpr int kEmptyPlaces = 4;        // as in EtapMlaTraits
  static constexpr bool kGuessesPages = false;  // slower: the first tile waits for Q anyway
  static constexpr bool kPairsRowTiles = true;

  // Registers a thread, after the producer gave some of its share to the math warpgroups.
  static constexpr int kMathRegisters = 224;
  static constexpr int kProducerRegisters = 3 * 168 - kMathWarpgroups * kMathRegisters;

  // P in a high and a low part of DType adds nothing to the error of the result, but takes P V
  // twice. Rounding P shows less the more tokens share the weight: longer requests have the high
  // part alone. Depends on the request alone, not on its batch.
  static constexpr int kLongestSplitPRequest = 512;

  // Two stages of a tile each; math warpgroup g makes S and P of the tiles in stage g. All operands
  // are 128-byte swizzled. A box is seen as K [tokens x columns] and as V [columns x tokens]; once
  // S is there, the box of kpe may take the low part of P [rows x tokens].
  static constexpr int kStages = kMathWarpgroups;
  static constexpr int kRingBoxes = kStages * kBoxesPerTile;

  // Boxes of S = Q K^T that come before P V of the tile before. None, and the tensor cores idle
  // until that P is there; all, and the boxes of that tile are given back too late.
  static constexpr int kBoxesAhead = 3;
  static_assert(kBoxesAhead % 2 == 1, "kpe and whole pairs");

  // In which order the boxes of a stage become free, are asked for and used: kpe, the half of ckv
  // whose owner makes S, the other half. Those of ckv come and go in pairs, by the barriers of a
  // pair's first.
  __device__ static int32_t box_in_order(int32_t stage, int32_t i) {
    return i == 0 ? 0 : 1 + ((i - 1) ^ (stage * kBoxesPerWarpgroup));
  }
  static constexpr int kBoxesPerPair = 2;
  __host__ __device__ static constexpr bool has_barrier(int32_t box) {
    return box == 0 || (box - 1) % kBoxesPerPair == 0;
  }

  using KAtom = GMMA::Layout_K_SW128_Atom<DType>;
  using LayoutK = decltype(tile_to_shape(
      KAtom{}, Shape<Int<kTokenTile>, Int<kBoxColumns>, Int<kBoxesPerTile>>{}));
  using LayoutQ = decltype(tile_to_shape(
      KAtom{}, Shape<Int<kRowTile>, Int<kBoxColumns>, Int<kBoxesPerTile>>{}));
  using LayoutP = decltype(tile_to_shape(KAtom{}, Shape<Int<kRowTile>, Int<kTokenTile>>{}));
  // Half of d_v: four boxes, one behind the other.
  static constexpr int kHalfColumns = kHeadDimCkv / kMathWarpgroups;
  using LayoutV =
      decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<DType>{},
                             Shape<Int<kHalfColumns>, Int<kTokenTile>>{}, Step<_2, _1>{}));

  using MmaQk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<DType, DType, float, Shape<Int<kRowTile>, Int<kTokenTile>, _16>,
                           GMMA::Major::K, GMMA::Major::K>()));
  // P of the other warpgroup lies in shared memory, one's own in registers.
  using ShapePv = Shape<Int<kRowTile>, Int<kHalfColumns>, _16>;
  using MmaPvShared = decltype(make_tiled_mma(
      GMMA::ss_op_selector<DType, DType, float, ShapePv, GMMA::Major::K, GMMA::Major::MN>()));
  using MmaPvRegisters = decltype(make_tiled_mma(
      GMMA::rs_op_selector<DType, DType, float, ShapePv, GMMA::Major::K, GMMA::Major::MN>()));

  struct SharedStorage {
    alignas(1024) DType ring[kRingBoxes * kBoxElements];
    alignas(1024) DType query[cosize_v<LayoutQ>];
    alignas(1024) DType probability[cosize_v<LayoutP>];
    float reference[kMathWarpgroups][kRowTile];   // of the last tile that the warpgroup made P of
    float row_sum[2][kMathWarpgroups][kRowTile];  // [segment number % 2], at a segment's end
    ScheduleScratch schedule;
    uint64_t box_full[kRingBoxes], box_empty[kRingBoxes];
    uint64_t query_full, query_empty;
    Segment segments[2];  // [segment number % 2]; one without tiles is the end
    CtaWork work;
    MergeWork merge;
  };
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

}  // namespace etap
