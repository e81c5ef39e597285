/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Joins the parts of row tiles that several CTAs of the attention kernel shared:
 *
 *   M = max m_p,  L = sum 2^(m_p - M) l_p,  O = sum 2^(m_p - M) O_p / L,  LSE = M + log2 L
 *
 * A unit is one accumulator fragment of a warp (16 columns of d_v x 8 rows). The warps of a CTA
 * take a unit each or, with warps to spare, share the parts of a unit, each with an M of its own
 * until the shares are added; with more units than warps, a warp takes a box of four side by side.
 * Whatever a warp needs it finds by itself: this kernel is nothing but latency, two trips to memory
 * (descriptors; parts) and, for shares, one barrier.
 *
 * In batch-invariant calls the number of shares, and so the order of all sums, depends on the
 * number of parts alone; where there are more warps than shares, some have nothing to do.
 */
#pragma once

#include "etap_mla_output.cuh"

namespace etap {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;
constexpr int kMergeCtasPerSm = 2;
constexpr int kMaxCtas = 160;  // of the attention kernel: one an SM, of which Hopper has 144

// Some parts of kUnits neighbouring units joined. A lane has two rows, 2 * (lane % 4) and the next.
template <int kUnits>
struct JoinedParts {
  // Columns lane / 4 and lane / 4 + 8 of each unit: (d, row), (d, row + 1), (d + 8, row), ...
  float4 sum[kUnits];
  float2 max, total;

  __device__ static JoinedParts none() { return {{}, {-INFINITY, -INFINITY}, {}}; }

  __device__ void rescale(float2 new_max) {
    float const f0 = rescale_factor(max.x, new_max.x), f1 = rescale_factor(max.y, new_max.y);
#pragma unroll
    for (float4& s : sum) s = {s.x * f0, s.y * f1, s.z * f0, s.w * f1};
    total = {total.x * f0, total.y * f1};
    max = new_max;
  }

  // Of one that is relative to another maximum.
  __device__ void add_scaled(JoinedParts const& other) {
    float const f0 = rescale_factor(other.max.x, max.x), f1 = rescale_factor(other.max.y, max.y);
#pragma unroll
    for (int32_t i = 0; i < kUnits; ++i) {
      sum[i].x += f0 * other.sum[i].x;
      sum[i].y += f1 * other.sum[i].y;
      sum[i].z += f0 * other.sum[i].z;
      sum[i].w += f1 * other.sum[i].w;
    }
    total.x += f0 * other.total.x;
    total.y += f1 * other.total.y;
  }

  __device__ void add(JoinedParts other) {
    float2 const new_max = {fmaxf(max.x, other.max.x), fmaxf(max.y, other.max.y)};
    rescale(new_max);
    other.rescale(new_max);
#pragma unroll
    for (int32_t i = 0; i < kUnits; ++i) {
      sum[i].x += other.sum[i].x;
      sum[i].y += other.sum[i].y;
      sum[i].z += other.sum[i].z;
      sum[i].w += other.sum[i].w;
    }
    total = {total.x + other.total.x, total.y + other.total.y};
  }
};

template <class Traits>
class Merge {
  using DType = typename Traits::DType;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kUnitsPerBlock = kCkvBoxes * 4;  // of 8 rows: boxes x warps of a warpgroup
  static constexpr int kUnitsPerRowTile = kRowBlocks * kUnitsPerBlock;
  static constexpr int kPartsInFlight = 8;
  static constexpr int kUnitsOfBox = 4;  // side by side: 64 columns
  static constexpr int kPartsInFlightOfBox = 3;
  static constexpr int kDescriptorsPerLane = kMaxCtas / 32;
  static_assert(kMostFixedParts == kMergeWarps * kPartsInFlight);

 public:
  struct SharedStorage {
    JoinedParts<1> shares[kMergeWarps][32];
  };

  __device__ Merge(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  // A rehearsal goes through the code with nothing to join, while the attention kernel still runs:
  // afterwards its instructions and constants are in the caches.
  __device__ void run(int32_t num_descriptors, bool is_rehearsal) {
    // Only batch-invariant calls may have more descriptors than a warp keeps.
#pragma unroll 1
    for (first_descriptor_ = 0;; first_descriptor_ += kMaxCtas) {
      join_row_tiles(is_rehearsal ? 0 : num_descriptors, is_rehearsal);
      if (is_rehearsal || num_descriptors - first_descriptor_ <= kMaxCtas) break;
    }
  }

 private:
  __device__ bool is_batch_invariant() const { return params_.fixed_split_tiles > 0; }

  // Of the descriptors from first_descriptor_ on, as many as a warp keeps.
  __device__ void join_row_tiles(int32_t num_descriptors, bool is_rehearsal) {
    int32_t const split_row_tiles = load_descriptors(num_descriptors);
    int32_t const num_units = split_row_tiles * kUnitsPerRowTile;
    if (num_units > int32_t(gridDim.x) * kMergeWarps && !is_batch_invariant()) {
      join_boxes(split_row_tiles * (kUnitsPerRowTile / kUnitsOfBox));
      return;
    }
    // Units that a CTA joins at once: the fewest that leave none to a second round.
    int32_t const most_log_units = is_batch_invariant() ? 3 - log_merge_shares(most_parts()) : 3;
    int32_t log_units = 0;
    while (log_units < most_log_units && num_units > int32_t(gridDim.x) << log_units) ++log_units;
    int32_t first = blockIdx.x << log_units;
    int32_t const end = is_rehearsal ? first + 1 : num_units;
    for (; first < end; first += gridDim.x << log_units) {
      join(first + (warp_ & ((1 << log_units) - 1)), log_units);
    }
  }

  // Lane l keeps descriptors l, l + 32, ...; returns how many row tiles were split.
  __device__ int32_t load_descriptors(int32_t num_descriptors) {
    int32_t split_row_tiles = 0;
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) {
      int32_t const number = first_descriptor_ + i * 32 + lane_;
      descriptors_[i] =
          number < num_descriptors ? params_.merge_descriptors[number] : MergeDescriptor{};
    }
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) {
      split_row_tiles += __popc(__ballot_sync(0xffffffff, descriptors_[i].num_parts > 0));
    }
    return split_row_tiles;
  }

