"""Plain PyTorch MLA over a paged cache: the reference backend, and the ground truth of the tests.

It computes equation by equation what ETAP (arXiv 2506.01969) computes transposed: for each request
S = sm_scale * [q_nope | q_pe] @ [ckv | kpe]^T and O = softmax(S) @ ckv.
"""

import math

import torch

from . import quantization, validation
from .planning import Plan


def mla_paged_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len_arr: torch.Tensor,
    causal: bool,
    sm_scale: float,
    *,
    accumulate_dtype: torch.dtype = torch.float32,
    lse_base_e: bool = False,
    kv_cache_format: str | None = None,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every query to the cached tokens of its request.

    With ``causal``, query ``i`` of a request sees the tokens below ``kv_len - q_len + i + 1``. A
    query that sees no token gets output 0 and LSE -inf. Only the first ``ceil(kv_len / page_size)``
    pages of a request are read, and of the last one nothing beyond ``kv_len`` is used.

    Parameters
    ----------
    q_nope, q_pe : torch.Tensor
        Queries, shapes ``[total queries, heads, head_dim_ckv]`` and ``[.., head_dim_kpe]``.
    ckv_cache, kpe_cache : torch.Tensor
        Cache, shapes ``[pages, page_size, head_dim_ckv]`` and ``[.., head_dim_kpe]``; with
        ``kv_cache_format="flashmla_656"`` both are the packed cache, ``[pages, page_size, 656]``.
    qo_indptr, kv_indptr : torch.Tensor
        Offsets of each request's queries, and of its pages in ``kv_indices``; int32, shape
        ``[batch + 1]`` or longer, any device.
    kv_indices : torch.Tensor
        Page indices, int32.
    kv_len_arr : torch.Tensor
        Cached tokens of each request, int32, shape ``[batch]``.
    causal : bool
        Whether later queries of a request see more tokens than earlier ones.
    sm_scale : float
        Factor of the scores before the softmax.
    accumulate_dtype : torch.dtype
        ``torch.float32`` or ``torch.float64``: type of all arithmetic and of the results.
    lse_base_e : bool
        Whether the log-sum-exp is the natural one; base 2 otherwise.
    kv_cache_format : str, optional
        Of an fp8 cache, as ``plan`` takes it; such a cache may be uint8.
    ckv_scale, kpe_scale : float
        What the codes of the format ``"fp8_e4m3"`` are multiplied with.

    Returns
    -------
    out : torch.Tensor
        Shape ``[total queries, heads, head_dim_ckv]``, ``accumulate_dtype``.
    lse : torch.Tensor
        Shape ``[total queries, heads]``, ``accumulate_dtype``.

    Raises
    ------
    ValueError
        If the offsets, lengths or page indices don't fit one another, the queries or the pool.
    """
    page_size = ckv_cache.shape[1]
    batch_size = kv_len_arr.numel()
    qo_indptr, kv_indptr, kv_indices, kv_len_arr = (
        tensor.cpu() for tensor in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
    )
    validation.check_page_values(kv_indptr, kv_indices, kv_len_arr, page_size)
    total_queries, _ = validation.query_extent(qo_indptr, batch_size)
    if total_queries != q_nope.shape[0]:
        raise ValueError(
            f"q_nope holds {q_nope.shape[0]} queries; qo_indptr ends at {total_queries}"
        )
    query_offsets, page_offsets = qo_indptr.tolist(), kv_indptr.tolist()

    out = torch.zeros(q_nope.shape, dtype=accumulate_dtype, device=q_nope.device)
    lse = torch.full(q_nope.shape[:2], -math.inf, dtype=accumulate_dtype, device=q_nope.device)
    for request, length in enumerate(kv_len_arr.tolist()):
        queries = slice(query_offsets[request], query_offsets[request + 1])
        if length == 0 or queries.start == queries.stop:
            continue
        first = page_offsets[request]
        pages = kv_indices[first : first + -(-length // page_size)]
        _check_pages(pages, ckv_cache.shape[0], request)
        pages = pages.to(ckv_cache.device)
        ckv = _read(ckv_cache, pages, length)
        if kv_cache_format == "flashmla_656":
            tokens = quantization.dequantize_flashmla_656(ckv, accumulate_dtype)
            ckv, kpe = tokens[:, : q_nope.shape[2]], tokens[:, q_nope.shape[2] :]
        else:
            kpe = _read(kpe_cache, pages, length)
            if kv_cache_format == "fp8_e4m3":
                ckv = ckv.view(quantization.FP8_DTYPE).to(accumulate_dtype) * ckv_scale
                kpe = kpe.view(quantization.FP8_DTYPE).to(accumulate_dtype) * kpe_scale
        out[queries], lse[queries] = _attend(
            q_nope[queries].to(accumulate_dtype),
            q_pe[queries].to(accumulate_dtype),
            ckv.to(accumulate_dtype),
            kpe.to(accumulate_dtype),
            causal,
            sm_scale,
        )
    return out, lse if lse_base_e else lse * math.log2(math.e)


def run(
    plan: Plan,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scales: tuple[float, float],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    lse_base_e: bool,
) -> None:
    """Serve a plan: in float32, with an fp8 cache, whose values float32 can't all hold, in float64.

    ``inputs`` are q_nope, q_pe, ckv_cache and kpe_cache, ``scales`` those of the two caches.
    """
    problem = plan.problem
    is_fp8 = problem.kv_cache_format is not None
    exact_out, exact_lse = mla_paged_attention(
        *inputs,
        *plan.index,
        problem.causal,
        problem.sm_scale,
        accumulate_dtype=torch.float64 if is_fp8 else torch.float32,
        lse_base_e=lse_base_e,
        kv_cache_format=problem.kv_cache_format,
        ckv_scale=scales[0],
        kpe_scale=scales[1],
    )
    out.copy_(exact_out)
    if lse is not None:
        lse.copy_(exact_lse)


def _check_pages(pages: torch.Tensor, num_pages: int, request: int) -> None:
    outside = pages[(pages < 0) | (pages >= num_pages)]
    if outside.numel() > 0:
        raise ValueError(
            f"kv_indices gives request {request} page {int(outside[0])}; the cache has pages 0 to "
            f"{num_pages - 1}"
        )


def _read(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """Gather the first ``length`` tokens of the pages: ``[length, columns]``."""
    return cache[pages].flatten(0, 1)[:length]


def _attend(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor,
    causal: bool,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within one request; returns output and natural log-sum-exp."""
    query_len, num_heads, _ = q_nope.shape
    length = ckv.shape[0]
    scores = q_nope.flatten(0, 1) @ ckv.T
    scores += q_pe.flatten(0, 1) @ kpe.T
    scores *= sm_scale
    if causal:
        device = ckv.device
        visible = length - query_len + 1 + torch.arange(query_len, device=device)
        hidden = torch.arange(length, device=device) >= visible.unsqueeze(1)
        scores.view(query_len, num_heads, length).masked_fill_(hidden.unsqueeze(1), -math.inf)
    # A row that sees no token has maximum -inf; with 0 instead its exponentials are 0, not NaN.
    row_max = scores.amax(dim=1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -math.inf, 0)
    weights = (scores - row_max).exp_()
    row_sum = weights.sum(dim=1, keepdim=True)
    out = (weights @ ckv) / row_sum.masked_fill(row_sum == 0, 1)
    lse = row_sum.log() + row_max
    return out.view(q_nope.shape), lse.view(query_len, num_heads)
