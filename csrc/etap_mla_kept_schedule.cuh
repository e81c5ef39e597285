/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The beginning of a CTA: its work, as the call before kept it, if that was like this one; else it
 * is found (etap_mla_schedule.cuh) and kept.
 */
#pragma once

#include "etap_mla_partial.cuh"
#include "etap_mla_schedule.cuh"

namespace etap {

// Of a batch-invariant call: the descriptors behind the last row tile's.
__device__ __forceinline__ void clear_merge_descriptors_behind(Params const& params,
                                                               int32_t row_tiles) {
  if (params.most_row_tiles == 0) return;
  int32_t const stride = gridDim.x * kThreads;
  int64_t i = int64_t(row_tiles) + blockIdx.x * kThreads + threadIdx.x;
  for (; i < params.most_row_tiles; i += stride) params.merge_descriptors[i] = {};
}

// Whether the call before had the same problem and requests; then `work` is what it kept. Run by
// all threads together, and a barrier for them, if there are no more requests than threads. `own`
// is the request of this thread.
__device__ __forceinline__ bool recall_cta_work(Params const& params, RawRequest const& own,
                                                CtaWork& work) {
  if (params.requests_per_thread > 1) return false;
  KeptSchedule const& kept = params.kept_schedules[blockIdx.x];
  int32_t const thread = threadIdx.x;
  constexpr int32_t kWorkWords = sizeof(CtaWork) / sizeof(int4);
  int4 offsets = {}, work_words = {};
  int32_t kv_len = 0, key_word = 0;
  // All loads before the first comparison, which would wait: one trip to memory. Past L1, which may
  // hold what a CTA before the last one kept.
  if (thread < params.batch) {
    offsets = __ldcg(&kept.offsets[thread]);
    kv_len = __ldcg(&kept.kv_len[thread]);
  }
  if (thread < kScheduleKeyWords) key_word = __ldcg(&kept.key[thread]);
  if (thread < kWorkWords) {
    work_words = __ldcg(reinterpret_cast<int4 const*>(&kept.work) + thread);
  }
  bool is_same = true;
  if (thread < params.batch) {
    is_same = offsets.x == own.query_begin && offsets.y == own.query_end &&
              offsets.z == own.page_begin && offsets.w == own.page_end && kv_len == own.kv_len;
  }
  if (thread < kScheduleKeyWords) is_same = is_same && key_word == params.schedule_key[thread];
  if (thread < kWorkWords) reinterpret_cast<int4*>(&work)[thread] = work_words;
  return __syncthreads_and(is_same);
}

// For the next call, once `work` is there for all.
__device__ __forceinline__ void keep_cta_work(Params const& params, RawRequest const& own,
                                              CtaWork const& work) {
  if (params.requests_per_thread > 1) return;
  KeptSchedule& kept = params.kept_schedules[blockIdx.x];
  int32_t const thread = threadIdx.x;
  constexpr int32_t kWorkWords = sizeof(CtaWork) / sizeof(int4);
  if (thread < params.batch) {
    kept.offsets[thread] = {own.query_begin, own.query_end, own.page_begin, own.page_end};
    kept.kv_len[thread] = own.kv_len;
  }
  if (thread < kScheduleKeyWords) kept.key[thread] = params.schedule_key[thread];
  if (thread < kWorkWords) {
    reinterpret_cast<int4*>(&kept.work)[thread] = reinterpret_cast<int4 const*>(&work)[thread];
  }
}

// Nobody comes to merges of the next call yet: the calls before have ended. So whatever may have
// gone wrong in one of them is forgotten.
template <class Traits>
__device__ __forceinline__ void begin_call(Params const& params, MergeWork& merge) {
  KeptSchedule& kept = params.kept_schedules[blockIdx.x];
  if (threadIdx.x < 2) merge.split_row_tiles[threadIdx.x] = {};
  if (threadIdx.x != kThreads - 1) return;
  if constexpr (kPollsParts<Traits>) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) merge.others_gave_up[i] = false;
    // With the number of the call, in one trip to memory.
    uint2 const used_slots = __ldcg(reinterpret_cast<uint2 const*>(kept.used_slots));
    merge.call = __ldcg(&kept.call);
    merge.slots_used_before = merge.call % 2 == 0 ? used_slots.y : used_slots.x;
    params.kept_schedules[Worker<Traits>(params).cta()].begun = merge.call + 1;
  } else {
    merge.call = __ldcg(&kept.call);
    merge.refers_to_workspace = false;
  }
  kept.call = merge.call + 1;
  kept.merges[(merge.call + 1) % 2] = kNobody;
}

// The lists of pieces that the call before kept, with the trip to memory of its work; by the math
// threads, who use them.
template <class Traits>
class KeptFoldLists {
  static constexpr int32_t kWords = sizeof(KeptSchedule::fold_lists) / sizeof(int4);
  static_assert(kWords <= kMathThreads);

 public:
  __device__ __forceinline__ explicit KeptFoldLists(Params const& params)
      : has_word_(folds<Traits>(params) && threadIdx.x < kWords) {
    if (!has_word_) return;
    auto const* const words =
        reinterpret_cast<int4 const*>(params.kept_schedules[blockIdx.x].fold_lists);
    word_ = __ldcg(words + threadIdx.x);
  }

  __device__ __forceinline__ void use(typename Traits::SharedStorage& shared) const {
    if constexpr (Traits::kFolds) {
      if (has_word_) reinterpret_cast<int4*>(shared.fold.lists)[threadIdx.x] = word_;
    }
  }

 private:
  bool const has_word_;
  int4 word_ = {};
};

// The CTA's work, there for all threads when this returns. Whether it is that of the call before.
template <class Traits>
__device__ __forceinline__ bool schedule_cta(Params const& params,
                                             typename Traits::SharedStorage& shared) {
  CtaWork& work = shared.work;
  begin_call<Traits>(params, shared.merge);
  KeptFoldLists<Traits> const kept_lists(params);
  RawRequest const own = load_request(params, threadIdx.x);
  bool const is_same = recall_cta_work(params, own, work);
  if (is_same) {
    kept_lists.use(shared);
  } else {
    find_cta_work<Traits>(params, shared.schedule, work);
    __syncthreads();
    keep_cta_work(params, own, work);
  }
  clear_merge_descriptors_behind(params, work.row_tiles);
  return is_same;
}

}  // namespace etap
