// Cycles of a WGMMA, alone and followed by the products with A = 0 that emulate an H20.
//
// Two warpgroups on each SM issue groups of instructions and wait for each group, as the kernels'
// two do. Only the instructions matter: the operands are zeros in shared memory.
#define ETAP_EMULATE_H20
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include "etap_mla_wgmma.cuh"

namespace wgmma_cost {

using namespace cute;
using Element = cutlass::bfloat16_t;

constexpr int kWarpgroups = 2;
constexpr int kGroups = 64;
constexpr int kGroupSteps = 36;  // those of S^T for a tile
constexpr int kMostZeroProducts = 4;

template <int kColumns>
using Mma = decltype(make_tiled_mma(
    GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, _16>, GMMA::Major::K,
                         GMMA::Major::K>()));

template <int kRows>
using Layout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                      Shape<Int<kRows>, _64>{}));

// cycles[CTA]: of all groups of both warpgroups.
template <int kColumns, int kZeroProducts>
__global__ void __launch_bounds__(kWarpgroups * 128) wgmma_kernel(int64_t* cycles) {
  __shared__ alignas(1024) Element a_elements[64 * 64];
  __shared__ alignas(1024) Element b_elements[kColumns * 64];
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) a_elements[i] = Element(0.f);
  for (int i = threadIdx.x; i < kColumns * 64; i += blockDim.x) b_elements[i] = Element(0.f);
  cutlass::arch::fence_view_async_shared();

  Mma<kColumns> mma;
  auto const thread_mma = mma.get_slice(threadIdx.x % 128);
  Tensor a = thread_mma.partition_fragment_A(
      make_tensor(make_smem_ptr(a_elements), Layout<64>{}));  // (MMA, 1, 4)
  Tensor b = thread_mma.partition_fragment_B(
      make_tensor(make_smem_ptr(b_elements), Layout<kColumns>{}));
  Tensor c = partition_fragment_C(mma, Shape<_64, Int<kColumns>>{});
  clear(c);
  etap::Multiply const multiply;

  __syncthreads();
  int64_t const start = clock64();
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    warpgroup_fence_operand(c);
    warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kGroupSteps; ++step) {
      gemm(mma, a(_, _, step % 4), b(_, _, step % 4), c);
      multiply.add_zero_products<kZeroProducts>(mma, a(_, _, step % 4), b(_, _, step % 4), c);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(c);
  }
  __syncthreads();
  int64_t const end = clock64();
  // Instructions whose result nobody reads would not be there at all. All are zero.
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < size(c); ++i) sum += c(i);
  if (threadIdx.x == 0) cycles[blockIdx.x] = sum == 0.f ? end - start : -1;
}

template <int kColumns, int kZeroProducts = 0>
void launch(int64_t zero_products, unsigned ctas, cudaStream_t stream, int64_t* cycles) {
  if (zero_products == kZeroProducts) {
    wgmma_kernel<kColumns, kZeroProducts><<<ctas, kWarpgroups * 128, 0, stream>>>(cycles);
    cudaError_t const status = cudaGetLastError();
    TVM_FFI_CHECK(status == cudaSuccess, RuntimeError) << cudaGetErrorString(status);
  } else if constexpr (kZeroProducts < kMostZeroProducts) {
    launch<kColumns, kZeroProducts + 1>(zero_products, ctas, stream, cycles);
  } else {
    TVM_FFI_THROW(ValueError) << "zero_products must be 0.." << kMostZeroProducts;
  }
}

// cycles: int64 [ctas] on the GPU. Returns how many real WGMMAs of an SM they are the cycles of.
int64_t wgmma_cycles(int64_t columns, int64_t zero_products, tvm::ffi::TensorView cycles) {
  DLDevice const device = cycles.device();
  auto const stream =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  auto const ctas = static_cast<unsigned>(cycles.numel());
  auto* const out = static_cast<int64_t*>(cycles.data_ptr());
  switch (columns) {
    case 8: launch<8>(zero_products, ctas, stream, out); break;
    case 16: launch<16>(zero_products, ctas, stream, out); break;
    case 32: launch<32>(zero_products, ctas, stream, out); break;
    case 64: launch<64>(zero_products, ctas, stream, out); break;
    default: TVM_FFI_THROW(ValueError) << "columns must be 8, 16, 32 or 64, got " << columns;
  }
  return kWarpgroups * kGroups * kGroupSteps;
}

// How many products with A = 0 the emulation adds.
int64_t zero_products(int64_t columns) {
  TVM_FFI_CHECK(columns == 8 || columns == 16 || columns == 32 || columns == 64, ValueError)
      << "columns must be 8, 16, 32 or 64, got " << columns;
  return columns == 8    ? etap::count_zero_products<Mma<8>>()
         : columns == 16 ? etap::count_zero_products<Mma<16>>()
         : columns == 32 ? etap::count_zero_products<Mma<32>>()
                         : etap::count_zero_products<Mma<64>>();
}

}  // namespace wgmma_cost

TVM_FFI_DLL_EXPORT_TYPED_FUNC(wgmma_cycles, wgmma_cost::wgmma_cycles);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(zero_products, wgmma_cost::zero_products);
