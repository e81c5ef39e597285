/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the parts of row tiles that several CTAs of the attention kernel shared:
 *
 *   M = max m_p,  L = sum 2^(m_p - M) l_p,  O = sum w_p O_p with w_p = 2^(m_p - M) / L,
 *   LSE = M + log2 L
 *
 * A unit of work is a block of 8 rows of a split row tile, or some of its 32 fragments (16 columns
 * of d_v x 8 rows, what a warp has of an accumulator) when there are CTAs to spare. All warps of
 * the CTA work on one unit. This kernel is nothing but latency, so everything is asked for at once:
 *
 *   1  descriptors of split row tiles                  -> which rows, how many parts
 *   2  m, l of all parts; O of the first parts         -> one trip to memory
 *   3  weights w_p -> shared memory; barrier
 *   4  O += w_p O_p, further parts if there are many
 *   5  fragments that several warps shared: sum through shared memory
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;
constexpr int kMergeCtasPerSm = 2;
constexpr int kMaxCtas = 160;  // of the attention kernel: one an SM, of which Hopper has 144

template <class Traits>
class Merge {
  using DType = typename Traits::DType;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kFragments = kCkvBoxes * 4;  // of 8 rows: boxes x warps of a warpgroup
  static constexpr int kLoadsInFlight = 16;         // float4 of O a thread
  static constexpr int kDescriptorsPerLane = kMaxCtas / 32;

 public:
  struct SharedStorage {
    float weight[kMaxCtas][8];       // of each part and row
    float2 warp_ml[kMergeWarps][8];  // maxima and sums of some parts
    float4 sum[kMergeWarps][32];     // of warps that share a fragment
  };

  __device__ Merge(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  // Goes through the code with nothing to join, while the attention kernel still runs: afterwards
  // its instructions and constants are in the caches.
  __device__ void rehearse() {
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) descriptors_[i] = {};
    join(/*unit=*/0, /*log_units=*/5);
  }

  __device__ void run(int32_t num_ctas) {
    int32_t const num_blocks = load_descriptors(num_ctas) * kRowBlocks;
    // Units that a block of rows is cut into: the most that leave none to a second round.
    int32_t log_units = 5;
    while (log_units > 0 && num_blocks << log_units > int32_t(gridDim.x)) --log_units;
    for (int32_t unit = blockIdx.x; unit < num_blocks << log_units; unit += gridDim.x) {
      join(unit, log_units);
    }
  }

