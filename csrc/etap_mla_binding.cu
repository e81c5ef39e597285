/*
 * Copyright (c) 2026 etap-flashinfer authors. SPDX-License-Identifier: Apache-2.0
 *
 * Entry points of one compiled variant, called from Python through TVM-FFI. Shapes, dtypes, strides
 * and alignment are checked by the Python wrapper; what could lead a kernel out of bounds is
 * checked again here.
 */
#include <cuda.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "etap_mla_kernel.cuh"
#include "etap_mla_merge_kernel.cuh"
// Last: the variant's DType, kRows, kKvLoader and kKvCache.
#include "etap_mla_config.inc"

namespace etap {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;
// 64 rows fill WGMMA's M: rows go there. Fewer go to N, which is ETAP.
using RowsOnM = std::conditional_t<kRows <= 64, RowsMlaTraits<DType, kKvLoader>,
                                   SeesawMlaTraits<DType, kKvLoader>>;
using Bf16Traits = std::conditional_t<kRows >= 64, RowsOnM, EtapMlaTraits<DType, kRows, kKvLoader>>;
using Fp8Traits =
    std::conditional_t<kMultipliesCodes<kKvCache, kRows>, Fp8TileTraits<DType, kRows, kKvLoader>,
                       EtapMlaFp8Traits<DType, kRows, kKvLoader, kKvCache>>;
using Traits = std::conditional_t<kKvCache == KvCache::kSame, Bf16Traits, Fp8Traits>;
using CacheElement = Traits::Boxes::Element;
#ifdef ETAP_EMULATE_H20
static_assert(kKvCache == KvCache::kSame, "the fp8 kernels do not multiply through multiply()");
#endif

#define ETAP_CHECK_CUDA(call)                                                         \
  do {                                                                                \
    cudaError_t const status = (call);                                                \
    TVM_FFI_CHECK(status == cudaSuccess, RuntimeError)                                \
        << "etap_flashinfer: " << #call << " failed: " << cudaGetErrorString(status); \
  } while (0)

constexpr int kMaxDevices = 64;

// FlashMLA's layout is one pool of tokens, given both as ckv and as kpe.
constexpr bool kIsFlashMla = kKvCache == KvCache::kFp8FlashMla;
constexpr int kCkvColumns = kIsFlashMla ? kFlashMlaTokenBytes : kHeadDimCkv;
constexpr int kKpeColumns = kIsFlashMla ? kFlashMlaTokenBytes : kHeadDimKpe;

// One CTA of the attention kernel on each SM. Also the first touch of a device: allows the kernel
// its shared memory there.
int32_t prepare_device(int32_t device) {
  static std::atomic<int32_t> num_sms_of[kMaxDevices];
  TVM_FFI_CHECK(device >= 0 && device < kMaxDevices, ValueError)
      << "device index " << device << " is outside 0.." << kMaxDevices - 1;
  int32_t num_sms = num_sms_of[device].load(std::memory_order_acquire);
  if (num_sms == 0) {
    ETAP_CHECK_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    TVM_FFI_CHECK(num_sms <= kMostSms, RuntimeError)
        << "device " << device << " has " << num_sms << " SMs; at most " << kMostSms
        << " are allowed";
    num_sms = std::min(num_sms, kMostCtas);
    ETAP_CHECK_CUDA(cudaFuncSetAttribute(etap_mla_kernel<Traits>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         sizeof(typename Traits::SharedStorage)));
    num_sms_of[device].store(num_sms, std::memory_order_release);
  }
  return num_sms;
}

// Sizes of the workspace's three arrays, in this order; each is a multiple of 16 bytes.
struct WorkspacePlan {
  WorkspacePlan(int64_t slots, int64_t descriptors)
      : partial_out_bytes(slots * kHeadDimCkv * Traits::kRowTile * int64_t(sizeof(float))),
        partial_ml_bytes(slots * Traits::kRowTile * int64_t(sizeof(float2))),
        descriptor_bytes(descriptors * int64_t(sizeof(MergeDescriptor))) {}
  int64_t total() const { return partial_out_bytes + partial_ml_bytes + descriptor_bytes; }

