/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The math warpgroups over a cache of e4m3 with one scale, up to 16 packed rows (query x head).
 * Each of the two has every second token tile of a segment to itself, with a reference, sums and
 * all of O^T of its own, so that one multiplies while the other has exponentials to make. The first
 * tile is the first one's, whatever the CTA had before, so sums have an order that depends on the
 * segment alone. (Of a segment of one tile the first makes P, and both half of O^T.)
 *
 *   S^T = K Q^T                 K turns into fp16 on its way to registers, which is exact
 *   r = max(S^T) - 8            over this tile; R = max(r, R so far), O^T *= 2^(R before - R)
 *   P^T = 2^(S^T - r) <= 2^8    in e4m3 parts -> shared memory
 *   O^T += 2^(r - R) V^T P^T    V^T through registers, 64 columns of d_v after 64; tile -> producer
 *
 *   end of segment:             each gives the other half of its O^T, and both are of one R then
 *
 * WGMMA sums products of e4m3 with 13 bits behind the largest, whatever the accumulator's type. So
 * it sums over one tile, and float32 takes that (scripts/TUNING.md has what was measured). P is
 * relative to its own tile, so that none is lost beside a larger one elsewhere.
 */
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "etap_mla_fp8_codes.cuh"
#include "etap_mla_fp8_output.cuh"
#include "etap_mla_fp8_queries.cuh"
#include "etap_mla_fp8_scores.cuh"
#include "etap_mla_fp8_tile_sums.cuh"
#include "etap_mla_math_segment.cuh"
#include "etap_mla_math_thread.cuh"

namespace etap {

template <class Traits>
class Fp8TileMathWarpgroup : MathSegment<Traits> {
  using Base = MathSegment<Traits>;
  using Base::params_, Base::segment, Base::segment_number_, Base::shared_;
  using typename Base::SharedStorage;
  using DType = typename Traits::DType;
  using Code = typename Traits::Code;
  using Boxes = typename Traits::Boxes;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  using TileSums = TileSums<Traits>;
  static constexpr int kRowTile = Traits::kRowTile;
  static constexpr int kRowBlocks = kRowTile / 8;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kParts = Traits::kParts;
  static constexpr int kHalves = TileSums::kHalves;

 public:
  __device__ Fp8TileMathWarpgroup(Params const& params, SharedStorage& shared)
      : Base(params, shared) {}

  __device__ __forceinline__ void run() {
    while (begin_segment()) {
      if (has_one_tile()) {
        run_only_tile();
      } else {
#pragma unroll 1
        for (; tile_ < segment().tile_end; tile_ += kMathWarpgroups) {
          run_tile();
          ring_ = ring_.after(kMathWarpgroups * Boxes::kPerTile);
        }
        exchange_halves();
      }
      write_segment();
      tiles_before_ += segment().num_tiles();
      ++segment_number_;
    }
  }

 private:
  __device__ bool has_one_tile() const { return segment().num_tiles() == 1; }

  // Of the segment, the first tile that this warpgroup works on.
  __device__ int32_t first_tile() const { return has_one_tile() ? 0 : thread_.warpgroup; }

  // Box 0 of a tile of the segment.
  __device__ RingPosition tile_slot(int32_t tile) const {
    uint32_t const number = tiles_before_ + tile;
    return {int32_t(number % Traits::kStages) * Boxes::kPerTile, number / Traits::kStages & 1};
  }

  // Of this warpgroup's tiles of the segment.
  __device__ bool is_last_tile() const { return tile_ + kMathWarpgroups >= segment().tile_end; }

  __device__ __forceinline__ void run_tile() {
    wait_for_tile();
    compute_scores();
    if (is_last_tile()) arrive_once_per_warp(&shared_.query_empty, 1);
    float weight[kRows];
    raise_reference(weight);
    store_probabilities(weight);
    if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    accumulate_output<kHalves>(weight, shared_.probability[thread_.warpgroup]);
  }

  // A segment's: P by the first warpgroup, half of O^T by each.
  __device__ __forceinline__ void run_only_tile() {
    wait_for_tile();
    float weight[kRows];
    if (thread_.warpgroup == 0) {
      compute_scores();
      raise_reference(weight);
      store_probabilities(weight);
    }
    sums_.share_statistics(shared_, thread_);
    arrive_once_per_warp(&shared_.query_empty, 1);
    if constexpr (Traits::kKvLoader == KvLoader::kTma) clear_tokens_past_end();
    cutlass::arch::fence_view_async_shared();
    sync_math();
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) weight[i] = 1.f;  // r is R
    accumulate_output<1>(weight, shared_.probability[0]);
  }

