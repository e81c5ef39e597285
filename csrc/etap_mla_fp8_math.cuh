/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math warpgroups over a cache of fp8. Math warpgroup g = 0, 1, for each pair of token tiles
 * (t, t + 1), of which the last may be a single tile:
 *
 *   S^T = K Q^T of tile t + g; its maxima over tokens -> shared memory
 *   -- barrier --  r = reference near the running maxima; O^T[g] *= 2^(r_old - r)
 *   P^T = 2^(S^T - r) of tile t + g -> shared memory
 *   -- barrier --  O^T[g] += V^T[g] P^T of both tiles, where [g] is half of d_v
 *
 * WGMMA's A operand (K, then V^T) comes from registers, and turns from e4m3 into fp16 on its way
 * there: exact, so nothing is quantised, and P in fp16 needs no second part.
 */
#pragma once

#include <cuda/ptx>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_fp8_operands.cuh"
#include "etap_mla_fp8_queries.cuh"
#include "etap_mla_fp8_traits.cuh"
#include "etap_mla_loader.cuh"
#include "etap_mla_output.cuh"

namespace etap {

// The softmax subtracts a reference r from the scores (base 2), not their maximum: when it is set,
// 8 below the maximum, and set anew when the maximum is more than 15 above it. So P is at most 2^15
// (fp16 ends at 2^16), probabilities down to 2^-22 of the largest stay normal fp16 numbers, and O^T
// is hardly ever rescaled. Sums, partial results and LSE are relative to r.
constexpr float kReferenceBelowMax = 8.f;
constexpr float kLargestProbabilityLog2 = 15.f;

// Integers in the order of floats; its own inverse.
__device__ __forceinline__ int32_t comparable_bits(int32_t float_bits) {
  return float_bits ^ (float_bits < 0 ? 0x7fffffff : 0);
}

template <class Traits>
class Fp8MathWarpgroup {
  using DType = typename Traits::DType;
  using Operand = typename Traits::Operand;
  using SharedStorage = typename Traits::SharedStorage;
  using Boxes = typename Traits::Boxes;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr bool kHasKpeScores = kRowTile <= 32;
  static constexpr int kStoreBlocks = kRowBlocks == 1 ? 1 : 2;  // row blocks that stmatrix stores

 public:
  __device__ Fp8MathWarpgroup(Params const& params, SharedStorage& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    while (begin_segment()) {
#pragma unroll 1
      for (tile_ = segment().tile_begin; tile_ < segment().tile_end; tile_ += kMathWarpgroups) {
        if (has_tile()) compute_scores();
        share_tile_max();
        float reference[kRows];
        update_reference(reference);
        if (has_tile()) store_probabilities(reference);
        if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
        publish_probabilities();
        if (is_single_tile()) {
          accumulate_output<1>();
        } else {
          accumulate_output<2>();
        }
        reference_slot_ ^= 1;
      }
      finish_segment();
      ++segment_number_;
    }
  }

 private:
  // Rows of an accumulator that this thread sees: row(2 b + c) = 8 b + 2 (lane % 4) + c.
  __device__ int32_t row(int32_t i) const { return row(i, lane_); }
  __device__ static int32_t row(int32_t i, int32_t lane) {
    return i / 2 * 8 + 2 * (lane % 4) + i % 2;
  }

  // The lane, but what is computed from it cannot be moved ahead of the loop over tiles, where 64
  // rows leave no registers to keep it.
  __device__ int32_t fresh_lane() const {
    int32_t lane = lane_;
    asm volatile("" : "+r"(lane));
    return lane;
  }

  __device__ Segment const& segment() const { return shared_.segments[segment_number_ & 1]; }

  // Whether this warpgroup's tile of the pair exists: the last pair may be a single tile.
  __device__ bool has_tile() const { return tile_ + warpgroup_ < segment().tile_end; }
  __device__ bool is_single_tile() const { return tile_ + 1 == segment().tile_end; }