  int64_t const partial_out_bytes, partial_ml_bytes, descriptor_bytes;
};

WorkspacePlan plan_workspace(int32_t num_ctas) { return {2 * int64_t(num_ctas), 0}; }

// Of a batch-invariant call.
WorkspacePlan plan_workspace(FixedSplitBound const& bound, int32_t num_ctas) {
  if (Traits::kFolds) return {int64_t(num_ctas) * count_fold_slots(bound.parts), 0};
  return {bound.slots(), bound.row_tiles};
}

FixedSplitBound bound_call(int64_t total_queries, int64_t batch, int64_t num_heads,
                           int64_t num_kv_indices, int64_t page_size, int64_t fixed_split_tiles) {
  int64_t const longest = (num_kv_indices * page_size + kTokenTile - 1) / kTokenTile;
  return bound_fixed_split(total_queries, batch, num_heads, Traits::kRowTile,
                           Traits::kFolds ? kMostLeaves : kMostFixedParts,
                           std::clamp<int64_t>(longest, 1, kLongestFixedSplit),
                           std::min<int64_t>(fixed_split_tiles, kLongestFixedSplit));
}

int64_t workspace_bytes(int64_t device) {
  tvm::ffi::CUDADeviceGuard const guard(device);
  return plan_workspace(prepare_device(device)).total();
}

// What calls of this variant keep for the next one: schedules, and behind them the places of parts.
int64_t plan_kept_bytes(int32_t num_ctas) {
  constexpr int64_t kSlotsOfCta = 2 * kSetsOfPlaces<Traits>;
  return num_ctas * int64_t(sizeof(KeptSchedule) + kSlotsOfCta * sizeof(PartPlaces<Traits>));
}

int64_t kept_bytes(int64_t device) {
  tvm::ffi::CUDADeviceGuard const guard(device);
  return plan_kept_bytes(prepare_device(device));
}

int64_t fixed_split_workspace_bytes(int64_t device, int64_t total_queries, int64_t batch,
                                    int64_t num_heads, int64_t num_kv_indices, int64_t page_size,
                                    int64_t fixed_split_tiles) {
  tvm::ffi::CUDADeviceGuard const guard(device);
  return plan_workspace(bound_call(total_queries, batch, num_heads, num_kv_indices, page_size,
                                   fixed_split_tiles),
                        prepare_device(device))
      .total();
}

decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static auto const encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    ETAP_CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                     cudaEnableDefault, &result));
    TVM_FFI_CHECK(result == cudaDriverEntryPointSuccess && function != nullptr, RuntimeError)
        << "the CUDA driver has no cuTensorMapEncodeTiled; it needs to support CUDA 12.0";
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A pool [num_pages, page_size, columns] read in boxes [rows_per_copy x box_columns], swizzled as
// wide as their rows, which have 128 or 64 bytes; not swizzled if they have 16. Columns before
// `first_column` are left out. With `boxes_per_copy` the boxes side by side are a dimension of
// their own, and a copy brings so many of them, one behind the other.
CUtensorMap make_pool_map(TensorView const& pool, int32_t rows_per_copy, int32_t box_columns,
                          int32_t first_column = 0, int32_t boxes_per_copy = 0) {
  auto const type = sizeof(CacheElement) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : std::is_same_v<CacheElement, cutlass::bfloat16_t>
                        ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  auto const row_bytes = box_columns * sizeof(CacheElement);
  auto const swizzle = row_bytes == 16   ? CU_TENSOR_MAP_SWIZZLE_NONE
                       : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                         : CU_TENSOR_MAP_SWIZZLE_128B;
  auto* const first = static_cast<CacheElement*>(pool.data_ptr()) + first_column;
  // The stride of a dimension of size 1 means nothing and may be anything; give a valid one.
  int64_t const row_stride = pool.size(1) > 1 ? pool.stride(1) : pool.size(2);
  int64_t const page_stride = pool.size(0) > 1 ? pool.stride(0) : pool.size(1) * row_stride;
  cuuint64_t const row_stride_bytes = row_stride * sizeof(CacheElement);
  cuuint64_t const page_stride_bytes = page_stride * sizeof(CacheElement);
  cuuint64_t const columns = pool.size(2) - first_column, rows = pool.size(1);
  cuuint64_t const pages = pool.size(0);
  bool const has_boxes = boxes_per_copy > 0;
  cuuint32_t const rank = has_boxes ? 4 : 3;
  cuuint64_t sizes[4] = {columns, rows, pages};
  cuuint64_t strides[3] = {row_stride_bytes, page_stride_bytes};
  cuuint32_t box[4] = {cuuint32_t(box_columns), cuuint32_t(rows_per_copy), 1};
  if (has_boxes) {
    sizes[0] = box_columns, sizes[2] = columns / box_columns, sizes[3] = pages;
    strides[1] = row_bytes, strides[2] = page_stride_bytes;
    box[2] = boxes_per_copy, box[3] = 1;
  }
  cuuint32_t const element_strides[4] = {1, 1, 1, 1};
  // Promotion to 256 bytes reads parts of tokens twice: 7 % slower at 16 x 64K (scripts/TUNING.md).
  auto const promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  CUtensorMap map;
  CUresult const status = tensor_map_encoder()(
      &map, type, rank, first, sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TVM_FFI_CHECK(status == CUDA_SUCCESS, ValueError)
      << "no tensor map for a cache of shape [" << pool.size(0) << ", " << pool.size(1) << ", "
      << pool.size(2) << "] with strides [" << pool.stride(0) << ", " << pool.stride(1)
      << ", 1] elements at " << pool.data_ptr() << " (CUresult " << int(status)
      << "): strides and address must be multiples of 16 bytes";
  return map;
}

// Dependent launches: set up while the kernel before runs, kernels wait in
// cudaGridDependencySynchronize() until it has ended.
template <typename... Arguments>
void launch_dependent(void (*kernel)(Arguments...), int32_t num_ctas, int32_t threads,
                      int32_t shared_bytes, cudaStream_t stream, Arguments const&... arguments) {
  cudaLaunchAttribute dependent;
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = num_ctas;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  ETAP_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename T>
T* pointer(TensorView const& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void run(TensorView workspace, TensorView kept, TensorView q_nope, TensorView q_pe, TensorView ckv,
         TensorView kpe, TensorView qo_indptr, TensorView kv_indptr, TensorView kv_indices,
         TensorView kv_len_arr, TensorView out, Optional<TensorView> lse, bool causal,
         double sm_scale, bool lse_base_e, double ckv_scale, double kpe_scale,
         int64_t fixed_split_tiles) {
  int32_t const device = q_nope.device().device_id;
  tvm::ffi::CUDADeviceGuard const guard(device);
  int32_t const num_ctas = prepare_device(device);
  bool const is_batch_invariant = fixed_split_tiles > 0;
  FixedSplitBound bound = {};
  if (is_batch_invariant) {
    bound = bound_call(q_nope.size(0), kv_len_arr.numel(), q_nope.size(1), kv_indices.numel(),
                       ckv.size(1), fixed_split_tiles);
  }
  WorkspacePlan const plan =
      is_batch_invariant ? plan_workspace(bound, num_ctas) : plan_workspace(num_ctas);
  int32_t const page_size = ckv.size(1);
  int32_t const rows_per_copy = std::gcd(page_size, kTokenTile);

  TVM_FFI_CHECK(workspace.numel() >= plan.total(), ValueError)
      << "float_workspace_buffer has " << workspace.numel() << " bytes; " << plan.total()
      << " are needed" << (is_batch_invariant ? " for the parts that fixed_split_size makes" : "");
  TVM_FFI_CHECK(kept.numel() >= plan_kept_bytes(num_ctas), ValueError)
      << "what calls keep has " << kept.numel() << " bytes; " << plan_kept_bytes(num_ctas)
      << " are needed";
  TVM_FFI_CHECK(plan.partial_out_bytes / int64_t(sizeof(float)) <= INT32_MAX, ValueError)
      << "with this fixed_split_size the parts' results take " << plan.partial_out_bytes
      << " bytes; at most 8 GiB are allowed";
  TVM_FFI_CHECK(q_nope.size(2) == kHeadDimCkv && q_pe.size(2) == kHeadDimKpe &&
                    ckv.size(2) == kCkvColumns && kpe.size(2) == kKpeColumns,
                ValueError)
      << "head dimensions must be " << kHeadDimCkv << " (ckv) and " << kHeadDimKpe
      << " (kpe), columns of the cache " << kCkvColumns << " and " << kKpeColumns;
  TVM_FFI_CHECK(ckv.size(0) == kpe.size(0) && ckv.size(1) == kpe.size(1), ValueError)
      << "ckv and kpe must have the same number of pages and the same page size";
  TVM_FFI_CHECK(qo_indptr.numel() > kv_len_arr.numel() && kv_indptr.numel() > kv_len_arr.numel(),
                ValueError)
      << "qo_indptr and kv_indptr must have at least batch + 1 = " << kv_len_arr.numel() + 1
      << " elements";
  TVM_FFI_CHECK(q_nope.size(0) * q_nope.size(1) <= INT32_MAX && kv_indices.numel() <= INT32_MAX &&
                    ckv.size(0) <= INT32_MAX,
                ValueError)
      << "queries x heads, kv_indices and pages are counted in 32 bits";
  TVM_FFI_CHECK(kKvLoader == KvLoader::kGather || rows_per_copy >= 8, ValueError)
      << "page size " << page_size << " needs the gather loader";

  Params params = {};
  params.q_nope = q_nope.data_ptr();
  params.q_pe = q_pe.data_ptr();
  params.ckv = ckv.data_ptr();
  params.kpe = pointer<CacheElement>(kpe) + (kIsFlashMla ? kFlashMlaKpeOffset : 0);
  params.q_nope_stride_token = q_nope.stride(0);
  params.q_nope_stride_head = q_nope.stride(1);
  params.q_pe_stride_token = q_pe.stride(0);
  params.q_pe_stride_head = q_pe.stride(1);
  params.ckv_stride_page = ckv.stride(0);
  params.ckv_stride_token = ckv.stride(1);
  params.kpe_stride_page = kpe.stride(0);
  params.kpe_stride_token = kpe.stride(1);
  params.qo_indptr = pointer<int32_t>(qo_indptr);
  params.kv_indptr = pointer<int32_t>(kv_indptr);
  params.kv_indices = pointer<int32_t>(kv_indices);
  params.kv_len_arr = pointer<int32_t>(kv_len_arr);
  params.num_kv_indices = kv_indices.numel();
  params.batch = kv_len_arr.numel();
  params.requests_per_thread = (params.batch + kThreads - 1) / kThreads;
  params.fixed_split_tiles = std::clamp<int64_t>(fixed_split_tiles, 0, kLongestFixedSplit);
  params.most_row_tiles = Traits::kFolds ? 0 : std::min<int64_t>(bound.row_tiles, INT32_MAX);
  params.most_parts = bound.parts;
  params.fold_slots = count_fold_slots(bound.parts);
  params.num_heads = q_nope.size(1);
  params.log_row_tiles_together =
      Traits::kPairsRowTiles && params.num_heads % 128 == 0 && !is_batch_invariant ? 1 : 0;
  params.total_queries = q_nope.size(0);
  params.num_pages = ckv.size(0);
  params.page_size = page_size;
  params.rows_per_copy = rows_per_copy;
  params.divide_by_heads = cutlass::FastDivmod(params.num_heads);
  params.divide_by_page_size = cutlass::FastDivmod(page_size);
  params.causal = causal;
  params.ckv_scale = float(ckv_scale);
  params.kpe_over_ckv_scale = float(kpe_scale / ckv_scale);
  params.scale_log2 = float(sm_scale * 1.4426950408889634);
  params.lse_factor = lse_base_e ? 0.6931471805599453f : 1.f;
  params.out = out.data_ptr();
  params.out_stride_token = out.stride(0);
  params.out_stride_head = out.stride(1);
  params.lse = lse.has_value() ? pointer<float>(lse.value()) : nullptr;
  auto* const bytes = pointer<uint8_t>(workspace);
  params.partial_out = reinterpret_cast<float*>(bytes);
  params.partial_ml = reinterpret_cast<float2*>(bytes + plan.partial_out_bytes);
  params.merge_descriptors =
      reinterpret_cast<MergeDescriptor*>(bytes + plan.partial_out_bytes + plan.partial_ml_bytes);

  params.kept_schedules = pointer<KeptSchedule>(kept);
  params.parts = params.kept_schedules + num_ctas;
  int32_t const schedule_key[kScheduleKeyWords] = {
      kRows | Traits::kEmptyPlaces << 8 | int32_t(kKvCache) << 16,
      num_ctas,
      params.batch,
      params.num_heads,
      params.total_queries,
      params.num_kv_indices,
      params.page_size,
      params.causal | params.log_row_tiles_together << 1,
      params.fixed_split_tiles,
      params.most_row_tiles,
      params.most_parts};
  std::copy_n(schedule_key, kScheduleKeyWords, params.schedule_key);

  CUtensorMap ckv_map = {}, kpe_map = {};
  if constexpr (kKvLoader == KvLoader::kTma) {
    int32_t const boxes_per_copy = Traits::kBoxesPerPair == 0    ? 0
                                   : rows_per_copy == kTokenTile ? Traits::kBoxesPerPair
                                                                 : 1;
    ckv_map = make_pool_map(ckv, rows_per_copy, Traits::Boxes::kColumns, 0, boxes_per_copy);
    kpe_map = kIsFlashMla
                  ? make_pool_map(kpe, rows_per_copy, kFlashMlaScaleBytes, kFlashMlaScaleOffset)
                  : make_pool_map(kpe, rows_per_copy, kHeadDimKpe, 0, std::min(boxes_per_copy, 1));
  }
  auto const stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device));
  launch_dependent(etap_mla_kernel<Traits>, num_ctas, Traits::kCtaThreads,
                   sizeof(typename Traits::SharedStorage), stream, params, ckv_map, kpe_map);
  if constexpr (!Traits::kFolds) {
    if (is_batch_invariant) {
      launch_dependent(etap_mla_merge_kernel<Traits>, kMergeCtasPerSm * num_ctas, kMergeThreads, 0,
                       stream, params);
    }
  }
}

}  // namespace
}  // namespace etap

TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, etap::run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_bytes, etap::workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kept_bytes, etap::kept_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fixed_split_workspace_bytes, etap::fixed_split_workspace_bytes);
