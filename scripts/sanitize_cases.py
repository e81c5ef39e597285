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

SM_SCALE = 192**-0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WORKSPACE_BYTES = 128 * 1024 * 1024


def small_case(
    seed: int, heads: int, page_size: int, dtype: torch.dtype
) -> tuple[tuple, tuple, torch.Tensor]:
    """Arguments of plan() and run() on the CPU, and the exact output in float64."""
    generator = torch.Generator().manual_seed(seed)
    q_lens, kv_lens = [1, 2, 1], [130, 65, 0]
    pages = [-(-length // page_size) for length in kv_lens]
    cache = torch.full((sum(pages), page_size, 576), torch.nan, dtype=dtype)
    kv_indices = torch.randperm(sum(pages), generator=generator).int()
    queries = torch.randn(sum(q_lens), heads, 576, generator=generator).to(dtype)
    expected = torch.zeros(sum(q_lens), heads, 512, dtype=torch.float64)
    qo_indptr, kv_indptr = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, pages))
    for request, length in enumerate(kv_lens):
        tokens = torch.randn(length, 576, generator=generator).to(dtype)
        own = kv_indices[kv_indptr[request] : kv_indptr[request + 1]].long()
        rows = (own[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        cache.view(-1, 576)[rows] = tokens
        for query in range(q_lens[request] if length else 0):
            visible = tokens[: length - q_lens[request] + 1 + query].double()
            row = int(qo_indptr[request]) + query
            scores = queries[row].double() @ visible.T * SM_SCALE
            expected[row] = scores.softmax(-1) @ visible[:, :512]
    lengths = torch.tensor(kv_lens, dtype=torch.int32)
    indices = (qo_indptr, kv_indptr, kv_indices, lengths)
    plan = (*indices, heads, 512, 64, page_size, True, SM_SCALE, dtype, dtype)
    run = (queries[..., :512], queries[..., 512:], cache[..., :512], cache[..., 512:])
    return plan, run, expected


def run_case(heads: int, page_size: int, dtype: str, seed: int, wrapper: object) -> bool:
    """One launch on the GPU; True if it agrees with float64."""
    plan, run, expected = small_case(seed, heads, page_size, DTYPES[dtype])
    fused = [
        torch.cat(pair, -1).cuda() for pair in (run[:2], run[2:])
    ]  # views of one tensor, as SGLang has them
    on_gpu = [view for tensor in fused for view in (tensor[..., :512], tensor[..., 512:])]
    wrapper.plan(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in plan))
    out, lse = wrapper.run(*on_gpu, return_lse=True)
    out, lse = out.cpu().double(), lse.cpu()
    rounding = (expected.to(DTYPES[dtype]).double() - expected).square().mean().sqrt()
    error = (out - expected).square().mean().sqrt()
    right = bool(error <= 1.15 * rounding) and bool(torch.isneginf(lse[-1]).all())
    print(
        f"{heads} heads, page {page_size}, {dtype}: rmse {error:.3e}, rounding {rounding:.3e}, "
        f"{'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def missing_variants(wrapper: object, dtypes: list[str]) -> list[str]:
    """Compiled variants of ``dtypes`` that ``wrapper`` has not used."""
    from etap_flashinfer import jit

    wanted = {
        (variant.dtype, variant.row_tile, variant.kv_loader): variant.short_name
        for variant in jit.ALL_VARIANTS
        if variant.dtype in {DTYPES[name] for name in dtypes}
    }
    return [name for key, name in wanted.items() if key not in wrapper._kernels]


def main() -> int:
    """All row tiles and both loaders, in both types unless --dtype names one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), nargs="+", default=sorted(DTYPES))
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16, 32, 72])
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 48, 64])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import etap_flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    cells = itertools.product(options.heads, options.page_size, options.dtype)
    results = [run_case(*cell, options.seed + index, wrapper) for index, cell in enumerate(cells)]
    torch.cuda.synchronize()
    missing = missing_variants(wrapper, options.dtype)
    print(f"{sum(results)} of {len(results)} cases right; variants not run: {missing or 'none'}")
    return 0 if all(results) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
