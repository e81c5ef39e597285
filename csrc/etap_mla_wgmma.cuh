/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * The one place where kernels with a bf16 or fp16 cache issue WGMMAs, so that
 * scripts/emulate_h20.py can give them what they cost on an H20, which has 78 of the H200's SMs,
 * each with a quarter of the tensor rate. ETAP_EMULATE_H20 is for that script alone: otherwise
 * nothing of it is compiled.
 */
#pragma once

#include <cstdint>
#include <cute/tensor.hpp>
#include <type_traits>

namespace etap {

using namespace cute;

#ifndef ETAP_EMULATE_H20

#define ETAP_INLINE_MATH
constexpr int32_t kMostCtas = INT32_MAX;

// C = A B or C += A B, as mma.accumulate_ says; asynchronous.
struct Multiply {
  template <class Mma, class A, class B, class C>
  __device__ __forceinline__ void operator()(Mma const& mma, A const& a, B const& b, C&& c) const {
    gemm(mma, a, b, c);
  }
};

#else

// For the loop over tiles, which the compiler inlines of its own accord when it is not that long.
// In a function that is called, WGMMAs are serialised.
#define ETAP_INLINE_MATH __forceinline__
constexpr int32_t kMostCtas = 78;

// WGMMAs with A = 0 from registers that follow a real one of N columns: the fewest with which it
// takes the 2 N cycles of an H20. Cycles on an H200, two or three warpgroups on an SM
// (scripts/decode_bench/wgmma_cost.cu measures them): 18, 20, 24, 32 for N = 8, 16, 32, 64, N / 2
// beyond; with A in registers 13, 13, 16, 32. N = 8 takes more than 16 anyway, for shared memory;
// N = 32 gets 72 instead of 64.
template <class Mma>
constexpr int32_t count_zero_products() {
  constexpr int32_t kColumns = size<1>(typename Mma::AtomShape_MNK{});
  static_assert(kColumns >= 64 || !std::is_same_v<typename Mma::FrgTypeA, typename Mma::ValTypeA>,
                "a real A from registers is not counted for below 64 columns");
  static_assert(kColumns == 8 || kColumns == 16 || kColumns == 32 || kColumns >= 64);
  return kColumns == 8 ? 0 : kColumns == 16 ? 1 : 3;
}

template <class Operation>
struct MajorOfB;
template <template <GMMA::Major, GMMA::Major, GMMA::ScaleIn, GMMA::ScaleIn> class Operation,
          GMMA::Major kA, GMMA::Major kB, GMMA::ScaleIn kScaleA, GMMA::ScaleIn kScaleB>
struct MajorOfB<Operation<kA, kB, kScaleA, kScaleB> > {
  static constexpr GMMA::Major value = kB;
};

alignas(16) __device__ uint32_t four_zeros[4];

struct Multiply {
  // A load of four, so that they are neighbours, of what ptxas does not know to be zeros: otherwise
  // it makes new registers for every instruction in flight, runs out, and serialises them.
  __device__ Multiply() {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(zero_[0]), "=r"(zero_[1]), "=r"(zero_[2]), "=r"(zero_[3])
                 : "l"(__cvta_generic_to_global(four_zeros)));
  }

  template <class Mma, class A, class B, class C>
  __device__ __forceinline__ void operator()(Mma const& mma, A const& a, B const& b, C&& c) const {
    gemm(mma, a, b, c);
    add_zero_products<count_zero_products<Mma>()>(mma, a, b, c);
  }

  // C += 0 B, kCount times, in the shape of a product A B. B is read again: a NaN in it stays one.
  template <int32_t kCount, class Mma, class A, class B, class C>
  __device__ __forceinline__ void add_zero_products(Mma const&, A const& a, B const& b,
                                                    C&& c) const {
    using Element = typename Mma::ValTypeA;
    auto const mma =
        make_tiled_mma(GMMA::rs_op_selector<Element, typename Mma::ValTypeB, typename Mma::ValTypeC,
                                            typename Mma::AtomShape_MNK, GMMA::Major::K,
                                            MajorOfB<typename Mma::MMA_Op>::value>());
    // The same registers for every M and K.
    auto const shape = replace<0>(a.shape(), _4{});
    auto const strides = replace<0>(repeat<rank_v<A> >(_0{}), _1{});
    Tensor zero = make_tensor(make_rmem_ptr(zero_), make_layout(shape, strides));
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) gemm(mma, recast<Element const>(zero), b, c);
  }

 private:
  uint32_t zero_[4];
};

#endif

}  // namespace etap
