#!/usr/bin/env python
"""Runs every kernel variant on tiny inputs, for compute-sanitizer to watch, and checks the results.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python scripts/sanitize_cases.py

The reference is computed on the CPU and inputs are made there, so that hardly any kernel but ours
runs. Without the caching allocator every tensor is an allocation of its own, and a read behind its
end is an error that memcheck sees. Exit status: 0 if all results are right and all variants of the
types asked for have run, 1 if not.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from etap_flashinfer import dispatch, planning, quantization

SM_SCALE = 192**-0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RMSE_BOUNDS = {"same": 1.15, "fp8": 1.5, "flashmla_656": 1.15}  # times that of rounding
# Next to a result of fp16, sums of 13 bits show (scripts/TUNING.md); as in tests/gpu.
FP16_RMSE_BOUNDS = RMSE_BOUNDS | {"fp8": 1.6}
WORKSPACE_BYTES = 128 * 1024 * 1024


def has_plain_pairs(heads: int) -> bool:
    """Whether the kernel has a loop of its own for tiles that no mask concerns."""
    return heads > 64


def small_case(
    seed: int, heads: int, page_size: int, dtype: torch.dtype, kv_cache: str = "same"
) -> tuple[dict, dict, torch.Tensor]:
    """Arguments of plan() and run() on the CPU, and the exact output in float64."""
    generator = torch.Generator().manual_seed(seed)
    q_lens, kv_lens = [1, 2, 1], [700 if has_plain_pairs(heads) else 130, 65, 0]
    pages = [-(-length // page_size) for length in kv_lens]
    cache = torch.full((sum(pages), page_size, 576), torch.nan, dtype=dtype)
    kv_indices = torch.randperm(sum(pages), generator=generator).int()
    queries = torch.randn(sum(q_lens), heads, 576, generator=generator).to(dtype)
    qo_indptr, kv_indptr = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, pages))
    rows = []
    for request, length in enumerate(kv_lens):
        own = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
        rows.append((own[:, None] * page_size + torch.arange(page_size)).flatten()[:length])
        cache.view(-1, 576)[rows[-1]] = torch.randn(length, 576, generator=generator).to(dtype)
    run, values = cache_arguments(cache, kv_cache)
    cache_format = {"kv_cache_format": "flashmla_656"} if kv_cache == "flashmla_656" else {}
    expected = torch.zeros(sum(q_lens), heads, 512, dtype=torch.float64)
    for request, length in enumerate(kv_lens):
        tokens = values.view(-1, 576)[rows[request]]
        for query in range(q_lens[request] if length else 0):
            visible = tokens[: length - q_lens[request] + 1 + query]
            row = int(qo_indptr[request]) + query
            scores = queries[row].double() @ visible.T * SM_SCALE
            expected[row] = scores.softmax(-1) @ visible[:, :512]
    plan = {
        "qo_indptr": qo_indptr,
        "kv_indptr": kv_indptr,
        "kv_indices": kv_indices,
        "kv_len_arr": torch.tensor(kv_lens, dtype=torch.int32),
        "num_heads": heads,
        "head_dim_ckv": 512,
        "head_dim_kpe": 64,
        "page_size": page_size,
        "causal": True,
        "sm_scale": SM_SCALE,
        "q_data_type": dtype,
        "kv_data_type": dtype if kv_cache == "same" else quantization.FP8_DTYPE,
        **cache_format,
    }
    return plan, {"query": queries, **run}, expected


def cache_arguments(cache: torch.Tensor, kv_cache: str) -> tuple[dict, torch.Tensor]:
    """Arguments of run() for a cache, and its values in float64; NaN stays NaN."""
    if kv_cache == "same":
        return {"kv_cache": cache}, cache.double()
    if kv_cache == "flashmla_656":
        packed = quantization.quantize_flashmla_656(cache).cache
        packed[cache.isnan().any(-1)] = 0xFF  # NaN as scale, too
        return {"kv_cache": packed}, quantization.dequantize_flashmla_656(packed, torch.float64)
    given = quantization.quantize_fp8_e4m3(cache)
    scales = {"ckv_scale": given.ckv_scale, "kpe_scale": given.kpe_scale}
    values = quantization.dequantize_fp8_e4m3(given.cache, **scales, dtype=torch.float64)
    return {"kv_cache": given.cache, **scales}, values


def run_case(
    heads: int,
    page_size: int,
    dtype: str,
    kv_cache: str,
    is_batch_invariant: bool,
    seed: int,
    wrapper: object,
    used: set[planning.VariantKey],
) -> bool:
    """One launch on the GPU, of a variant that joins ``used``; True if it agrees with float64."""
    plan, run, expected = small_case(seed, heads, page_size, DTYPES[dtype], kv_cache)
    if is_batch_invariant:
        tiles = 16 if has_plain_pairs(heads) else 1
        plan["fixed_split_size"] = tiles * dispatch.pages_of_smallest_part(page_size)
    plan, run = (
        {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        for arguments in (plan, run)
    )
    wrapper.plan(**plan)
    out, lse = wrapper.run(**run, return_lse=True)
    launched = wrapper._plan.checked_call.kernel
    used |= {key for key, kernel in wrapper._executor.kernels.items() if kernel is launched}
    out, lse = out.cpu().double(), lse.cpu()
    rounding = (expected.to(DTYPES[dtype]).double() - expected).square().mean().sqrt()
    error = (out - expected).square().mean().sqrt()
    bounds = FP16_RMSE_BOUNDS if dtype == "fp16" else RMSE_BOUNDS
    right = bool(error <= bounds[kv_cache] * rounding) and bool(torch.isneginf(lse[-1]).all())
    print(
        f"{heads} heads, page {page_size}, {dtype}, {kv_cache} cache"
        f"{', batch-invariant' if is_batch_invariant else ''}: rmse {error:.3e}, rounding "
        f"{rounding:.3e}, {'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def missing_variants(
    used: set[planning.VariantKey], dtypes: list[str], kv_caches: list[str]
) -> list[str]:
    """Compiled variants of ``dtypes`` and ``kv_caches`` that are not ``used``."""
    from etap_flashinfer import jit

    wanted = {
        (variant.dtype, variant.row_tile, variant.kv_loader, variant.kv_cache): variant.short_name
        for variant in jit.ALL_VARIANTS
        if variant.dtype in {DTYPES[name] for name in dtypes} and variant.kv_cache in kv_caches
    }
    return [name for key, name in wanted.items() if key not in used]


def main() -> int:
    """All row tiles, loaders and caches, in both types unless --dtype names one, in both modes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), nargs="+", default=sorted(DTYPES))
    parser.add_argument(
        "--kv-cache", choices=list(RMSE_BOUNDS), nargs="+", default=list(RMSE_BOUNDS)
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16, 32, 72])
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 48, 64])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import etap_flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    cells = itertools.product(
        options.heads, options.page_size, options.dtype, options.kv_cache, (False, True)
    )
    dispatch.MIN_LONG_TILES = 0  # so small a case counts as a long one
    used: set[planning.VariantKey] = set()
    results = [
        run_case(*cell, options.seed + index, wrapper, used) for index, cell in enumerate(cells)
    ]
    torch.cuda.synchronize()
    missing = missing_variants(used, options.dtype, options.kv_cache)
    print(f"{sum(results)} of {len(results)} cases right; variants not run: {missing or 'none'}")
    return 0 if all(results) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
