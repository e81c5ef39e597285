/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * S^T = K Q^T of one tile over a cache in FlashMLA's layout, and what is made of its scales.
 *
 * A token has a scale for each 128 columns of ckv, which are a box, and kpe in bf16. So
 *
 *   S^T = kpe Q_pe^T + sum over boxes of (scales of the tokens) * (codes Q_box^T)
 *
 * where every product of codes with fp16 queries, and of kpe with bf16 queries, is exact, and
 * scales enter in fp32, row by row of the accumulators. For V^T, whose columns are tokens, they go
 * into P:
 *
 *   O^T[box] += codes^T (scales * P)^T
 *
 * rounded to fp16 (for results of fp16 in two parts, see kProbabilityParts). So that the products
 * fit, scales are divided by a power of two that no scale so far in the segment exceeds, a
 * reference for each box: scales * P <= 2^15, as P is. A product is rounded by 2^-11 of itself or,
 * below 2^-14, by 2^-25, and the largest P of a row is 2^8 or more. So a token that does not keep
 * all bits of fp16 is wrong by at most 2^-33 of (largest scale of the box) * (largest weight of the
 * row): scales of one request may lie apart by a factor of 2^20 until a row that sees none but the
 * smallest has an error as large as that of rounding it to bf16.
 */
#pragma once

#include "etap_mla_fp8_scores.cuh"

namespace etap {

// The scales of the two tokens of the tile that a thread sees, and the references.
template <class Traits>
class TokenScales {
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kBoxes = Traits::Boxes::kCkv;
  static_assert(kBoxes == 4, "the scales of a token are 16 bytes");

 public:
  __device__ TokenScales(SharedStorage& shared, MathThread const& thread)
      : shared_(shared), thread_(thread) {}

  __device__ void begin_segment() {
    if (threadIdx.x < kBoxes) shared_.largest_scale[threadIdx.x] = 0;
#pragma unroll
    for (int32_t box = 0; box < kBoxes; ++box) reference_[box] = kSmallestReference;
  }

  // Reads the tile's scales. Those behind the request's `tokens` may be anything, and P = 0 does
  // not make 0 of everything.
  __device__ void load(int32_t kpe_slot, int32_t tokens) {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      int32_t const token = thread_.token() + 8 * half;
      float4 const scales = *reinterpret_cast<float4 const*>(
          shared_.scales[kpe_slot / Traits::Boxes::kPerTile][token]);
      float const given[kBoxes] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
      for (int32_t box = 0; box < kBoxes; ++box) {
        scale_[box][half] = token < tokens ? given[box] : 0.f;
      }
    }
  }

  __device__ float scale(int32_t box, int32_t half) const { return scale_[box][half]; }

  // Lets all warps know of a scale above the reference. Bits of floats that are not negative are
  // ordered as they are.
  __device__ void share_largest() const {
#pragma unroll
    for (int32_t box = 0; box < kBoxes; ++box) {
      float const larger = fmaxf(fabsf(scale_[box][0]), fabsf(scale_[box][1]));
      int32_t const largest = __reduce_max_sync(0xffffffff, __float_as_int(larger));
      if (largest > __float_as_int(reference_[box]) && thread_.lane == 0) {
        atomicMax(&shared_.largest_scale[box], largest);
      }
    }
  }

  // Raises the references where a scale exceeds them and calls rescale(box, old / new reference).
  // All threads do the same.
  template <typename Rescale>
  __device__ void update_references(Rescale rescale) {
    int4 const largest = *reinterpret_cast<int4 const*>(shared_.largest_scale);
    int32_t const bits[kBoxes] = {largest.x, largest.y, largest.z, largest.w};
#pragma unroll
    for (int32_t box = 0; box < kBoxes; ++box) {
      if (bits[box] <= __float_as_int(reference_[box])) continue;
      float const raised = next_power_of_two(bits[box]);
      rescale(box, reference_[box] * inverse(raised));
      reference_[box] = raised;
    }
  }

