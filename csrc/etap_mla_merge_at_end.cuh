/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The merge at the end of the attention kernel, by the CTAs that have the parts, each a share of
 * the units: they poll for the parts or count who has come (etap_mla_partial.cuh).
 *
 * All CTAs of a grid run at the same time, unless other kernels have some of the SMs; so nobody may
 * wait for ever. Who polls and finds parts missing for too long says so, and then looks who has
 * begun, with a fence between; who begins says so, and then looks who gave up, with a fence
 * between (etap_mla_begun.cuh). So either all have begun, and their parts will come; or who gives
 * up may leave, for one that has not begun will see it, and will join the units of all. The last
 * one to begin sees that all have. What two have joined is the same.
 */
#pragma once

#include "etap_mla_begun.cuh"
#include "etap_mla_fold_merge.cuh"

namespace etap {

// In cycles: 1 ms; and 10 s where all have begun, whose parts will come. Unless index tensors
// change while the kernel runs, which is an error, but must not keep it from ending.
constexpr int64_t kPatience = 2'000'000;
constexpr int64_t kLastPatience = 20'000'000'000;

// Calls join(i, split, share) for the shares that a CTA does of the row tiles that it shares with
// others. shares_of(i, split) gives them.
template <class SharesOf, class Join>
__device__ __forceinline__ void for_each_share(MergeWork const& merge, SharesOf const& shares_of,
                                               Join const& join) {
#pragma unroll 1
  for (int32_t i = 0; i < 2; ++i) {
    // A copy: all that it is asked for comes by one trip to shared memory.
    SplitRowTile const split = merge.split_row_tiles[i];
    if (split.descriptor.num_parts == 0) continue;
    MergeShares const shares = shares_of(i, split);
#pragma unroll 1
    for (int32_t share = shares.first; share < shares.end; ++share) join(i, split, share);
  }
}

// --- Parts that are polled ----------------------------------------------------------------------

// After this, who has not begun yet will see that somebody gave up. Whether all have begun, and so
// will leave their parts: by a warp.
__device__ __forceinline__ bool give_up(Params const& params, SplitRowTile const& split,
                                        uint32_t call) {
  int32_t const lane = threadIdx.x % 32;
  if (lane == 0) {
    AtomicWord(merge_state(params, split, call)).store(kSomeoneGaveUp, cuda::memory_order_relaxed);
  }
  __syncwarp();
  cuda::atomic_thread_fence(cuda::memory_order_seq_cst, cuda::thread_scope_device);
  bool have_begun = true;
  for (int32_t part = lane; part < split.descriptor.num_parts; part += 32) {
    AtomicWord const begun(params.kept_schedules[split.number + part].begun);
    have_begun = have_begun && begun.load(cuda::memory_order_relaxed) == call + 1;
  }
  return __all_sync(0xffffffff, have_begun);
}

// A CTA's math threads join some units of each row tile that it shares with others; or all of them,
// if somebody gave up.
template <class Traits>
__device__ __forceinline__ void merge_polled_parts(Params const& params, MergeWork& merge,
                                                   void* scratch) {
  using PolledMerge = Merge<Traits, true>;
  auto& shared = *static_cast<typename PolledMerge::SharedStorage*>(scratch);
  PartPlaces<Traits> const* const slots = places_of_call<Traits>(params, merge.call);
  int64_t end_of_patience = clock64() + kPatience;
#pragma unroll 1
  for (bool waits_on = false;; waits_on = true) {
    bool has_all = true;
    for_each_share(
        merge,
        [&](int32_t i, SplitRowTile const& split) -> MergeShares {
          if (waits_on && !merge.waits_on[i]) return {};
          if (merge.others_gave_up[i]) return {0, split.descriptor.num_parts};
          return {split.part, split.part + 1};
        },
        [&](int32_t, SplitRowTile const& split, int32_t share) {
          auto const parts = PartsToJoin::polled(slots, end_of_patience);
          PolledMerge part_merge(params, shared, share, split.descriptor.num_parts, parts);
          has_all &= part_merge.join_row_tile(split);
        });
    if (!sync_math_or(!has_all) || waits_on) return;
    // Of both row tiles: to join one again does no harm.
    if (threadIdx.x < 32) {
#pragma unroll 1
      for (int32_t i = 0; i < 2; ++i) {
        SplitRowTile const& split = merge.split_row_tiles[i];
        if (split.descriptor.num_parts > 0) merge.waits_on[i] = give_up(params, split, merge.call);
      }
    }
    sync_math();
    end_of_patience = clock64() + kLastPatience;
  }
}

// --- Parts that are counted ---------------------------------------------------------------------

// Who has come to the merge of a row tile: CTAs, those of them that left before all had come, and
// those whose part refers to the workspace.
struct Arrivals {
  uint32_t word;
  static constexpr uint32_t kOne = 1, kOneLeft = 1 << 8, kOneRefers = 1 << 16;
  static_assert(kMostSms < kOneLeft);

