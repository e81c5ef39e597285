/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Sizes and the shared-memory plans of the kernels for row tiles of 64, which have rows on WGMMA's
 * M: one for requests of up to 64 rows, one for more.
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

// 64 rows fill WGMMA's M without padding. Then the usual orientation (S = Q K^T, O = P V) costs the
// tensor cores the same as ETAP's, and its softmax costs less: a row lies in four lanes of a warp
// instead of in all lanes of four warps.
template <typename DType_, KvLoader kKvLoader_>
struct RowsTraits {
  using DType = DType_;
  using Boxes = CacheBoxes<DType, kBoxColumns>;
  static constexpr KvLoader kKvLoader = kKvLoader_;
  static constexpr KvCache kKvCache = KvCache::kSame;
  static constexpr int kRowTile = 64;  // packed rows (query x head) on WGMMA's M

  static constexpr int kEmptyPlaces = 4;        // as in EtapMlaTraits
  static constexpr bool kGuessesPages = false;  // no faster: the first tile waits for Q anyway
  static constexpr bool kPairsRowTiles = true;
  static constexpr bool kFolds = false;  // accumulators leave no registers for it
  static constexpr bool kTilesComeWhole = false;

  // P in a high and a low part of DType adds nothing to the error of the result, but takes P V
  // twice. Rounding P shows less the more tokens share the weight: longer requests have the high
  // part alone. Depends on the request alone, not on its batch.
  static constexpr int kLongestSplitPRequest = 512;

  // Two stages of a tile each. All operands are 128-byte swizzled. A box is seen as K [tokens x
  // columns] and as V [columns x tokens]; once S is there, the box of kpe may take a part of P
  // [rows x tokens].
  static constexpr int kStages = 2;
  static constexpr int kRingBoxes = kStages * kBoxesPerTile;

  // Boxes of ckv come in pairs, by the barriers of a pair's first.
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
  // P V with P from shared memory or from registers, some columns an instruction.
  template <int kColumns>
  using MmaOfShared = decltype(make_tiled_mma(
      GMMA::ss_op_selector<DType, DType, float, Shape<Int<kRowTile>, Int<kColumns>, _16>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  template <int kColumns>
  using MmaOfRegisters = decltype(make_tiled_mma(
      GMMA::rs_op_selector<DType, DType, float, Shape<Int<kRowTile>, Int<kColumns>, _16>,
                           GMMA::Major::K, GMMA::Major::MN>()));

  // What both kernels have in shared memory.
  struct Storage {
    alignas(1024) DType ring[kRingBoxes * kBoxElements];
    alignas(1024) DType query[cosize_v<LayoutQ>];
    alignas(1024) DType probability[cosize_v<LayoutP>];  // in a seesaw, low parts or P of the
                                                         // second tile
    ScheduleScratch schedule;
    uint64_t box_full[kRingBoxes], box_empty[kRingBoxes];
    uint64_t query_full, query_empty;
    Segment segments[2];  // [segment number % 2]; one without tiles is the end
    CtaWork work;
    MergeWork merge;
  };
};

// Requests of 33 to 64 rows (etap_mla_rows_math.cuh).
template <typename DType_, KvLoader kKvLoader_>
struct RowsMlaTraits : RowsTraits<DType_, kKvLoader_> {
  using Base = RowsTraits<DType_, kKvLoader_>;
  using typename Base::DType;
  static constexpr bool kIsSeesaw = false;

  // Beside the warpgroups of every kernel, of which the math ones have the values, there is one
  // that makes the scores.
  static constexpr int kCtaThreads = kThreads + kWarpgroupThreads;
  // Arrivals that free the queries: of warps that read them or, the math's, what comes with them.
  static constexpr int kQueryWarps = kMathWarps + kWarpgroupThreads / 32;
  // Threads that help to copy the first queries, from this one on: the scores'.
  static constexpr int kQueryHelpers = kWarpgroupThreads, kFirstQueryHelper = kThreads;

  // Registers a thread, of which all start with the same number.
  static constexpr int kMathRegisters = 168;
  static constexpr int kScoreRegisters = 104;
  static constexpr int kProducerRegisters = 72;
  static_assert(kMathWarpgroups * kMathRegisters + kScoreRegisters + kProducerRegisters == 4 * 128,
                "a CTA of 512 threads starts with 128 registers a thread");

  // 256 columns an instruction would take more registers than threads start with, and spill.
  using MmaPv = typename Base::template MmaOfShared<Base::kHalfColumns / 2>;
  // For the layout of P alone, in the registers where it is made.
  using MmaPvRegisters = typename Base::template MmaOfRegisters<Base::kHalfColumns / 2>;

  struct SharedStorage : Base::Storage {
    float factor[Base::kRowTile];                  // that brings O to the reference of P
    float row_sum[Base::kRowTile];                 // at a segment's end
    uint64_t probability_full, probability_empty;  // with factor and row_sum
  };
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

// More than 64 rows (etap_mla_seesaw_math.cuh).
template <typename DType_, KvLoader kKvLoader_>
struct SeesawMlaTraits : RowsTraits<DType_, kKvLoader_> {
  using Base = RowsTraits<DType_, kKvLoader_>;
  using typename Base::DType;
  static constexpr bool kIsSeesaw = true;  // the halves of ckv in a stage are given back whole

  static constexpr int kCtaThreads = kThreads;
  static constexpr int kQueryWarps = kMathWarps;
  static constexpr int kQueryHelpers = kMathThreads, kFirstQueryHelper = 0;

  static constexpr int kMathRegisters = 224;
  static constexpr int kProducerRegisters = 3 * 168 - kMathWarpgroups * kMathRegisters;
  static_assert(kThreads == 3 * 128, "a CTA of 384 threads starts with 168 registers a thread");

  // P of a warpgroup's own tile comes from registers, of the other's from shared memory.
  using MmaPv = typename Base::template MmaOfShared<Base::kHalfColumns>;
  using MmaPvRegisters = typename Base::template MmaOfRegisters<Base::kHalfColumns>;

  struct SharedStorage : Base::Storage {
    RunningMax references[kMathWarpgroups][Base::kRowTile];  // of each warpgroup's last tile
    // [segment number % 2], of each warpgroup's tiles, at the segment's end
    float row_sum[2][kMathWarpgroups][Base::kRowTile];
  };
  static_assert(sizeof(SharedStorage) <= kSharedMemoryLimit, "shared memory of one Hopper SM");
};

}  // namespace etap