 private:
  // Lane l keeps descriptors l, l + 32, ...; returns how many row tiles were split.
  __device__ int32_t load_descriptors(int32_t num_ctas) {
    int32_t split_row_tiles = 0;
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) {
      int32_t const cta = i * 32 + lane_;
      descriptors_[i] = cta < num_ctas ? params_.merge_descriptors[cta] : MergeDescriptor{};
    }
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) {
      split_row_tiles += __popc(__ballot_sync(0xffffffff, descriptors_[i].num_parts > 0));
    }
    return split_row_tiles;
  }

  struct SplitRowTile {
    MergeDescriptor descriptor;
    int32_t first_cta;
  };

  // The split row tile number `number`, in the order of the CTAs in which they begin.
  __device__ SplitRowTile find_split_row_tile(int32_t number) const {
    SplitRowTile found = {};
    int32_t before = 0;
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) {
      bool const is_split = descriptors_[i].num_parts > 0;
      uint32_t const mask = __ballot_sync(0xffffffff, is_split);
      int32_t const rank = before + __popc(mask & ((1u << lane_) - 1));
      uint32_t const owner = __ballot_sync(0xffffffff, is_split && rank == number);
      if (owner != 0) {
        int32_t const source = __ffs(owner) - 1;
        found.descriptor.num_parts = __shfl_sync(0xffffffff, descriptors_[i].num_parts, source);
        found.descriptor.num_rows = __shfl_sync(0xffffffff, descriptors_[i].num_rows, source);
        found.descriptor.packed_row = __shfl_sync(0xffffffff, descriptors_[i].packed_row, source);
        found.first_cta = i * 32 + source;
      }
      before += __popc(mask);
    }
    return found;
  }

  // Units are numbered row tile, block of 8 rows, share of its fragments.
  __device__ void join(int32_t unit, int32_t log_units) {
    int32_t const block = unit >> log_units, share = unit & ((1 << log_units) - 1);
    auto const [descriptor, first_cta] = find_split_row_tile(block / kRowBlocks);
    BlockOfRows const rows = {descriptor, first_cta, block % kRowBlocks};
    if (log_units == 0) {
      join_fragments<4>(rows, share, 0);
    } else if (log_units == 1) {
      join_fragments<2>(rows, share, 0);
    } else {
      join_fragments<1>(rows, share, log_units - 2);
    }
  }

  struct BlockOfRows {
    MergeDescriptor descriptor;
    int32_t first_cta;
    int32_t block;  // of the row tile

    // The beginning of a row tile lies in its CTA's second slot, every continuation in the first.
    __device__ int32_t slot(int32_t part) const {
      return 2 * (first_cta + part) + (part == 0 ? 1 : 0);
    }
  };

  // kPerWarp fragments a warp, or one for 2^log_sharers warps, which take turns with its parts.
  template <int kPerWarp>
  __device__ void join_fragments(BlockOfRows const& rows, int32_t unit_share, int32_t log_sharers) {
    constexpr int32_t kPartsInFlight = kLoadsInFlight / kPerWarp;
    int32_t const num_parts = rows.descriptor.num_parts;
    int32_t const sharers = 1 << log_sharers, sharer = warp_ & (sharers - 1);
    int32_t const first_fragment = ((unit_share * kMergeWarps + warp_) >> log_sharers) * kPerWarp;
    float4 parts[kPerWarp][kPartsInFlight];
    load_parts(parts, rows, first_fragment, sharer, sharers);
    weigh_parts(rows, /*writes_lse=*/unit_share == 0);

    float4 sums[kPerWarp] = {};
    add_parts(sums, parts, num_parts, sharer, sharers);
#pragma unroll 1
    for (int32_t part = sharer + kPartsInFlight * sharers; part < num_parts;
         part += kPartsInFlight * sharers) {
      load_parts(parts, rows, first_fragment, part, sharers);
      add_parts(sums, parts, num_parts, part, sharers);
    }
    if (sharers > 1) add_sharers(sums[0], sharers, sharer);
    if (sharer == 0) {
#pragma unroll
      for (int32_t i = 0; i < kPerWarp; ++i) write_fragment(sums[i], rows, first_fragment + i);
    }
    __syncthreads();  // the next unit uses the same shared memory
  }

  // O of parts first_part, + stride, ..., as many as are in flight or exist.
  template <int kPerWarp, int kPartsInFlight>
  __device__ void load_parts(float4 (&parts)[kPerWarp][kPartsInFlight], BlockOfRows const& rows,
                             int32_t first_fragment, int32_t first_part, int32_t stride) const {
#pragma unroll
    for (int32_t i = 0; i < kPartsInFlight; ++i) {
      int32_t const part = first_part + i * stride;
#pragma unroll
      for (int32_t j = 0; j < kPerWarp; ++j) {
        parts[j][i] = {};
        if (part >= rows.descriptor.num_parts) continue;
        int32_t const fragment = first_fragment + j;
        int32_t const index =
            partial_index<kRowTile>(rows.slot(part), fragment / 4, rows.block, fragment % 4, lane_);
        parts[j][i] = *reinterpret_cast<float4 const*>(params_.partial_out + index);
      }
    }
  }

  template <int kPerWarp, int kPartsInFlight>
  __device__ void add_parts(float4 (&sums)[kPerWarp],
                            float4 const (&parts)[kPerWarp][kPartsInFlight], int32_t num_parts,
                            int32_t first_part, int32_t stride) const {
#pragma unroll
    for (int32_t i = 0; i < kPartsInFlight; ++i) {
      int32_t const part = first_part + i * stride;
      if (part >= num_parts) break;
      // A lane has two rows: 2 * (lane % 4) and the next.
      auto const weight = *reinterpret_cast<float2 const*>(&shared_.weight[part][2 * (lane_ % 4)]);
#pragma unroll
      for (int32_t j = 0; j < kPerWarp; ++j) {
        sums[j].x += weight.x * parts[j][i].x;
        sums[j].y += weight.y * parts[j][i].y;
        sums[j].z += weight.x * parts[j][i].z;
        sums[j].w += weight.y * parts[j][i].w;
      }
    }
  }

  // Weights of all parts for the block's 8 rows: thread t has row t % 8 of parts t / 8, + 32, ...
  __device__ void weigh_parts(BlockOfRows const& rows, bool writes_lse) {
    constexpr int32_t kPartsPerPass = kMergeThreads / 8, kPasses = kMaxCtas / kPartsPerPass;
    static_assert(kPasses * kPartsPerPass == kMaxCtas);
    int32_t const row = threadIdx.x % 8, first_part = threadIdx.x / 8;
    float2 ml[kPasses];
    float max = -INFINITY;
#pragma unroll
    for (int32_t i = 0; i < kPasses; ++i) {
      int32_t const part = first_part + i * kPartsPerPass;
      ml[i] = {-INFINITY, 0.f};
      if (part >= rows.descriptor.num_parts) continue;
      ml[i] = params_.partial_ml[rows.slot(part) * kRowTile + rows.block * 8 + row];
    }
#pragma unroll
    for (int32_t i = 0; i < kPasses; ++i) max = fmaxf(max, ml[i].x);
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 8));
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 16));
    float sum = 0.f;