  __device__ float reference(int32_t box) const { return reference_[box]; }

  // What P of this thread's token is multiplied with.
  __device__ float relative_scale(int32_t box, int32_t half) const {
    return scale_[box][half] * inverse(reference_[box]);
  }

 private:
  // Powers of two from 2^-126 to 2^126, whose inverses are such, too.
  static constexpr float kSmallestReference = 0x1p-126f;
  static constexpr int32_t kMantissaBits = 0x007fffff;
  static constexpr int32_t kLargestReferenceBits = (127 + 126) << 23;
  static constexpr int32_t kBitsOfInverses = (127 + 127) << 23;  // of a number and its inverse

  __device__ static float next_power_of_two(int32_t float_bits) {
    int32_t const bits = min(float_bits, kLargestReferenceBits);
    return __int_as_float((bits + kMantissaBits) & ~kMantissaBits);
  }

  __device__ static float inverse(float power_of_two) {
    return __int_as_float(kBitsOfInverses - __float_as_int(power_of_two));
  }

  SharedStorage& shared_;
  MathThread const thread_;  // a copy: see Fp8MathWarpgroup
  float scale_[kBoxes][2] = {};
  float reference_[kBoxes];
};

template <class Traits>
class FlashMlaScores {
  using SharedStorage = typename Traits::SharedStorage;
  using Boxes = typename Traits::Boxes;
  using RingPosition = RingPosition<Traits::kRingBoxes>;
  using Accumulator = typename TileScores<Traits>::Accumulator;
  static constexpr int kRows = Traits::kRowsPerThread;
  static constexpr int kStepsPerBox = Boxes::kColumns / 16;
  static constexpr int kGroupsPerBox = kStepsPerBox / Traits::kGroupSteps;

 public:
  __device__ FlashMlaScores(Params const& params, SharedStorage& shared, MathThread const& thread)
      : params_(params), shared_(shared), thread_(thread), scales_(shared, thread) {}

  __device__ float& operator()(int32_t i, int32_t half) { return scores_(i, half); }

  __device__ TokenScales<Traits>& scales() { return scales_; }

  // S^T of `tile`, whose first box is `kpe_slot`, in units of log2, -inf where a row does not see a
  // token. Two accumulators take turns: the products of one box are scaled and added while those of
  // the next are computed.
  __device__ void compute(Segment const& segment, int32_t tile, RingPosition const& kpe_slot) {
    Barrier::wait(&shared_.box_full[kpe_slot.index], kpe_slot.parity);
    if constexpr (Traits::kKvLoader == KvLoader::kGather) cutlass::arch::fence_view_async_shared();
    scales_.load(kpe_slot.index, segment.request.kv_len - tile * kTokenTile);
    float row_scale[kRows];
#pragma unroll
    for (int32_t i = 0; i < kRows; i += 2) {
      auto const scale = *reinterpret_cast<float2 const*>(&shared_.score_scale[thread_.row(i)]);
      row_scale[i] = scale.x;
      row_scale[i + 1] = scale.y;
    }
    warpgroup_fence_operand(products_[0]);
    warpgroup_fence_operand(products_[1]);
    multiply_kpe(kpe_slot.index);
    multiply_codes(kpe_slot, [&](int32_t group) {
      if (group == 0) {
        add_kpe();
      } else if (group % kGroupsPerBox == 0) {
        add_box(group / kGroupsPerBox - 1, row_scale);
      }
    });
    add_box(Boxes::kCkv - 1, row_scale);
    arrive_once_per_warp(&shared_.box_empty[kpe_slot.index], kMathWarpgroups);
    scores_.mask(params_, segment, tile, thread_);
  }