  // Slots of the pair's tile `half`.
  __device__ RingPosition kpe_slot(int32_t half) const {
    return ring_.after(half * Boxes::kPerTile);
  }
  __device__ RingPosition ckv_slot(int32_t half, int32_t box) const {
    return ring_.after(half * Boxes::kPerTile + 1 + box);
  }

  __device__ void wait_for_box(RingPosition const& slot) const {
    Barrier::wait(&shared_.box_full[slot.index], slot.parity);
  }

  // Waits for the next segment and its queries; false if there is none.
  __device__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    if (segment().num_tiles() == 0) return false;
    if (threadIdx.x < kRowTile) {
      shared_.score_max[threadIdx.x] = comparable_bits(__float_as_int(-INFINITY));
      shared_.reference[reference_slot_ ^ 1][threadIdx.x] = -INFINITY;
    }
    convert_queries_to_fp16<Traits>(params_, shared_);
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) row_sum_[i] = 0.f;
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) clear(output_[box]);
    return true;
  }

  // --- A operands -------------------------------------------------------------------------------

  // Reads 32 columns of this warp's 16 tokens: `columns` counts them over kpe, then ckv. Of 16
  // columns a lane gets four neighbours.
  __device__ Fp8Codes load_keys(int32_t columns, int32_t lane) const {
    bool const is_kpe = columns < 2;
    int32_t const box = is_kpe ? 0 : (columns + 2) / 4, part = is_kpe ? columns : (columns + 2) % 4;
    int32_t const token = warp_ * 16 + lane % 16, chunk = lane / 16;
    RingPosition const slot = kpe_slot(warpgroup_).after(box);
    if (part == 0) wait_for_box(slot);
    int32_t const place =
        is_kpe ? swizzled_half_chunk(token, chunk) : 2 * swizzled_chunk(token, chunk);
    auto const* const row = shared_.ring + slot.index * Boxes::kElements + (place ^ (32 * part));
    Fp8Codes codes;
    SM75_U32x4_LDSM_N::copy(*reinterpret_cast<uint128_t const*>(row), codes.matrix[0],
                            codes.matrix[1], codes.matrix[2], codes.matrix[3]);
    return codes;
  }

  // Reads this warp's 16 columns of 32 tokens, transposed: `tokens` counts them over the boxes of
  // ckv. A lane gets a pair of columns of two neighbouring tokens. The first 64 columns of a box
  // belong to warpgroup 0.
  __device__ Fp8Codes load_values(int32_t tokens, int32_t lane) const {
    RingPosition const slot = value_slot(tokens);
    int32_t const part = tokens % 2;
    if (part == 0) wait_for_box(slot);
    int32_t const place = 2 * swizzled_chunk(lane, 4 * warpgroup_ + warp_);
    auto const* const row = shared_.ring + slot.index * Boxes::kElements + place + part * 32 * 128;
    Fp8Codes codes;
    SM75_U16x8_LDSM_T::copy(*reinterpret_cast<uint128_t const*>(row), codes.matrix[0],
                            codes.matrix[1], codes.matrix[2], codes.matrix[3]);
    return codes;
  }

  __device__ RingPosition value_slot(int32_t tokens) const {
    return ckv_slot(tokens / (2 * Boxes::kCkv), tokens / 2 % Boxes::kCkv);
  }

  // --- S^T, softmax, P^T ------------------------------------------------------------------------

  // S^T = K Q^T of this warpgroup's tile, in units of log2, -inf where a row does not see a token.
  // The part of kpe has a scale of its own: it has its own accumulators or, with 64 rows, for which
  // there are no registers, is brought to the scale of ckv before that is added.
  __device__ void compute_scores() {
    warpgroup_fence_operand(scores_);
    if constexpr (kHasKpeScores) warpgroup_fence_operand(kpe_scores_);
    if constexpr (kHasKpeScores) {
      multiply_keys<0, 4 * Traits::kQueryBoxes>();
    } else {
      multiply_keys<0, 4>();
      warpgroup_fence_operand(scores_);
#pragma unroll
      for (int32_t i = 0; i < size(scores_); ++i) scores_(i) *= params_.kpe_over_ckv_scale;
      warpgroup_fence_operand(scores_);
      multiply_keys<4, 4 * Traits::kQueryBoxes>();
    }
    warpgroup_fence_operand(scores_);
    if constexpr (kHasKpeScores) warpgroup_fence_operand(kpe_scores_);
    arrive_once_per_warp(&shared_.box_empty[kpe_slot(warpgroup_).index], kMathWarpgroups);
    if constexpr (kHasKpeScores) {
#pragma unroll
      for (int32_t i = 0; i < size(scores_); ++i) {
        scores_(i) += params_.kpe_over_ckv_scale * kpe_scores_(i);
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kRows; i += 2) {
      auto const scale = *reinterpret_cast<float2 const*>(&shared_.score_scale[row(i)]);
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        score(i, half) *= scale.x;
        score(i + 1, half) *= scale.y;
      }
    }
    mask_scores();
  }

  // WGMMAs kFirst, ..., kEnd - 1 of S^T, of 16 columns each: kpe first.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void multiply_keys() {
    typename Traits::Mma mma;
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor q_operand = mma.get_slice(thread_).partition_fragment_B(q);  // (MMA, 1, 4, box)
    int32_t const lane = fresh_lane();
    run_steps<kEnd - kFirst, Traits::kGroupSteps>(
        [&](int32_t columns) {
          return load_keys(kFirst / 2 + columns, kHasKpeScores ? lane : fresh_lane());
        },
        convert_keys,
        [&](Fp8Fragment const& keys, int32_t i) {
          int32_t const step = kFirst + i;
          bool const is_first = step == 0 || (kHasKpeScores && step == 4);
          mma.accumulate_ = is_first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
          auto& scores = kHasKpeScores && step < 4 ? kpe_scores_ : scores_;
          gemm(mma, keys, q_operand(_, 0, step % 4, step / 4), scores(_, 0, 0));
        },
        [](int32_t) {});
  }

  __device__ void mask_scores() {
    Request const& request = segment().request;
    auto visible_tokens = [&](int32_t packed_row) {
      if (!params_.causal) return request.kv_len;
      int32_t const query = params_.divide_by_heads.div(packed_row);
      return min(request.kv_len - request.query_len + query + 1, request.kv_len);
    };
    int32_t const first_token = (tile_ + warpgroup_) * kTokenTile;
    if (first_token + kTokenTile <= visible_tokens(segment().row_begin)) return;

    int32_t const token = first_token + warp_ * 16 + lane_ / 4;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      int32_t const visible = visible_tokens(segment().row_begin + row(i));
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        if (token + 8 * half >= visible) score(i, half) = -INFINITY;
      }
    }
  }

  // Score of this thread's row i and token 16 * warp + lane / 4 + 8 * half of the tile.
  __device__ float& score(int32_t i, int32_t half) { return scores_(i / 2 * 4 + half * 2 + i % 2); }

  // Combines the values of each row over the lanes that see it, which are 4, 8 and 16 apart, and
  // calls store(row, value). Each step halves the rows a lane still has, so that few shuffles do.
  // `first` is the first of the rows that are left.
  template <int kLanes = 16, int kCount = kRows, typename Combine, typename Store>
  __device__ void reduce_over_warp(float (&values)[kRows], Combine combine, Store store,
                                   int32_t first = 0) {
    if constexpr (kLanes < 4) {
      // Lanes that hold copies store the same value.
#pragma unroll
      for (int32_t i = 0; i < kCount; ++i) store(row(first + i, fresh_lane()), values[i]);
    } else if constexpr (kCount == 1) {
      values[0] = combine(values[0], __shfl_xor_sync(0xffffffff, values[0], kLanes));
      reduce_over_warp<kLanes / 2, 1>(values, combine, store, first);
    } else {
      constexpr int32_t kKept = kCount / 2;
      bool const is_upper = (lane_ & kLanes) != 0;
#pragma unroll
      for (int32_t i = 0; i < kKept; ++i) {
        float const given = is_upper ? values[i] : values[i + kKept];
        float const kept = is_upper ? values[i + kKept] : values[i];
        values[i] = combine(kept, __shfl_xor_sync(0xffffffff, given, kLanes));
      }
      reduce_over_warp<kLanes / 2, kKept>(values, combine, store, first + (is_upper ? kKept : 0));
    }
  }

  __device__ void share_tile_max() {
    if (has_tile()) {
      float tile_max[kRows];
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) tile_max[i] = fmaxf(score(i, 0), score(i, 1));
      reduce_over_warp(
          tile_max, [](float a, float b) { return fmaxf(a, b); },
          [this](int32_t row_of_tile, float max) {
            atomicMax(&shared_.score_max[row_of_tile], comparable_bits(__float_as_int(max)));
          });
    }
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
  }

  // Takes the pair's maxima into account; O^T and l are brought to the new reference if there is
  // one. Two slots take turns for r: one is written while the other is still read.
  __device__ void update_reference(float (&reference)[kRows]) {
    bool is_changed = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; i += 2) {
      int2 const max = *reinterpret_cast<int2 const*>(&shared_.score_max[row(i)]);
      float2 const old = old_references(i);
      is_changed |= update_reference(reference[i], max.x, old.x);
      is_changed |= update_reference(reference[i + 1], max.y, old.y);
    }
    // All loads come before the stores, which might be of the same address for all the compiler
    // knows.
    if (threadIdx.x < 4) {
#pragma unroll
      for (int32_t i = 0; i < kRows; ++i) {
        shared_.reference[reference_slot_][row(i)] = reference[i];
      }
    }
    if (__any_sync(0xffffffff, is_changed)) rescale(reference);
  }

  __device__ static bool update_reference(float& reference, int32_t max_bits, float old) {
    float const max = __int_as_float(comparable_bits(max_bits));
    bool const is_too_low = max - old > kLargestProbabilityLog2;
    reference = is_too_low ? max - kReferenceBelowMax : old;
    return is_too_low;
  }

  __device__ void rescale(float const (&reference)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      float2 const old = old_references(i & ~1);
      float const factor = rescale_factor(i % 2 == 0 ? old.x : old.y, reference[i]);
      row_sum_[i] *= factor;
#pragma unroll
      for (int32_t box = 0; box < Boxes::kCkv; ++box) {
        output_[box](i / 2 * 4 + i % 2) *= factor;
        output_[box](i / 2 * 4 + i % 2 + 2) *= factor;
      }
    }
  }

  // Of this thread's rows i and i + 1.
  __device__ float2 old_references(int32_t i) const {
    return *reinterpret_cast<float2 const*>(&shared_.reference[reference_slot_ ^ 1][row(i)]);
  }

  // P^T = 2^(S^T - r) of this warpgroup's tile.
  __device__ void store_probabilities(float const (&reference)[kRows]) {
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; block += kStoreBlocks) {
#pragma unroll
      for (int32_t i = 2 * block; i < 2 * (block + kStoreBlocks); ++i) {
        score(i, 0) = rescale_factor(score(i, 0), reference[i]);
        score(i, 1) = rescale_factor(score(i, 1), reference[i]);
        row_sum_[i] += score(i, 0) + score(i, 1);
      }
      write_probability_operand(block);
    }
  }

  // Writes P^T of kStoreBlocks blocks of 8 rows as WGMMA's B operand: [row][token]. Transposed
  // 8 x 8 stores: lane l addresses row l % 8 of matrix l / 8; matrices go over the warp's two
  // groups of 8 tokens first, then over the row blocks.
  __device__ void write_probability_operand(int32_t block) {
    uint32_t p[2 * kStoreBlocks];
#pragma unroll
    for (int32_t matrix = 0; matrix < 2 * kStoreBlocks; ++matrix) {
      int32_t const i = 2 * (block + matrix / 2);
      p[matrix] = pack<Operand>(score(i, matrix % 2), score(i + 1, matrix % 2));
    }
    int32_t const matrix = lane_ / 8 % (2 * kStoreBlocks);
    Operand* const operand = shared_.probability + warpgroup_ * kRowTile * kTokenTile +
                             (block + matrix / 2) * 8 * kTokenTile +
                             swizzled_chunk(lane_ % 8, warp_ * 2 + matrix % 2);
    auto& target = *reinterpret_cast<uint128_t*>(operand);
    if constexpr (kStoreBlocks == 1) {
      SM90_U16x4_STSM_T::copy(p[0], p[1], target);
    } else {
      SM90_U16x8_STSM_T::copy(p[0], p[1], p[2], p[3], target);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: tokens are rows of S^T.)
  __device__ void clear_tokens_past_end() {
    int32_t const half = is_single_tile() ? 0 : 1;
    int32_t const tokens = max(segment().request.kv_len - (tile_ + half) * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
#pragma unroll 1
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
      RingPosition const slot = ckv_slot(half, box);
      wait_for_box(slot);
      auto* const chunks = reinterpret_cast<uint4*>(shared_.ring + slot.index * Boxes::kElements);
#pragma unroll 1
      for (int32_t i = tokens * 8 + threadIdx.x; i < kTokenTile * 8; i += kMathThreads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Makes P of both tiles visible to the WGMMAs of both warpgroups. The loader of the next
  // segment's queries learns with it that S^T is done with these.
  __device__ void publish_probabilities() {
    cutlass::arch::fence_view_async_shared();
    bool const is_last_pair = tile_ + kMathWarpgroups >= segment().tile_end;
    if (is_last_pair) arrive_once_per_warp(&shared_.query_empty, 1);
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
  }

  __device__ void arrive_once_per_warp(uint64_t* barrier, uint32_t count) const {
    __syncwarp();
    if (lane_ == 0) {
      cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                 cuda::ptx::space_shared, barrier, count);
    }
  }

  // --- O^T --------------------------------------------------------------------------------------

  // O^T[half g of d_v] += V^T P^T of the pair's tiles, box after box. A box is free for the
  // producer as soon as its values are in registers.
  template <int kTiles>
  __device__ void accumulate_output() {
    typename Traits::Mma mma;
    Tensor p = make_tensor(make_smem_ptr(shared_.probability), typename Traits::LayoutP{});
    Tensor p_operand = mma.get_slice(thread_).partition_fragment_B(p);  // (MMA, 1, 4, tile)
    mma.accumulate_ = GMMA::ScaleOut::One;
    int32_t const lane = fresh_lane();
    fence_output();
    constexpr int32_t kSteps = kTiles * Boxes::kCkv * 4;
    run_steps<kSteps, Traits::kGroupSteps>(
        [&](int32_t tokens) { return load_values(tokens, lane); }, convert_values,
        [&](Fp8Fragment const& values, int32_t step) {
          int32_t const box = step / 4 % Boxes::kCkv, half = step / (4 * Boxes::kCkv);
          gemm(mma, values, p_operand(_, 0, step % 4, half), output_[box](_, 0, 0));
        },
        [&](int32_t tokens) {
          bool const is_last_of_box = tokens % 2 == 1;
          if (is_last_of_box) {
            arrive_once_per_warp(&shared_.box_empty[value_slot(tokens).index], 1);
          }
        });
    fence_output();
    ring_ = ring_.after(kTiles * Boxes::kPerTile);
  }

  __device__ void fence_output() {
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) warpgroup_fence_operand(output_[box]);
  }

  // --- End of a segment -------------------------------------------------------------------------

  __device__ void finish_segment() {
    reduce_over_warp(
        row_sum_, [](float a, float b) { return a + b; },
        [this](int32_t row_of_tile, float sum) {
          shared_.warp_sum[row_of_tile][4 * warpgroup_ + warp_] = sum;
        });
    cutlass::arch::NamedBarrier::sync(kMathThreads, kMathBarrier);
    bool const is_whole = segment().is_whole();
    int32_t const slot = segment().slot;
    if (is_whole) {
      write_output();
    } else {
      write_partial(slot);
    }
    write_statistics(is_whole, slot);
  }

  // Of all warps, in a fixed order.
  __device__ float total_sum(int32_t row_of_tile) const {
    auto const* const sums = reinterpret_cast<float4 const*>(shared_.warp_sum[row_of_tile]);
    float4 const a = sums[0], b = sums[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }

  // LSE or, of a part, reference and sum; one thread a row.
  __device__ void write_statistics(bool is_whole, int32_t slot) const {
    int32_t const row_of_tile = threadIdx.x;
    if (row_of_tile >= kRowTile) return;
    float const reference = shared_.reference[reference_slot_ ^ 1][row_of_tile];
    float const sum = total_sum(row_of_tile);
    if (!is_whole) {
      params_.partial_ml[slot * kRowTile + row_of_tile] = make_float2(reference, sum);
    } else if (params_.lse != nullptr && row_of_tile < segment().num_rows) {
      params_.lse[segment().packed_row + row_of_tile] = log_sum_exp(params_, reference, sum);
    }
  }

  // O^T / l of two neighbouring columns and two neighbouring rows is what a thread has of a
  // fragment.
  __device__ void write_output() {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      bool const exists = row(i) < segment().num_rows;
      float const scale = normalizer(total_sum(row(i))) * params_.ckv_scale;
      DType* const out_row =
          output_row<DType>(params_, segment().packed_row + (exists ? row(i) : 0));
#pragma unroll
      for (int32_t box = 0; box < Boxes::kCkv; ++box) {
        int32_t const value = i / 2 * 4 + i % 2;
        int32_t const column = box * Boxes::kColumns + warpgroup_ * 64 + warp_ * 16 + lane_ / 4 * 2;
        uint32_t const pair =
            pack<DType>(output_[box](value) * scale, output_[box](value + 2) * scale);
        if (exists) *reinterpret_cast<uint32_t*>(out_row + column) = pair;
      }
    }
  }

  // The merge kernel expects columns lane / 4 and lane / 4 + 8 of a lane; this one has 2 * (lane /
  // 4) and the next: of its pairs of rows each goes to another lane's place.
  __device__ void write_partial(int32_t slot) {
    int32_t const lane = fresh_lane();
    int32_t const scattered_lane = (2 * (lane / 4) % 8) * 4 + lane % 4;
    int32_t const upper_half = lane / 16;
#pragma unroll
    for (int32_t box = 0; box < Boxes::kCkv; ++box) {
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        int32_t const index =
            partial_index<kRowTile>(slot, 2 * box + warpgroup_, block, warp_, scattered_lane) +
            upper_half * 2;
#pragma unroll
        for (int32_t odd = 0; odd < 2; ++odd) {
          float const* const rows = &output_[box](block * 4 + odd * 2);
          *reinterpret_cast<float2*>(params_.partial_out + index + odd * 16) =
              make_float2(rows[0] * params_.ckv_scale, rows[1] * params_.ckv_scale);
        }
      }
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  int32_t const thread_ = threadIdx.x % kWarpgroupThreads;
  int32_t const warpgroup_ = cutlass::canonical_warp_group_idx();
  int32_t const warp_ = cutlass::canonical_warp_idx_sync() % 4;
  int32_t const lane_ = threadIdx.x % 32;

  RingPosition ring_;            // box 0 of the pair
  int32_t tile_;                 // first of the pair
  uint32_t reference_slot_ = 0;  // of r, for the current pair
  uint32_t segment_number_ = 0;  // of this CTA

  using Accumulator =
      decltype(partition_fragment_C(typename Traits::Mma{}, Shape<_64, Int<kRowTile>>{}));
  Accumulator scores_;
  Accumulator kpe_scores_;  // unless there are 64 rows
  Accumulator output_[Boxes::kCkv];
  float row_sum_[kRows];  // over this thread's tokens only, until the segment ends
};

}  // namespace etap
