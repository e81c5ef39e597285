/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The merge of batch-invariant calls, where a CTA of the attention kernel has parts of any row
 * tiles. All CTAs share the units of all split row tiles. Whatever a warp needs it finds by itself:
 * this kernel is nothing but latency, two trips to memory (descriptors; parts) and, for shares, one
 * barrier.
 */
#pragma once

#include "etap_mla_merge.cuh"

namespace etap {

// The descriptors of all row tiles, of which a warp looks at some at a time.
class DescriptorSearch {
 public:
  __device__ explicit DescriptorSearch(Params const& params) : params_(params) {}

  // Lane l keeps descriptors first + l, + 32, ...; returns how many row tiles were split.
  __device__ int32_t load(int32_t first, int32_t num_descriptors) {
    first_ = first;
    int32_t split_row_tiles = 0;
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) {
      int32_t const number = first + i * 32 + lane_;
      descriptors_[i] =
          number < num_descriptors ? params_.merge_descriptors[number] : MergeDescriptor{};
    }
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) {
      split_row_tiles += __popc(__ballot_sync(0xffffffff, descriptors_[i].num_parts > 0));
    }
    return split_row_tiles;
  }

  // Of the row tile that has most.
  __device__ int32_t most_parts() const {
    int32_t most = 0;
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) most = max(most, descriptors_[i].num_parts);
    return __reduce_max_sync(0xffffffff, most);
  }

  // The split row tile number `number`, in the order of descriptors.
  __device__ SplitRowTile find(int32_t number) const {
    SplitRowTile found = {};
    int32_t before = 0;
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) {
      bool const is_split = descriptors_[i].num_parts > 0;
      uint32_t const mask = __ballot_sync(0xffffffff, is_split);
      int32_t const rank = before + __popc(mask & ((1u << lane_) - 1));
      uint32_t const owner = __ballot_sync(0xffffffff, is_split && rank == number);
      if (owner != 0) {
        int32_t const source = __ffs(owner) - 1;
        found.descriptor.num_parts = __shfl_sync(0xffffffff, descriptors_[i].num_parts, source);
        found.descriptor.num_rows = __shfl_sync(0xffffffff, descriptors_[i].num_rows, source);
        found.descriptor.packed_row = __shfl_sync(0xffffffff, descriptors_[i].packed_row, source);
        found.number = first_ + i * 32 + source;
      }
      before += __popc(mask);
    }
    return found;
  }

  static constexpr int kDescriptors = 96;

 private:
  static constexpr int kPerLane = kDescriptors / 32;
  Params const& params_;
  int32_t const lane_ = threadIdx.x % 32;
  int32_t first_ = 0;
  MergeDescriptor descriptors_[kPerLane];
};

// A rehearsal goes through the code with nothing to join, while the attention kernel still runs:
// afterwards its instructions and constants are in the caches.
template <class Traits>
__global__ void __launch_bounds__(kMergeThreads, kMergeCtasPerSm)
    etap_mla_merge_kernel(__grid_constant__ Params const params) {
  using MergeOfWorkspace = Merge<Traits, false>;
  constexpr int32_t kUnits = MergeOfWorkspace::kUnitsPerRowTile;
  __shared__ typename MergeOfWorkspace::SharedStorage shared;
  MergeOfWorkspace merge(params, shared, blockIdx.x, gridDim.x, PartsToJoin::in_workspace(params));
  DescriptorSearch search(params);
  auto const find = [&search](int32_t i) { return search.find(i); };
#pragma unroll 1  // so that the rehearsal runs the same instructions
  for (bool is_rehearsal = true;; is_rehearsal = false) {
    int32_t const num_descriptors = is_rehearsal ? 0 : params.most_row_tiles;
#pragma unroll 1
    for (int32_t first = 0; first <= num_descriptors; first += search.kDescriptors) {
      int32_t const split_row_tiles = search.load(first, num_descriptors);
      int32_t const most_log_units = 3 - log_merge_shares(search.most_parts());
      merge.join_units(is_rehearsal ? int32_t(gridDim.x) : split_row_tiles * kUnits, most_log_units,
                       find);
    }
    if (!is_rehearsal) break;
    // The next kernel of a chain of dependent launches may set itself up beside this one.
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
  }
}

}  // namespace etap