 private:
  // The products of kpe, which is as bf16 in shared memory as the queries are: fp16 ones in two
  // parts, see QueryConverter.
  __device__ __forceinline__ void multiply_kpe(int32_t slot) {
    typename Traits::MmaKpe mma;
    auto const thread_mma = mma.get_slice(thread_.thread);
    using Element = typename Traits::KpeElement;
    Tensor k = make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(shared_.ring)),
                           typename Traits::LayoutKpe{});
    Tensor q = make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(shared_.query)),
                           typename Traits::LayoutQueryPe{});
    Tensor k_operand = thread_mma.partition_fragment_A(k);  // (MMA, 1, 4, box)
    Tensor q_operand = thread_mma.partition_fragment_B(q);  // (MMA, 1, 4)
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_arrive();
#pragma unroll
    for (int32_t step = 0; step < size<2>(q_operand); ++step) {
      gemm(mma, k_operand(_, 0, step, slot), q_operand(_, 0, step), kpe_products()(_, 0, 0));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    if constexpr (Traits::kQueryPeParts == 2) {
      Tensor low =
          make_tensor(make_smem_ptr(shared_.query_pe_low), typename Traits::LayoutQueryPe{});
      Tensor low_operand = thread_mma.partition_fragment_B(low);
#pragma unroll
      for (int32_t step = 0; step < size<2>(low_operand); ++step) {
        gemm(mma, k_operand(_, 0, step, slot), low_operand(_, 0, step), kpe_products()(_, 0, 0));
      }
    }
    warpgroup_commit_batch();
  }

  // The products of the codes, box after box.
  template <typename Finish>
  __device__ __forceinline__ void multiply_codes(RingPosition const& kpe_slot, Finish finish) {
    typename Traits::Mma mma;
    Tensor q = make_tensor(make_smem_ptr(shared_.query), typename Traits::LayoutQ{});
    Tensor q_operand = mma.get_slice(thread_.thread).partition_fragment_B(q);  // (MMA, 1, 4, box)
    run_steps<Boxes::kCkv * kStepsPerBox, Traits::kGroupSteps>(
        [&](int32_t columns) {
          constexpr int32_t kPerBox = kStepsPerBox / 2;
          RingPosition const slot = kpe_slot.after(1 + columns / kPerBox);
          if (columns % kPerBox == 0) Barrier::wait(&shared_.box_full[slot.index], slot.parity);
          return load_keys(shared_.ring + slot.index * Boxes::kElements, false, columns % kPerBox,
                           thread_.warp, thread_.lane);
        },
        convert_keys,
        [&](Fp8Fragment const& keys, int32_t step) {
          bool const is_first = step % kStepsPerBox == 0;
          mma.accumulate_ = is_first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
          auto& products = products_[step / kStepsPerBox % 2];
          // A box of queries has 64 columns; that of pe is the first.
          gemm(mma, keys, q_operand(_, 0, step % 4, 1 + step / 4), products(_, 0, 0));
        },
        [](int32_t) {}, finish);
  }

  __device__ Accumulator& kpe_products() { return products_[1]; }

  __device__ __forceinline__ void add_kpe() {
#pragma unroll
    for (int32_t i = 0; i < size(scores_.values); ++i) {
      scores_.values(i) = 0.f;
      add_product(scores_.values(i), kpe_products()(i), params_.scale_log2);
    }
  }

  __device__ __forceinline__ void add_box(int32_t box, float const (&row_scale)[kRows]) {
    Accumulator const& products = products_[box % 2];
#pragma unroll
    for (int32_t i = 0; i < kRows; ++i) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        float const product = products(i / 2 * 4 + half * 2 + i % 2);
        add_product(scores_(i, half), product, scales_.scale(box, half) * row_scale[i]);
      }
    }
  }

  Params const& params_;
  SharedStorage& shared_;
  MathThread const thread_;  // a copy: see Fp8MathWarpgroup
  TokenScales<Traits> scales_;
  TileScores<Traits> scores_;
  Accumulator products_[2];
};

}  // namespace etap
