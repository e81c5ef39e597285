/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The merge at the end of the attention kernel, by the CTAs that have the parts: they count who has
 * come, and each joins a share of the units.
 */
#pragma once

#include <cuda/atomic>

#include "etap_mla_fold_merge.cuh"

namespace etap {

// In a word: CTAs that came to a merge, those of them whose parts have powers, and those that left
// before all had come.
constexpr uint32_t kArrived = 0xff;
constexpr uint32_t kOneHasPowers = kArrived + 1, kHavePowers = kArrived * kOneHasPowers;
constexpr uint32_t kOneLeft = kOneHasPowers + kHavePowers;
static_assert(kMostSms <= kArrived);
constexpr int64_t kPatience = 2'000'000;  // in cycles: 1 ms

// Comes to the merge of a row tile, and waits for the other CTAs that share it; returns whose
// shares this one does. All CTAs of a grid run at the same time, unless other kernels have some of
// the SMs; so nobody waits for ever. If a CTA gave up, the last one to come does the shares of all;
// then nobody can give up any more.
__device__ __forceinline__ MergeShares wait_for_parts(uint32_t& arrivals, SplitRowTile const& split,
                                                      bool has_powers) {
  uint32_t const num_parts = split.descriptor.num_parts;
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> const counter(arrivals);
  uint32_t const one = 1 + (has_powers ? kOneHasPowers : 0);
  uint32_t state = counter.fetch_add(one, cuda::memory_order_acq_rel) + one;
  int64_t const begin = clock64();
  bool const is_last = (state & kArrived) == num_parts;
  while ((state & kArrived) != num_parts) {
    state = counter.load(cuda::memory_order_acquire);
    if ((state & kArrived) == num_parts || clock64() - begin < kPatience) continue;
    // Not the counter's own, which would put `state` on the stack.
    if (atomicCAS(&arrivals, state, state + kOneLeft) == state) return {};
  }
  bool const have_powers = state & kHavePowers;
  if (state < kOneLeft) return {split.part, split.part + 1, have_powers};
  return {0, is_last ? int32_t(num_parts) : 0, have_powers};
}

// A CTA's math threads join the row tiles that it shares with others: some units each, once all
// parts are there. kFolded: in a batch-invariant call that folds.
template <class Traits, bool kFolded>
__device__ __forceinline__ void merge_split_row_tiles_of_call(
    Params const& params, typename Traits::SharedStorage& shared) {
  MergeWork& merge = shared.merge;
  auto const num_parts = [&merge](int32_t i) {
    return merge.split_row_tiles[i].descriptor.num_parts;
  };
  if (num_parts(0) == 0 && num_parts(1) == 0) return;
  sync_math();  // all have written their parts, and the ring is free
  // By a warp each, for every trip to memory counts.
  int32_t const warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0 && warp < 2 && num_parts(warp) > 0) {
    SplitRowTile const& split = merge.split_row_tiles[warp];
    KeptSchedule& kept = params.kept_schedules[split.number];
    merge.shares[warp] = wait_for_parts(kept.arrivals[merge.call % 2], split, merge.has_powers);
  }
  sync_math();
  using Storage =
      typename std::conditional_t<kFolded, FoldMerge<Traits>, Merge<Traits>>::SharedStorage;
  static_assert(sizeof(Storage) <= sizeof(shared.ring));
  auto& scratch = *reinterpret_cast<Storage*>(shared.ring);
#pragma unroll 1
  for (int32_t i = 0; i < 2; ++i) {
    // Copies: all that they are asked for comes by one trip to shared memory.
    SplitRowTile const split = merge.split_row_tiles[i];
    MergeShares const shares = merge.shares[i];
    int32_t const parts = split.descriptor.num_parts;
    if (parts == 0) continue;
#pragma unroll 1
    for (int32_t share = shares.first; share < shares.end; ++share) {
      if constexpr (kFolded) {
        FoldMerge<Traits>::join_row_tile(params, scratch, share, parts, split,
                                         shared.fold.lists[i]);
      } else {
        bool const have_powers = Traits::kHasHalfPartials && shares.have_powers;
        Merge<Traits>(params, scratch, share, parts, have_powers).join_row_tile(split);
      }
      sync_math();  // the scratch is used again
    }
  }
}

template <class Traits>
__device__ __forceinline__ void merge_split_row_tiles(Params const& params,
                                                      typename Traits::SharedStorage& shared) {
  if (!is_batch_invariant(params)) {
    merge_split_row_tiles_of_call<Traits, false>(params, shared);
  } else if constexpr (Traits::kFolds) {
    merge_split_row_tiles_of_call<Traits, true>(params, shared);
  }
}

}  // namespace etap
