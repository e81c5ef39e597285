/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * ETAP MLA decode (arXiv 2506.01969): tokens on WGMMA's M, packed rows (query x head) on N. A CTA
 * of three warpgroups, or four, works on a range of token tiles:
 *
 *   producer          each token tile: 9 boxes [64 tokens x 64 columns] -> ring (TMA or cp.async)
 *                     each row tile:   Q [row tile x 576] -> shared memory
 *   math warpgroups   each token tile: S^T = K Q^T;  P^T = softmax;  O^T += V^T P^T
 *                     end of segment:  O^T / l transposed -> out, or O^T, m, l -> workspace
 *                                      if other CTAs share the row tile (etap_mla_partial.cuh)
 *                     at last:         with those CTAs, join the parts (etap_mla_merge_at_end.cuh)
 *
 * The math differs: etap_mla_math.cuh up to 32 rows; row tiles of 64 fill M themselves (S = Q K^T,
 * O = P V), in etap_mla_rows_math.cuh, which has a fourth warpgroup for S and P, for one of them,
 * in etap_mla_seesaw_math.cuh for several; etap_mla_fp8_math.cuh and etap_mla_fp8_tile_math.cuh are
 * for an fp8 cache.
 */
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "etap_mla_fp8_math.cuh"
#include "etap_mla_fp8_tile_math.cuh"
#include "etap_mla_kept_schedule.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_math.cuh"
#include "etap_mla_merge_at_end.cuh"
#include "etap_mla_rows_math.cuh"
#include "etap_mla_seesaw_math.cuh"

namespace etap {

template <class Traits>
constexpr bool kHasScoreWarpgroup = Traits::kCtaThreads > kThreads;

// One barrier a thread. By the last two warps: the first ones have the requests of small batches to
// look at, and would only wait for the fence.
template <class Traits>
__device__ void init_barriers(typename Traits::SharedStorage& shared) {
  constexpr int32_t kRing = Traits::kRingBoxes;
  constexpr int32_t kBoxProducers = Traits::kKvLoader == KvLoader::kTma ? 1 : kGatherThreads;
  static_assert(2 * kRing + 4 <= 64);
  int32_t const i = int32_t(threadIdx.x) - (kThreads - 64);
  if (i < 0) return;
  if (i < kRing) {
    Barrier::init(&shared.box_full[i], kBoxProducers);
  } else if (i < 2 * kRing) {
    Barrier::init(&shared.box_empty[i - kRing], kMathWarps);
  } else if (i == 2 * kRing) {
    Barrier::init(&shared.query_full, kQueryLoadThreads);
  } else if (i == 2 * kRing + 1) {
    Barrier::init(&shared.query_empty, Traits::kQueryWarps);
  }
  if constexpr (kHasScoreWarpgroup<Traits>) {
    if (i == 2 * kRing + 2) Barrier::init(&shared.probability_full, kWarpgroupThreads);
    if (i == 2 * kRing + 3) Barrier::init(&shared.probability_empty, kMathThreads);
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__device__ __forceinline__ void run_math(Params const& params,
                                         typename Traits::SharedStorage& shared) {
  if constexpr (kMultipliesCodes<Traits::kKvCache, Traits::kRowTile>) {
    Fp8TileMathWarpgroup<Traits>(params, shared).run();
  } else if constexpr (Traits::kKvCache != KvCache::kSame) {
    Fp8MathWarpgroup<Traits>(params, shared).run();
  } else if constexpr (Traits::kIsSeesaw) {
    SeesawWarpgroup<Traits>(params, shared).run();
  } else if constexpr (kHasScoreWarpgroup<Traits>) {
    ValueWarpgroup<Traits>(params, shared).run();
  } else {
    MathWarpgroup<Traits>(params, shared).run();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kCtaThreads, 1)
    etap_mla_kernel(__grid_constant__ Params const params,
                    __grid_constant__ CUtensorMap const ckv_map,
                    __grid_constant__ CUtensorMap const kpe_map) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  CtaWork& work = shared.work;

  init_barriers<Traits>(shared);
  if (Traits::kKvLoader == KvLoader::kTma && threadIdx.x == kMathThreads) {
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&ckv_map));
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&kpe_map));
  }
  prefetch_schedule(params);
  bool const loads_cache = uint32_t(threadIdx.x) - kMathThreads < kCacheThreads;
  int32_t const page_index =
      Traits::kGuessesPages && loads_cache
          ? guess_page_index(params, token_of_lane<Traits::kKvLoader>(params))
          : -1;
  // So far this may have run beside the end of the kernel before; from here on its results count.
  cudaGridDependencySynchronize();
  // The next kernel's CTAs may take their places as ours leave; they wait for our results.
  cudaTriggerProgrammaticLaunchCompletion();
  GuessedPage const guessed(params, page_index);
  bool const is_same_schedule = schedule_cta<Traits>(params, shared);
  if (!work.has_segment) {
    if constexpr (!kPollsParts<Traits>) return;
    empty_parts_of_next_call<Traits>(params, shared.merge, threadIdx.x, Traits::kCtaThreads);
    if (threadIdx.x == 0) note_used_slots<Traits>(params, shared.merge, 0);
    return;
  }
  help_with_first_queries<Traits>(params, shared);

  if (threadIdx.x >= kThreads) {
    if constexpr (kHasScoreWarpgroup<Traits>) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kScoreRegisters>();
      ScoreWarpgroup<Traits>(params, shared).run();
    }
  } else if (threadIdx.x >= kMathThreads) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    int32_t const warp = threadIdx.x / 32 % 4;
    if (warp >= 2) {
      load_queries<Traits>(params, shared, work, is_same_schedule);
    } else if constexpr (Traits::kKvLoader == KvLoader::kGather) {
      load_cache_by_gather<Traits>(params, shared, work, guessed);
    } else {
      load_cache_by_tma<Traits>(params, ckv_map, kpe_map, shared, work, guessed);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kMathRegisters>();
    run_math<Traits>(params, shared);
    merge_split_row_tiles<Traits>(params, shared);
  }
}

}  // namespace etap