  // Of the row tile that has most.
  __device__ int32_t most_parts() const {
    int32_t most = 0;
#pragma unroll
    for (int32_t i = 0; i < kDescriptorsPerLane; ++i) most = max(most, descriptors_[i].num_parts);
    return __reduce_max_sync(0xffffffff, most);
  }

  struct SplitRowTile {
    MergeDescriptor descriptor;
    int32_t number;  // of the descriptor: the first CTA or, in batch-invariant calls, the row tile
  };

  // The split row tile number `number`, in the order of descriptors.
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
        found.number = first_descriptor_ + i * 32 + source;
      }
      before += __popc(mask);
    }
    return found;
  }

  // Units are numbered row tile, block of 8 rows, box of d_v, warp. Warp w of the CTA works on the
  // parts w >> log_units, + num_shares, ... of its unit, if there are so many shares.
  __device__ void join(int32_t unit, int32_t log_units) {
    int32_t const share = warp_ >> log_units;
    int32_t const row_block = unit / kUnitsPerBlock % kRowBlocks;
    int32_t const box = unit / 4 % kCkvBoxes, fragment_warp = unit % 4;
    auto const [descriptor, number] = find_split_row_tile(unit / kUnitsPerRowTile);
    int32_t const num_shares = is_batch_invariant() ? 1 << log_merge_shares(descriptor.num_parts)
                                                    : kMergeWarps >> log_units;

    auto joined = JoinedParts<1>::none();
    int32_t const first_part = share < num_shares ? share : descriptor.num_parts;
    for (int32_t part = first_part; part < descriptor.num_parts;
         part += kPartsInFlight * num_shares) {
      join_parts<kPartsInFlight>(joined, descriptor.num_parts, slots_of(number), part, num_shares,
                                 partial_index<kRowTile>(0, box, row_block, fragment_warp, lane_),
                                 row_block * 8 + 2 * (lane_ % 4));
    }
    bool const has_other_warps = log_units < 3;
    if (has_other_warps) add_shares(joined, share, num_shares, log_units);
    if (share == 0) {
      uint2 const words = transpose_fragment<DType>(fragment(joined, 0), normalizer(joined.total.x),
                                                    normalizer(joined.total.y));
      int32_t const row = row_block * 8 + lane_ / 4;
      if (row < descriptor.num_rows) {
        DType* const out = output_row<DType>(params_, descriptor.packed_row + row) +
                           box * kBoxColumns + fragment_warp * 16 + 2 * (lane_ % 4);
        *reinterpret_cast<uint32_t*>(out) = words.x;
        *reinterpret_cast<uint32_t*>(out + 8) = words.y;
      }
      if (box == 0 && fragment_warp == 0) write_lse(joined, descriptor, row_block);
    }
    if (has_other_warps) __syncthreads();  // the next units use the same shared memory
  }

  // Each warp takes boxes of four units, with all parts.
  __device__ void join_boxes(int32_t num_boxes) {
    int32_t box = warp_ * gridDim.x + blockIdx.x;
#pragma unroll 1
    for (; box < num_boxes; box += gridDim.x * kMergeWarps) join_box(box);
  }

  // Boxes are numbered as units are.
  __device__ void join_box(int32_t number_of_box) {
    int32_t const box = number_of_box % kCkvBoxes;
    int32_t const row_block = number_of_box / kCkvBoxes % kRowBlocks;
    auto const [descriptor, number] =
        find_split_row_tile(number_of_box / (kUnitsPerRowTile / kUnitsOfBox));
    auto joined = JoinedParts<kUnitsOfBox>::none();
    for (int32_t part = 0; part < descriptor.num_parts; part += kPartsInFlightOfBox) {
      join_parts<kPartsInFlightOfBox>(joined, descriptor.num_parts, slots_of(number), part, 1,
                                      partial_index<kRowTile>(0, box, row_block, 0, lane_),
                                      row_block * 8 + 2 * (lane_ % 4));
    }
    int32_t const row = row_block * 8 + lane_ / 4;
    bool const exists = row < descriptor.num_rows;
    DType* const out = output_row<DType>(params_, descriptor.packed_row + (exists ? row : 0)) +
                       box * kBoxColumns + lane_ % 4 * 8;
    float const scale_0 = normalizer(joined.total.x), scale_1 = normalizer(joined.total.y);
#pragma unroll
    for (int32_t unit = 0; unit < kUnitsOfBox; unit += 2) {
      write_fragments<DType>(fragment(joined, unit), fragment(joined, unit + 1), scale_0, scale_1,
                             out + unit * 16, exists);
    }
    if (box == 0) write_lse(joined, descriptor, row_block);
  }

  // The parts' slots. Of a row tile that begins in CTA `number`, the beginning lies in that CTA's
  // second slot, every continuation in the first; in batch-invariant calls they follow each other.
  struct PartSlots {
    int32_t begin, stride;

    __device__ int32_t operator[](int32_t part) const {
      return begin + (part == 0 ? stride - 1 : part * stride);
    }
  };

  __device__ PartSlots slots_of(int32_t number) const {
    return is_batch_invariant() ? PartSlots{number * params_.most_parts, 1}
                                : PartSlots{2 * number, 2};
  }

  // Adds parts first_part, + stride, ..., kInFlight of them or as many as there are.
  template <int kInFlight, int kUnits>
  __device__ void join_parts(JoinedParts<kUnits>& joined, int32_t num_parts, PartSlots const& slots,
                             int32_t first_part, int32_t stride, int32_t index, int32_t row) {
    JoinedParts<kUnits> parts[kInFlight];
#pragma unroll
    for (int32_t i = 0; i < kInFlight; ++i) {
      parts[i] = JoinedParts<kUnits>::none();
      int32_t const part = first_part + i * stride;
      if (part >= num_parts) continue;
      int32_t const slot = slots[part];
      float const* const source = params_.partial_out + slot * (kHeadDimCkv * kRowTile) + index;
#pragma unroll
      for (int32_t unit = 0; unit < kUnits; ++unit) {
        parts[i].sum[unit] = *reinterpret_cast<float4 const*>(source + unit * 32 * 4);
      }
      float4 const ml =
          *reinterpret_cast<float4 const*>(params_.partial_ml + slot * kRowTile + row);
      parts[i].max = {ml.x, ml.z};
      parts[i].total = {ml.y, ml.w};
    }
    float2 new_max = joined.max;
#pragma unroll
    for (int32_t i = 0; i < kInFlight; ++i) {
      new_max = {fmaxf(new_max.x, parts[i].max.x), fmaxf(new_max.y, parts[i].max.y)};
    }
    joined.rescale(new_max);
#pragma unroll
    for (int32_t i = 0; i < kInFlight; ++i) joined.add_scaled(parts[i]);
  }

  // Adds what the warps of the same unit have, in the order of their shares.
  __device__ void add_shares(JoinedParts<1>& joined, int32_t share, int32_t num_shares,
                             int32_t log_units) {
    shared_.shares[warp_][lane_] = joined;
    __syncthreads();
    if (share > 0) return;
    int32_t const end = num_shares << log_units;
    for (int32_t warp = warp_ + (1 << log_units); warp < end; warp += 1 << log_units) {
      joined.add(shared_.shares[warp][lane_]);
    }
  }

  template <int kUnits>
  __device__ static OutputFragment fragment(JoinedParts<kUnits> const& joined, int32_t unit) {
    float4 const sum = joined.sum[unit];
    return {{sum.x, sum.y, sum.z, sum.w}};
  }

  template <int kUnits>
  __device__ void write_lse(JoinedParts<kUnits> const& joined, MergeDescriptor const& descriptor,
                            int32_t row_block) const {
    if (lane_ >= 4 || params_.lse == nullptr) return;
    int32_t const row = row_block * 8 + 2 * lane_;
    float* const lse = params_.lse + descriptor.packed_row + row;
    if (row < descriptor.num_rows) lse[0] = log_sum_exp(params_, joined.max.x, joined.total.x);
    if (row + 1 < descriptor.num_rows) {
      lse[1] = log_sum_exp(params_, joined.max.y, joined.total.y);
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const warp_ = threadIdx.x / 32;
  int32_t const lane_ = threadIdx.x % 32;
  int32_t first_descriptor_ = 0;
  MergeDescriptor descriptors_[kDescriptorsPerLane];
};

template <class Traits>
__global__ void __launch_bounds__(kMergeThreads, kMergeCtasPerSm)
    etap_mla_merge_kernel(__grid_constant__ Params const params, int32_t num_descriptors) {
  __shared__ typename Merge<Traits>::SharedStorage shared;
  Merge<Traits> merge(params, shared);
#pragma unroll 1  // so that the rehearsal runs the same instructions
  for (bool is_rehearsal = true;; is_rehearsal = false) {
    merge.run(num_descriptors, is_rehearsal);
    if (!is_rehearsal) break;
    // The next kernel of a chain of dependent launches may set itself up beside this one.
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
  }
}

}  // namespace etap
