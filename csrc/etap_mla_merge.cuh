/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the parts of row tiles that several CTAs of the attention kernel shared:
 *
 *   M = max m_p,  L = sum 2^(m_p - M) l_p,  O = sum 2^(m_p - M) O_p / L,  LSE = M + log2 L
 *
 * A unit is one accumulator fragment of a warp (16 columns of d_v x 8 rows); a warp adds up one
 * unit over all parts, or over its share of them when there are warps to spare.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;
constexpr int kMergeCtasPerSm = 2;
constexpr int kMaxCtas = kMergeThreads;  // of the attention kernel: one thread reads one descriptor

// Sum over parts of the two rows that a thread sees, and of its fragment.
struct PartialSum {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};
  float value[4] = {0.f, 0.f, 0.f, 0.f};  // as in OutputFragment: rows alternate

  __device__ __forceinline__ void add(PartialSum const& other) {
#pragma unroll
    for (int32_t r = 0; r < 2; ++r) {
      float const new_max = fmaxf(row_max[r], other.row_max[r]);
      float const mine = rescale_factor(row_max[r], new_max);
      float const theirs = rescale_factor(other.row_max[r], new_max);
      row_max[r] = new_max;
      row_sum[r] = row_sum[r] * mine + other.row_sum[r] * theirs;
      value[r] = value[r] * mine + other.value[r] * theirs;
      value[r + 2] = value[r + 2] * mine + other.value[r + 2] * theirs;
    }
  }
};

template <int kRowTile>
class Merge {
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kUnitsPerRowTile = kCkvBoxes * kRowBlocks * 4;

 public:
  struct SharedStorage {
    MergeDescriptor descriptors[kMaxCtas];
    int32_t split_ctas[kMaxCtas];  // CTAs in which a split row tile begins
    int32_t warp_counts[kMergeWarps];
    PartialSum sums[kMergeWarps][32];
  };

  __device__ Merge(Params const& params, SharedStorage& shared) : params_(params), shared_(shared) {}

  template <typename DType>
  __device__ void run(int32_t num_ctas) {
    int32_t const num_units = list_split_row_tiles(num_ctas) * kUnitsPerRowTile;
    int32_t warps_per_unit = kMergeWarps;
    while (warps_per_unit > 1 && num_units * warps_per_unit > int32_t(gridDim.x) * kMergeWarps) {
      warps_per_unit /= 2;
    }
    int32_t const units_at_once = kMergeWarps / warps_per_unit;
    int32_t const share = warp_ % warps_per_unit;
    for (int32_t first = blockIdx.x * units_at_once; first < num_units;
         first += gridDim.x * units_at_once) {
      int32_t const unit = first + warp_ / warps_per_unit;
      PartialSum sum;
      if (unit < num_units) sum = add_parts(unit, share, warps_per_unit);
      if (warps_per_unit > 1) {
        shared_.sums[warp_][lane_] = sum;
        __syncthreads();
        for (int32_t other = 1; share == 0 && other < warps_per_unit; ++other) {
          sum.add(shared_.sums[warp_ + other][lane_]);
        }
        __syncthreads();
      }
      if (unit < num_units && share == 0) write<DType>(unit, sum);
    }
  }

 private:
  // Compacts the descriptors; returns how many row tiles were split.
  __device__ int32_t list_split_row_tiles(int32_t num_ctas) {
    MergeDescriptor descriptor = {0, 0, 0};
    if (int32_t(threadIdx.x) < num_ctas) descriptor = params_.merge_descriptors[threadIdx.x];
    bool const is_split = descriptor.num_parts > 0;
    uint32_t const mask = __ballot_sync(0xffffffff, is_split);
    if (lane_ == 0) shared_.warp_counts[warp_] = __popc(mask);
    __syncthreads();
    int32_t before = __popc(mask & ((1u << lane_) - 1)), total = 0;
#pragma unroll
    for (int32_t warp = 0; warp < kMergeWarps; ++warp) {
      if (warp < warp_) before += shared_.warp_counts[warp];
      total += shared_.warp_counts[warp];
    }
    if (is_split) {
      shared_.descriptors[before] = descriptor;
      shared_.split_ctas[before] = threadIdx.x;
    }
    __syncthreads();
    return total;
  }

