/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a CTA that begins has to do with merges that others may have given up: see
 * etap_mla_merge_at_end.cuh. By the warp that describes the row tiles, beside all else.
 */
#pragma once

#include <cuda/atomic>

#include "etap_mla_traits.cuh"

namespace etap {

// Of KeptSchedule::merges, and kNobody.
constexpr uint32_t kSomeoneGaveUp = 0;

using AtomicWord = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;

__device__ __forceinline__ uint32_t& merge_state(Params const& params, SplitRowTile const& split,
                                                 uint32_t call) {
  return params.kept_schedules[split.number].merges[call % 2];
}

// That this CTA has begun, which it stored in front of a barrier, will be seen by all that it does
// not see giving up later on: by the thread that looks.
__device__ __forceinline__ void fence_beginning() {
  cuda::atomic_thread_fence(cuda::memory_order_seq_cst, cuda::thread_scope_device);
}

__device__ __forceinline__ void look_who_gave_up(Params const& params, MergeWork& merge,
                                                 int32_t row_tile) {
  SplitRowTile const& split = merge.split_row_tiles[row_tile];
  AtomicWord const state(merge_state(params, split, merge.call));
  merge.others_gave_up[row_tile] = state.load(cuda::memory_order_relaxed) != kNobody;
}

}  // namespace etap
