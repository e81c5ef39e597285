/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the parts of row tiles that several CTAs of the attention kernel shared:
 *
 *   M = max m_p,  L = sum 2^(m_p - M) l_p,  w_p = 2^(m_p - M) / L
 *   O = sum w_p O_p,  LSE = M + log2 L
 *
 * A unit is one accumulator fragment of a warp (16 columns of d_v x 8 rows). A CTA joins 1 to 8
 * neighbouring units, all of the same 8 rows: it finds the w_p of these rows once, then its warps
 * share the units, or, with warps to spare, the parts of a unit.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;
constexpr int kMergeCtasPerSm = 2;
constexpr int kMaxCtas = kMergeThreads;  // of the attention kernel: one thread reads one descriptor

template <class Traits>
class Merge {
  using DType = typename Traits::DType;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kUnitsPerBlock = kCkvBoxes * 4;  // of 8 rows: boxes x warps of a warpgroup
  static constexpr int kUnitsPerRowTile = kRowBlocks * kUnitsPerBlock;
  static constexpr int kLoadsInFlight = 8;

 public:
  struct SharedStorage {
    MergeDescriptor descriptors[kMaxCtas];
    int32_t split_ctas[kMaxCtas];  // CTAs in which a split row tile begins
    int32_t warp_counts[kMergeWarps];
    float weights[kMaxCtas][8];  // w_p of the current 8 rows
    float warp_max[kMergeWarps][8], warp_sum[kMergeWarps][8];
    float4 sums[kMergeWarps][32];
  };

