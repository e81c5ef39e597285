/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * What a math thread knows of its CTA's segments.
 */
#pragma once

#include "etap_mla_traits.cuh"

namespace etap {

template <class Traits>
class MathSegment {
 protected:
  using SharedStorage = typename Traits::SharedStorage;

  __device__ MathSegment(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  // Whether this segment's queries were copied with this warpgroup's help, which has to wait.
  __device__ bool helped_with_queries() const {
    return Traits::kQueryHelpers > 0 && segment_number_ == 0;
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