  __device__ __forceinline__ void wait_for_tile() const {
    Barrier::wait(&shared_.box_full[ring_.index], ring_.parity);
  }

  // By each warp of the warpgroups that read it last.
  template <int kWarpgroups>
  __device__ void release_tile(RingPosition const& tile) const {
    arrive_once_per_warp(&shared_.box_empty[tile.index], kMathWarpgroups / kWarpgroups);
  }

  // The codes of kpe, and of ckv.
  __device__ uint8_t* kpe_codes() const { return shared_.ring + Boxes::begin(ring_.index); }
  __device__ uint8_t* ckv_codes(RingPosition const& tile) const {
    return shared_.ring + Boxes::begin(tile.index) + Boxes::kKpeBytes;
  }

  __device__ void sync_warpgroup() const {
    cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, kWarpgroupBarrier + thread_.warpgroup);
  }

  // Waits for the next segment and its queries; false if there is none.
  __device__ __forceinline__ bool begin_segment() {
    Barrier::wait(&shared_.query_full, segment_number_ & 1);
    if (segment().num_tiles() == 0) return false;
    tile_ = segment().tile_begin + first_tile();
    ring_ = tile_slot(first_tile());
    convert_queries_to_fp16<Traits>(params_, shared_);
    sums_.clear();
    return true;
  }

  // --- S^T --------------------------------------------------------------------------------------

  // In units of log2, -inf where a row does not see a token. The part of kpe, which comes first,
  // has a scale of its own.
  __device__ __forceinline__ void compute_scores() {
    typename Traits::MmaQk mma;
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor q_operand = mma.get_slice(thread_.thread).partition_fragment_B(q);  // (MMA, 1, 4, box)
    constexpr int32_t kKpeLoads = kHeadDimKpe / 32, kLoadsPerBox = Boxes::kColumns / 32;
    uint8_t const *const kpe = kpe_codes(), *const ckv = ckv_codes(ring_);
    warpgroup_fence_operand(scores_.values);
    warpgroup_fence_operand(kpe_scores_);
    run_steps<4 * Traits::kQueryBoxes, Traits::kGroupSteps>(
        [&](int32_t load) {
          int32_t const of_ckv = load - kKpeLoads;
          return of_ckv < 0 ? load_keys(kpe, true, load, thread_.warp, thread_.lane)
                            : load_keys(ckv + of_ckv / kLoadsPerBox * Boxes::kElements, false,
                                        of_ckv % kLoadsPerBox, thread_.warp, thread_.lane);
        },
        convert_keys,
        [&](Fp8Fragment const& keys, int32_t step) {
          bool const is_kpe = step < 4, is_first = step == 0 || step == 4;
          mma.accumulate_ = is_first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
          auto& scores = is_kpe ? kpe_scores_ : scores_.values;
          gemm(mma, keys, q_operand(_, 0, step % 4, step / 4), scores(_, 0, 0));
        },
        [](int32_t) {}, [](int32_t) {});
    warpgroup_fence_operand(scores_.values);
    warpgroup_fence_operand(kpe_scores_);
    scores_.add_kpe(kpe_scores_, params_.kpe_over_ckv_scale);
    scores_.scale(shared_.score_scale, thread_);
    scores_.mask(params_, segment(), tile_, thread_);
  }

  // --- Softmax, P^T ------------------------------------------------------------------------------

  // The tile's reference, and that of all tiles so far, to which O^T and sums are brought; `weight`
  // brings the tile there. All threads of the warpgroup do the same.
  __device__ __forceinline__ void raise_reference(float (&weight)[kRows]) {
    float tile_max[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) tile_max[i] = fmaxf(scores_(i, 0), scores_(i, 1));
    auto& of_warps = shared_.warp_max[thread_.warpgroup];
    thread_.reduce_over_warp(
        tile_max, [](float a, float b) { return fmaxf(a, b); },
        [&](int32_t row, float max) { of_warps[row][thread_.warp] = max; });
    sync_warpgroup();
    float factor[kRows];
    bool is_raised = false;
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      auto const max = *reinterpret_cast<float4 const*>(of_warps[thread_.row(i)]);
      tile_reference_[i] = fmaxf(fmaxf(max.x, max.y), fmaxf(max.z, max.w)) - kLargestCodeLog2;
      float const raised = fmaxf(sums_.reference[i], tile_reference_[i]);
      factor[i] = rescale_factor(sums_.reference[i], raised);
      weight[i] = rescale_factor(tile_reference_[i], raised);
      is_raised |= raised != sums_.reference[i];
      sums_.reference[i] = raised;
    }
    if (__any_sync(0xffffffff, is_raised)) sums_.multiply(factor);
  }

  // P^T = 2^(S^T - r), part after part.
  __device__ __forceinline__ void store_probabilities(float const (&weight)[kRows]) {
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
      scores_(i, 0) = rescale_factor(scores_(i, 0), tile_reference_[i]);
      scores_(i, 1) = rescale_factor(scores_(i, 1), tile_reference_[i]);
      sums_.row_sum[i] += weight[i] * (scores_(i, 0) + scores_(i, 1));
    }
    // Two rows and two tokens, 8 apart, which are neighbours in the order of P^T and V^T.
    cutlass::Array<float, 4> values[kRowBlocks];