  __device__ uint32_t count() const { return word % kOneLeft; }
  __device__ bool some_left() const { return word % kOneRefers >= kOneLeft; }
  __device__ bool some_refer() const { return word >= kOneRefers; }
};

// Comes to the merge of a row tile, and waits for the other CTAs that share it; returns whose
// shares this one does. If a CTA gave up, the last one to come does the shares of all; then nobody
// can give up any more.
__device__ __forceinline__ MergeShares wait_for_parts(uint32_t& merge_state,
                                                      SplitRowTile const& split,
                                                      bool refers_to_workspace) {
  uint32_t const num_parts = split.descriptor.num_parts;
  AtomicWord const counter(merge_state);
  uint32_t const own = Arrivals::kOne + (refers_to_workspace ? Arrivals::kOneRefers : 0);
  Arrivals arrivals{counter.fetch_add(own, cuda::memory_order_acq_rel) + own - kNobody};
  int64_t const begin = clock64();
  bool const is_last = arrivals.count() == num_parts;
  while (arrivals.count() != num_parts) {
    arrivals.word = counter.load(cuda::memory_order_acquire) - kNobody;
    if (arrivals.count() == num_parts || clock64() - begin < kPatience) continue;
    // Not the counter's own, which would put what it compares on the stack.
    uint32_t const seen = arrivals.word + kNobody;
    if (atomicCAS(&merge_state, seen, seen + Arrivals::kOneLeft) == seen) return {};
  }
  bool const some_refer = arrivals.some_refer();
  if (!arrivals.some_left()) return {split.part, split.part + 1, some_refer};
  return {0, is_last ? int32_t(num_parts) : 0, some_refer};
}

// kFolded: pieces, in calls that fold.
template <class Traits, bool kFolded>
__device__ __forceinline__ void merge_counted_parts(Params const& params,
                                                    typename Traits::SharedStorage& shared) {
  MergeWork& merge = shared.merge;
  sync_math();  // all have written their parts, and the ring is free
  // By a warp each, for every trip to memory counts.
  int32_t const warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0 && warp < 2 && merge.split_row_tiles[warp].descriptor.num_parts > 0) {
    SplitRowTile const& split = merge.split_row_tiles[warp];
    merge.shares[warp] =
        wait_for_parts(merge_state(params, split, merge.call), split, merge.refers_to_workspace);
  }
  sync_math();
  using AnyMerge = std::conditional_t<kFolded, FoldMerge<Traits>, Merge<Traits, true>>;
  using Storage = typename AnyMerge::SharedStorage;
  static_assert(sizeof(Storage) <= sizeof(shared.ring));
  auto& scratch = *reinterpret_cast<Storage*>(shared.ring);
  for_each_share(
      merge, [&merge](int32_t i, SplitRowTile const&) -> MergeShares { return merge.shares[i]; },
      [&](int32_t i, SplitRowTile const& split, int32_t share) {
        int32_t const count = split.descriptor.num_parts;
        if constexpr (kFolded) {
          AnyMerge::join_row_tile(params, scratch, share, count, split, shared.fold.lists[i]);
        } else {
          auto const parts = PartsToJoin::counted(places_of_call<Traits>(params, merge.call),
                                                  merge.shares[i].some_refer);
          AnyMerge(params, scratch, share, count, parts).join_row_tile(split);
        }
        sync_math();  // the scratch is used again
      });
}

// Of the row tiles that this CTA shares with others, if there are any.
template <class Traits>
__device__ __forceinline__ void merge_split_row_tiles(Params const& params,
                                                      typename Traits::SharedStorage& shared) {
  MergeWork& merge = shared.merge;
  auto const is_split = [&merge](int32_t i) {
    return merge.split_row_tiles[i].descriptor.num_parts > 0;
  };
  if (!is_split(0) && !is_split(1)) return;
  if (!is_batch_invariant(params)) {
    if constexpr (kPollsParts<Traits>) {
      sync_math();  // the ring is free
      static_assert(sizeof(typename Merge<Traits, true>::SharedStorage) <= sizeof(shared.ring));
      merge_polled_parts<Traits>(params, merge, shared.ring);
    } else {
      merge_counted_parts<Traits, false>(params, shared);
    }
  } else if constexpr (Traits::kFolds) {
    merge_counted_parts<Traits, true>(params, shared);
  }
}

}  // namespace etap