#pragma unroll
    for (int32_t i = 0; i < kPasses; ++i) sum += rescale_factor(ml[i].x, max) * ml[i].y;
    sum += __shfl_xor_sync(0xffffffff, sum, 8);
    sum += __shfl_xor_sync(0xffffffff, sum, 16);
    if (lane_ < 8) shared_.warp_ml[warp_][row] = {max, sum};
    __syncthreads();

    float total_max = -INFINITY, total = 0.f;
#pragma unroll
    for (int32_t i = 0; i < kMergeWarps; ++i) {
      total_max = fmaxf(total_max, shared_.warp_ml[i][row].x);
    }
#pragma unroll
    for (int32_t i = 0; i < kMergeWarps; ++i) {
      float2 const of_warp = shared_.warp_ml[i][row];
      total += rescale_factor(of_warp.x, total_max) * of_warp.y;
    }
    float const scale = normalizer(total);
#pragma unroll
    for (int32_t i = 0; i < kPasses; ++i) {
      int32_t const part = first_part + i * kPartsPerPass;
      shared_.weight[part][row] = rescale_factor(ml[i].x, total_max) * scale;
    }
    int32_t const row_of_tile = rows.block * 8 + row;
    if (writes_lse && threadIdx.x < 8 && params_.lse != nullptr &&
        row_of_tile < rows.descriptor.num_rows) {
      params_.lse[rows.descriptor.packed_row + row_of_tile] =
          log_sum_exp(params_, total_max, total);
    }
    __syncthreads();
  }

  // Warps of one fragment are neighbours; the first has the result.
  __device__ void add_sharers(float4& sum, int32_t sharers, int32_t sharer) {
    shared_.sum[warp_][lane_] = sum;
    __syncthreads();
    if (sharer > 0) return;
    for (int32_t i = 1; i < sharers; ++i) {
      float4 const other = shared_.sum[warp_ + i][lane_];
      sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
    }
  }

  __device__ void write_fragment(float4 const& sum, BlockOfRows const& rows,
                                 int32_t fragment) const {
    int32_t const row = rows.block * 8 + lane_ / 4;
    bool const exists = row < rows.descriptor.num_rows;
    DType* const out_row =
        output_row<DType>(params_, rows.descriptor.packed_row + (exists ? row : 0));
    store_fragment({{sum.x, sum.y, sum.z, sum.w}}, 1.f, 1.f, out_row, fragment * 16, exists);
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const warp_ = threadIdx.x / 32;
  int32_t const lane_ = threadIdx.x % 32;
  MergeDescriptor descriptors_[kDescriptorsPerLane];
};

template <class Traits>
__global__ void __launch_bounds__(kMergeThreads, kMergeCtasPerSm)
    etap_mla_merge_kernel(__grid_constant__ Params const params, int32_t num_ctas) {
  __shared__ typename Merge<Traits>::SharedStorage shared;
  Merge<Traits> merge(params, shared);
  merge.rehearse();
  // The next kernel of a chain of dependent launches may set itself up beside this one.
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  merge.run(num_ctas);
}

}  // namespace etap
