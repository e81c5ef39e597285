/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a math thread knows of its CTA's segments.
 */
#pragma once

#include "etap_mla_loader.cuh"

namespace etap {

template <class Traits>
class MathSegment {
 protected:
  using SharedStorage = typename Traits::SharedStorage;

  __device__ MathSegment(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  // This segment's queries may have been copied with the help of those that will read them, who
  // then wait for their own copies, and for each other at the barrier of `sync`.
  template <class Sync>
  __device__ __forceinline__ void await_own_queries(Sync const& sync) const {
    if (Traits::kQueryHelpers == 0 || segment_number_ > 0) return;
    await_queries();
    sync();
  }

  // Whether P has a low part, too, where the cache has the queries' type.
  __device__ bool splits_probability() const {
    return segment().request.kv_len <= Traits::kLongestSplitPRequest;
  }

  Params const& params_;
  SharedStorage& shared_;
  uint32_t segment_number_ = 0;  // of this CTA
};

}  // namespace etap