  __device__ Merge(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  // Goes through the code with nothing to join, while the attention kernel still runs: afterwards
  // its instructions and constants are in the caches.
  __device__ void rehearse() {
    if (threadIdx.x == 0) {
      shared_.descriptors[0] = {};
      shared_.split_ctas[0] = 0;
    }
    __syncthreads();
    join(/*unit=*/0, /*log_units=*/0);
  }

  __device__ void run(int32_t num_ctas) {
    int32_t const num_units = list_split_row_tiles(num_ctas) * kUnitsPerRowTile;
    // Units that a CTA joins at once: the fewest that leave none to a second round.
    int32_t log_units = 0;
    while (log_units < 3 && num_units > int32_t(gridDim.x) << log_units) ++log_units;
    for (int32_t first = blockIdx.x << log_units; first < num_units;
         first += gridDim.x << log_units) {
      join(first + (warp_ & ((1 << log_units) - 1)), log_units);
    }
  }

 private:
  // Compacts the descriptors; returns how many row tiles were split.
  __device__ int32_t list_split_row_tiles(int32_t num_ctas) {
    MergeDescriptor descriptor = {};
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

  // The beginning of a row tile lies in its CTA's second slot, every continuation in the first.
  __device__ static int32_t slot_of(int32_t first_cta, int32_t part) {
    return 2 * (first_cta + part) + (part == 0 ? 1 : 0);
  }

  // Units are numbered row tile, block of 8 rows, box of d_v, warp. Warp w of the CTA works on the
  // parts w >> log_units, + num_shares, ... of its unit.
  __device__ void join(int32_t unit, int32_t log_units) {
    int32_t const num_shares = kMergeWarps >> log_units, share = warp_ >> log_units;
    int32_t const row_tile = unit / kUnitsPerRowTile;
    int32_t const row_block = unit / kUnitsPerBlock % kRowBlocks;
    int32_t const box = unit / 4 % kCkvBoxes, fragment_warp = unit % 4;
    MergeDescriptor const descriptor = shared_.descriptors[row_tile];
    int32_t const first_cta = shared_.split_ctas[row_tile];
    auto load = [&](int32_t part) {
      int32_t const index =
          partial_index<kRowTile>(slot_of(first_cta, part), box, row_block, fragment_warp);
      return part < descriptor.num_parts
                 ? *reinterpret_cast<float4 const*>(params_.partial_out + index)
                 : float4{};
    };
    // The first loads are under way while the weights are found.
    float4 values[kLoadsInFlight];
#pragma unroll
    for (int32_t i = 0; i < kLoadsInFlight; ++i) values[i] = load(share + i * num_shares);
    find_weights(descriptor, first_cta, row_block, box == 0 && fragment_warp == 0 && share == 0);

    float4 sum = {};
    for (int32_t part = share; part < descriptor.num_parts; part += kLoadsInFlight * num_shares) {
#pragma unroll
      for (int32_t i = 0; i < kLoadsInFlight; ++i) {
        int32_t const this_part = part + i * num_shares;
        if (this_part >= descriptor.num_parts) break;
        auto const weight =
            *reinterpret_cast<float2 const*>(&shared_.weights[this_part][2 * (lane_ % 4)]);
        sum.x += weight.x * values[i].x;
        sum.y += weight.y * values[i].y;
        sum.z += weight.x * values[i].z;
        sum.w += weight.y * values[i].w;
      }
      int32_t const next_part = part + kLoadsInFlight * num_shares;
      if (next_part >= descriptor.num_parts) break;
#pragma unroll
      for (int32_t i = 0; i < kLoadsInFlight; ++i) values[i] = load(next_part + i * num_shares);
    }
    if (num_shares > 1) sum = add_shares(sum, share, log_units);
    if (share == 0) {
      int32_t const row = row_block * 8 + lane_ / 4;
      bool const exists = row < descriptor.num_rows;
      DType* const out_row = output_row<DType>(params_, descriptor.packed_row + (exists ? row : 0));
      store_fragment({{sum.x, sum.y, sum.z, sum.w}}, 1.f, 1.f, out_row,
                     box * kBoxColumns + fragment_warp * 16, exists);
    }
    __syncthreads();  // the next units use the same shared memory
  }

  // w_p of 8 rows for all parts; a thread takes row threadIdx % 8 of every 32nd part. Sums over
  // parts run in a fixed order: lanes, then warps.
  __device__ void find_weights(MergeDescriptor const& descriptor, int32_t first_cta,
                               int32_t row_block, bool writes_lse) {
    constexpr int32_t kPartsAtOnce = kMergeThreads / 8;
    constexpr int32_t kParts = kMaxCtas / kPartsAtOnce;  // a thread's, at most
    int32_t const row = threadIdx.x % 8, first_part = threadIdx.x / 8;
    float row_max[kParts], row_sum[kParts];
    float max = -INFINITY;
#pragma unroll
    for (int32_t i = 0; i < kParts; ++i) {
      int32_t const part = first_part + i * kPartsAtOnce;
      float2 ml = {-INFINITY, 0.f};
      if (part < descriptor.num_parts) {
        ml = params_.partial_ml[slot_of(first_cta, part) * kRowTile + row_block * 8 + row];
      }
      row_max[i] = ml.x;
      row_sum[i] = ml.y;
      max = fmaxf(max, ml.x);
    }
    max = over_parts(max, shared_.warp_max, [](float a, float b) { return fmaxf(a, b); });
    float sum = 0.f;
#pragma unroll
    for (int32_t i = 0; i < kParts; ++i) {
      row_max[i] = rescale_factor(row_max[i], max);
      sum += row_max[i] * row_sum[i];
    }
    sum = over_parts(sum, shared_.warp_sum, [](float a, float b) { return a + b; });
    float const scale = normalizer(sum);
#pragma unroll
    for (int32_t i = 0; i < kParts; ++i) {
      int32_t const part = first_part + i * kPartsAtOnce;
      if (part < descriptor.num_parts) shared_.weights[part][row] = row_max[i] * scale;
    }
    int32_t const tile_row = row_block * 8 + row;
    if (writes_lse && lane_ < 8 && params_.lse != nullptr && tile_row < descriptor.num_rows) {
      params_.lse[descriptor.packed_row + tile_row] = log_sum_exp(params_, max, sum);
    }
    __syncthreads();
  }

  // Combines the values that all threads of the CTA hold for the same row.
  template <typename Combine>
  __device__ float over_parts(float value, float (&warp_values)[kMergeWarps][8], Combine combine) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, 8));
    value = combine(value, __shfl_xor_sync(0xffffffff, value, 16));
    if (lane_ < 8) warp_values[warp_][lane_] = value;
    __syncthreads();
    value = warp_values[0][lane_ % 8];
#pragma unroll
    for (int32_t warp = 1; warp < kMergeWarps; ++warp) {
      value = combine(value, warp_values[warp][lane_ % 8]);
    }
    return value;
  }

  // Adds what the warps of the same unit have, in the order of their shares.
  __device__ float4 add_shares(float4 sum, int32_t share, int32_t log_units) {
    shared_.sums[warp_][lane_] = sum;
    __syncthreads();
    if (share > 0) return sum;
    for (int32_t warp = warp_ + (1 << log_units); warp < kMergeWarps; warp += 1 << log_units) {
      float4 const other = shared_.sums[warp][lane_];
      sum.x += other.x;
      sum.y += other.y;
      sum.z += other.z;
      sum.w += other.w;
    }
    return sum;
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const warp_ = threadIdx.x / 32;
  int32_t const lane_ = threadIdx.x % 32;
};

template <class Traits>
__global__ void __launch_bounds__(kMergeThreads)
    etap_mla_merge_kernel(__grid_constant__ Params const params, int32_t num_ctas) {
  __shared__ typename Merge<Traits>::SharedStorage shared;
  Merge<Traits> merge(params, shared);
  merge.rehearse();
  cudaGridDependencySynchronize();
  merge.run(num_ctas);
}

}  // namespace etap
