"""Problems with an fp8 cache: what no request may read is NaN, the reference reads what codes are
worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from gpu_helpers import Problem, check, make_problem

from etap_flashinfer import dispatch, quantization

FORMATS = tuple(name for name in dispatch.KV_CACHE_OF_FORMAT if name is not None)
RMSE_BOUND = 1.5
# Of few rows: 1.66 was measured, and 1.78 with the same arithmetic on the CPU (scripts/TUNING.md).
SHOWN_RMSE_BOUND = 2.0
WIDTHS = {"fp8_e4m3": 576, "flashmla_656": 656}


@dataclasses.dataclass
class Fp8Problem(Problem):
    """A problem whose ``tokens`` are the values, float64, of the codes in the cache.

    ``pool`` is the whole cache as bytes: ``[pages, page_size, 576]`` or ``[.., 656]``.
    """

    pool: torch.Tensor
    cache_format: str
    ckv_scale: float | None
    kpe_scale: float | None

    def plan_options(self) -> dict:
        return {"kv_cache_format": self.cache_format}

    def plan_arguments(self) -> tuple:
        return (*super().plan_arguments()[:-1], torch.float8_e4m3fn)

    def run_options(self) -> dict:
        if self.cache_format == "flashmla_656":
            return {}
        return {"ckv_scale": self.ckv_scale, "kpe_scale": self.kpe_scale}


def make_fp8_problem(
    seed: int,
    *arguments,
    cache_format: str,
    scales: tuple[float | None, float | None] = (None, None),
    change: Callable[[torch.Tensor, Problem], torch.Tensor] | None = None,
    cache_layout: str = "fused",
    **options,
) -> Fp8Problem:
    """``gpu_helpers.make_problem`` with its tokens quantised.

    Parameters
    ----------
    scales : pair of float, optional
        Of "fp8_e4m3"; chosen from the data where None.
    change : callable, optional
        Makes other tokens of the random ones, all requests' as ``[tokens, 576]``.
    cache_layout : str
        "fused" or "separate": ckv and kpe of "fp8_e4m3" as views of one pool or as two.
    """
    problem = make_problem(seed, *arguments, **options)
    tokens = torch.cat(problem.tokens)
    if change is not None:
        tokens = change(tokens, problem)
    if cache_format == "flashmla_656":
        return with_packed_tokens(problem, quantization.quantize_flashmla_656(tokens).cache)
    given = quantization.quantize_fp8_e4m3(tokens, *scales)
    codes = given.cache.view(torch.uint8)
    return with_codes(problem, codes, (given.ckv_scale, given.kpe_scale), cache_layout)


def with_codes(
    problem: Problem,
    codes: torch.Tensor,
    scales: tuple[float, float],
    cache_layout: str = "fused",
) -> Fp8Problem:
    """The problem with tokens ``[tokens, 576]`` of e4m3 codes, as uint8, in a pool of NaN codes."""
    pool = torch.full((*problem.ckv.shape[:2], 576), 0xFF, dtype=torch.uint8, device="cuda")
    pool[..., ::2] = 0x7F
    pool.view(-1, 576)[token_slots(problem)] = codes
    views = pool.view(torch.float8_e4m3fn)
    ckv, kpe = views[..., :512], views[..., 512:]
    if cache_layout == "separate":
        ckv, kpe = ckv.contiguous(), kpe.contiguous()
    values = quantization.dequantize_fp8_e4m3(codes, *scales, torch.float64)
    return _with_cache(problem, values, ckv, kpe, pool, "fp8_e4m3", scales)


def with_packed_tokens(problem: Problem, packed: torch.Tensor) -> Fp8Problem:
    """The problem with tokens ``[tokens, 656]`` in FlashMLA's layout; the rest of the pool is NaN:
    as e4m3, as fp32 and as bf16."""
    pool = torch.full((*problem.ckv.shape[:2], 656), 0xFF, dtype=torch.uint8, device="cuda")
    pool.view(-1, 656)[token_slots(problem)] = packed
    values = quantization.dequantize_flashmla_656(packed, torch.float64)
    return _with_cache(problem, values, pool, None, pool, "flashmla_656", (None, None))


def _with_cache(
    problem: Problem,
    values: torch.Tensor,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    pool: torch.Tensor,
    cache_format: str,
    scales: tuple[float | None, float | None],
) -> Fp8Problem:
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(Problem)}
    fields |= {"tokens": list(values.split(problem.kv_lens)), "ckv": ckv, "kpe": kpe}
    return Fp8Problem(
        **fields, pool=pool, cache_format=cache_format, ckv_scale=scales[0], kpe_scale=scales[1]
    )


def token_slots(problem: Problem) -> torch.Tensor:
    """Row of the pool, page * page_size + offset, of every token of every request."""
    size = problem.page_size
    starts, pages = problem.kv_indptr.tolist(), problem.kv_indices.long().cpu()
    rows = []
    for start, length in zip(starts, problem.kv_lens, strict=False):
        own = pages[start : start - (-length // size)]
        rows.append((own[:, None] * size + torch.arange(size)).flatten()[:length])
    return torch.cat(rows).cuda()


def token_slot(problem: Problem, request: int, token: int) -> tuple[int, int]:
    """Page and offset within it of one token."""
    entry = int(problem.kv_indptr[request]) + token // problem.page_size
    return int(problem.kv_indices[entry]), token % problem.page_size


def check_fp8(
    problem: Fp8Problem,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    record: Callable[[dict], None] | None = None,
    rmse_bound: float | None = None,
) -> None:
    """Compare with float64 attention on the values of the codes.

    Next to an fp16 output it shows what the kernels for e4m3 codes with one scale leave: P in fp16
    or, up to 16 rows, products of which 13 bits behind the largest are kept (scripts/TUNING.md).
    """
    is_shown = problem.cache_format == "fp8_e4m3" and problem.dtype == torch.float16
    if rmse_bound is None:
        rmse_bound = SHOWN_RMSE_BOUND if is_shown else RMSE_BOUND
    check(problem, out, lse, record, rmse_bound, 2.0**-11 if is_shown else 0.0)