#pragma unroll
    for (int32_t block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) values[block][i] = scores_(2 * block + i / 2, i % 2);
    }
#pragma unroll
    for (int32_t part = 0; part < kParts; ++part) {
      uint32_t codes[kRowBlocks];
#pragma unroll
      for (int32_t block = 0; block < kRowBlocks; ++block) {
        codes[block] = take_codes<Traits::kPartShift>(values[block]);
      }
      store_transposed(codes, part);
    }
  }

  // Transposed stores of 8 rows x 16 tokens: lane l addresses row l % 8 of block l / 8.
  __device__ __forceinline__ void store_transposed(uint32_t const (&codes)[kRowBlocks],
                                                   int32_t part) {
    int32_t const row = part * kRowTile + thread_.lane % kRowTile;
    auto& target = *reinterpret_cast<uint128_t*>(shared_.probability[thread_.warpgroup] +
                                                 swizzled_half_chunk(row, thread_.warp));
    if constexpr (kRowBlocks == 1) {
      SM90_U16x2_STSM_T::copy(codes[0], target);
    } else {
      SM90_U16x4_STSM_T::copy(codes[0], codes[1], target);
    }
  }

  // Beyond the request's end a box holds whatever the page or an earlier tile left there. P is zero
  // there, but 0 * NaN is not: V must be zero too. (K needs no such care: tokens are rows of S^T.)
  __device__ __forceinline__ void clear_tokens_past_end() {
    int32_t const tokens = max(segment().request.kv_len - tile_ * kTokenTile, 0);
    if (tokens >= kTokenTile) return;
    auto* const chunks = reinterpret_cast<uint4*>(ckv_codes(ring_));
#pragma unroll 1
    for (int32_t i = tokens * 8 + thread_.thread; i < kTokenTile * 8; i += kWarpgroupThreads) {
#pragma unroll
      for (int32_t box = 0; box < Boxes::kCkv; ++box) {
        chunks[box * kTokenTile * 8 + i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // --- O^T --------------------------------------------------------------------------------------

  // Where this lane reads, in a box and for 32 tokens, the 16 columns of its warp, transposed: of
  // the half that this warpgroup keeps at the end of a segment, and of the other.
  __device__ int32_t value_place(int32_t half) const {
    return 2 * swizzled_chunk(thread_.lane, 4 * (thread_.warpgroup ^ half) + thread_.warp);
  }

  // A lane gets a pair of columns of two neighbouring tokens.
  __device__ static Fp8Codes load_values(uint8_t const* values) {
    Fp8Codes codes;
    SM75_U16x8_LDSM_T::copy(*reinterpret_cast<uint128_t const*>(values), codes.matrix[0],
                            codes.matrix[1], codes.matrix[2], codes.matrix[3]);
    return codes;
  }

  // O^T += weight V^T P^T. While the products of 64 columns are made, those of the 64 before are
  // added. The tile is free for the producer as soon as its last values are in registers.
  template <int kMade>
  __device__ __forceinline__ void accumulate_output(float const (&weight)[kRows],
                                                    Code const* probability) {
    constexpr int32_t kSteps = Traits::kPvSteps;
    constexpr int32_t kBlocks = Boxes::kCkv * kMade;
    constexpr int32_t kInstructions = kParts / Traits::kPartsAtOnce;
    typename Traits::MmaPv mma;
    Tensor p_layout = make_tensor(make_smem_ptr(probability), typename Traits::LayoutP{});
    Tensor p = mma.get_slice(thread_.thread).partition_fragment_B(p_layout);
    uint8_t const* const ckv = ckv_codes(ring_);
    uint8_t const* const halves[kHalves] = {ckv + value_place(0), ckv + value_place(1)};
    Fp8Codes codes[kSteps];
    ValueFragment values[2][kSteps];
    auto load_block = [&](int32_t block) {
#pragma unroll
      for (int32_t step = 0; step < kSteps; ++step) {
        codes[step] = load_values(halves[block % kMade] + block / kMade * Boxes::kElements +
                                  step * 32 * Boxes::kColumns);
      }
    };
    load_block(0);
#pragma unroll
    for (int32_t block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int32_t step = 0; step < kSteps; ++step) {
        arrange_values(codes[step], values[block % 2][step]);
      }
#pragma unroll
      for (int32_t instruction = 0; instruction < kInstructions; ++instruction) {
        int32_t const number = block * kInstructions + instruction;
        auto& product = product_[number % 2];
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        warpgroup_arrive();
#pragma unroll
        for (int32_t step = 0; step < kSteps; ++step) {
          gemm(mma, values[block % 2][step], p(_, instruction, step), product(_, 0, 0));
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        if (instruction == 0 && block + 1 < kBlocks) load_block(block + 1);
        if (number > 0) {
          warpgroup_wait<1>();
          add_parts<kInstructions, kMade>(number - 1, weight);
        }
      }
    }
    if constexpr (kMade == 1) {
      release_tile<2>(ring_);
    } else {
      if (!is_last_tile()) release_tile<1>(ring_);
    }
    warpgroup_wait<0>();
    add_parts<kInstructions, kMade>(kBlocks * kInstructions - 1, weight);
  }

  __device__ static constexpr float part_weight(int32_t part) {
    return 1.f / float(1 << part * Traits::kPartShift);
  }

  // Adds the products of the parts that an instruction multiplied.
  template <int kInstructions, int kMade>
  __device__ __forceinline__ void add_parts(int32_t number, float const (&weight)[kRows]) {
    constexpr int32_t kPartsAtOnce = Traits::kPartsAtOnce;
    auto const& product = product_[number % 2];
    int32_t const block = number / kInstructions, instruction = number % kInstructions;
    auto& output = sums_.output[block / kMade][block % kMade];
#pragma unroll
    for (int32_t j = 0; j < size(output); ++j) {
      float sum = product(j);
#pragma unroll
      for (int32_t i = 1; i < kPartsAtOnce; ++i) {
        add_product(sum, product(i * size(output) + j), part_weight(i));
      }
      float const row_weight = weight[j / 4 * 2 + j % 2] * part_weight(instruction * kPartsAtOnce);
      add_product(output(j), sum, row_weight);
    }
  }

  // --- End of a segment -------------------------------------------------------------------------

  // Both warpgroups have tiles.
  __device__ __forceinline__ void exchange_halves() {
    int32_t const last = segment().num_tiles() - 1;
    bool const has_last = last % kMathWarpgroups == thread_.warpgroup;
    RingPosition const own_tile = tile_slot(has_last ? last : last - 1);
    RingPosition const other_tile = tile_slot(has_last ? last - 1 : last);
    sums_.share_statistics(shared_, thread_);
    sync_warpgroup();  // nobody reads the tile any more
    sums_.give_half(ckv_codes(own_tile), thread_);
    sync_math();
    sums_.take_half(ckv_codes(other_tile), shared_, thread_);
    release_tile<1>(other_tile);
  }

  __device__ __forceinline__ void write_segment() {
    write_fp8_segment<Traits>(
        params_, shared_.merge, segment(), thread_,
        [this](int32_t box) -> auto& { return sums_.output[box][0]; },
        [this](int32_t) { return params_.ckv_scale; },
        [this](int32_t row) { return TileSums::total_reference(shared_, row); },
        [this](int32_t row) { return TileSums::total_sum(shared_, row); });
  }

  MathThread const thread_;

  RingPosition ring_;          // box 0 of the tile
  int32_t tile_;               // of the request
  uint32_t tiles_before_ = 0;  // this CTA's, in the segments before

  TileScores<Traits> scores_;
  typename TileScores<Traits>::Accumulator kpe_scores_;
  decltype(partition_fragment_C(typename Traits::MmaPv{},
                                Shape<_64, Int<Traits::kPartsAtOnce * kRowTile>>{})) product_[2];
  float tile_reference_[kRows];  // of the tile in work
  TileSums sums_;                // of this warpgroup's tiles of the segment
};

}  // namespace etap
