// What this GPU can read: bulk copies of device memory into a ring of shared-memory stages, nothing else.
//
// It is the yardstick of the decode benchmark: a decode kernel has to bring every cached token into shared memory once,
// so it cannot be faster than this kernel over the same bytes.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace {

constexpr int kMaxStages = 16;

__device__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ void copy_stage(uint32_t destination, const char* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ void wait_stage(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// One thread of each CTA keeps `stages` copies in flight. Nobody reads the data, so a stage is free as soon as it is full.
// The first word of the CTA's last tile goes to `last_words`: the host checks that the bytes did arrive.
__global__ void __launch_bounds__(32) read_kernel(const char* data, int64_t tiles, uint32_t tile_bytes, int stages,
                                                  uint32_t* last_words) {
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) uint64_t barriers[kMaxStages];
  if (threadIdx.x != 0) return;
  const uint32_t ring_address = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
  const uint32_t barrier_address = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  for (int stage = 0; stage < stages; ++stage) barrier_init(barrier_address + 8 * stage);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

  int64_t next = blockIdx.x;
  for (int stage = 0; stage < stages && next < tiles; ++stage, next += gridDim.x) {
    copy_stage(ring_address + stage * tile_bytes, data + next * tile_bytes, tile_bytes, barrier_address + 8 * stage);
  }
  int stage = 0;
  uint32_t parity = 0;
  int last_stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    wait_stage(barrier_address + 8 * stage, parity);
    last_stage = stage;
    if (next < tiles) {
      copy_stage(ring_address + stage * tile_bytes, data + next * tile_bytes, tile_bytes, barrier_address + 8 * stage);
      next += gridDim.x;
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  if (blockIdx.x < tiles) last_words[blockIdx.x] = *reinterpret_cast<volatile uint32_t*>(ring + last_stage * tile_bytes);
}

void check(cudaError_t status, const char* what) {
  TVM_FFI_CHECK(status == cudaSuccess, RuntimeError) << what << ": " << cudaGetErrorString(status);
}

// data: uint8 [bytes], a multiple of tile_bytes; last_words: int32 [ctas], both on the GPU.
void bulk_read(tvm::ffi::TensorView data, int64_t tile_bytes, int64_t stages, tvm::ffi::TensorView last_words) {
  TVM_FFI_CHECK(tile_bytes > 0 && tile_bytes % 16 == 0 && data.numel() % tile_bytes == 0, ValueError)
      << "tile_bytes must be a multiple of 16 that divides the data, got " << tile_bytes << " for " << data.numel();
  TVM_FFI_CHECK(stages >= 1 && stages <= kMaxStages, ValueError) << "stages must be 1.." << kMaxStages;
  const int shared_bytes = static_cast<int>(tile_bytes * stages);
  check(cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  const DLDevice device = data.device();
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  read_kernel<<<static_cast<unsigned>(last_words.numel()), 32, shared_bytes, stream>>>(
      static_cast<const char*>(data.data_ptr()), data.numel() / tile_bytes, static_cast<uint32_t>(tile_bytes),
      static_cast<int>(stages), static_cast<uint32_t*>(last_words.data_ptr()));
  check(cudaGetLastError(), "launch");
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bulk_read, bulk_read);