  __device__ PartialSum add_parts(int32_t unit, int32_t share, int32_t num_shares) const {
    constexpr int32_t kLoadsInFlight = 4;
    Place const place = place_of(unit);
    int32_t const num_parts = shared_.descriptors[place.row_tile].num_parts;
    int32_t const first_cta = shared_.split_ctas[place.row_tile];
    PartialSum sum;
    for (int32_t first = share; first < num_parts; first += kLoadsInFlight * num_shares) {
      PartialSum parts[kLoadsInFlight];
#pragma unroll
      for (int32_t i = 0; i < kLoadsInFlight; ++i) {
        int32_t const part = first + i * num_shares;
        if (part < num_parts) parts[i] = load_part(place, first_cta, part);
      }
#pragma unroll
      for (int32_t i = 0; i < kLoadsInFlight; ++i) sum.add(parts[i]);
    }
    return sum;
  }

  struct Place {
    int32_t row_tile, box, row_block, warp;
  };

  __device__ static Place place_of(int32_t unit) {
    int32_t const fragment = unit % kUnitsPerRowTile;
    return {unit / kUnitsPerRowTile, fragment / (4 * kRowBlocks), fragment / 4 % kRowBlocks,
            fragment % 4};
  }

  __device__ PartialSum load_part(Place const& place, int32_t first_cta, int32_t part) const {
    // The beginning of a row tile lies in its CTA's second slot, every continuation in the first.
    int64_t const slot = 2 * int64_t(first_cta + part) + (part == 0 ? 1 : 0);
    int32_t const row = place.row_block * 8 + 2 * (lane_ % 4);
    auto const ml = *reinterpret_cast<float4 const*>(params_.partial_ml + slot * kRowTile + row);
    auto const value = *reinterpret_cast<float4 const*>(
        params_.partial_out +
        partial_index<kRowTile>(slot, place.box, place.row_block, place.warp));
    return {{ml.x, ml.z}, {ml.y, ml.w}, {value.x, value.y, value.z, value.w}};
  }

  template <typename DType>
  __device__ void write(int32_t unit, PartialSum const& sum) const {
    Place const place = place_of(unit);
    MergeDescriptor const descriptor = shared_.descriptors[place.row_tile];
    int32_t const row_of_lane = place.row_block * 8 + lane_ / 4;
    bool const exists = row_of_lane < descriptor.num_rows;
    DType* const out_row =
        output_row<DType>(params_, descriptor.packed_row + (exists ? row_of_lane : 0));
    OutputFragment const fragment = {{sum.value[0], sum.value[1], sum.value[2], sum.value[3]}};
    store_fragment(fragment, normalizer(sum.row_sum[0]), normalizer(sum.row_sum[1]), out_row,
                   place.box * kBoxColumns + place.warp * 16, exists);

    bool const writes_lse =
        params_.lse != nullptr && place.box == 0 && place.warp == 0 && lane_ < 4;
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      int32_t const row = place.row_block * 8 + 2 * lane_ + i;
      if (writes_lse && row < descriptor.num_rows) {
        params_.lse[descriptor.packed_row + row] =
            log_sum_exp(params_, sum.row_max[i], sum.row_sum[i]);
      }
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const warp_ = threadIdx.x / 32;
  int32_t const lane_ = threadIdx.x % 32;
};

template <class Traits>
__global__ void __launch_bounds__(kMergeThreads)
    etap_mla_merge_kernel(__grid_constant__ Params const params, int32_t num_ctas) {
  using RowTileMerge = Merge<Traits::kRowTile>;
  __shared__ typename RowTileMerge::SharedStorage shared;
  cudaGridDependencySynchronize();
  RowTileMerge(params, shared).template run<typename Traits::DType>(num_ctas);
}

}  // namespace etap
