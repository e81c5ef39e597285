"""The formats of a paged latent cache: what ``plan`` and ``run`` accept, what the kernel takes."""

from typing import Any, Literal, get_args

import torch

from . import quantization, validation
from .dispatch import HEAD_DIM_CKV, HEAD_DIM_KPE
from .quantization import FLASHMLA_TOKEN_BYTES, FP8_DTYPE
from .validation import Problem

KvCacheFormat = Literal["fp8_e4m3", "flashmla_656"]
# For the kernel, tokens and pages of an fp8 cache start at multiples of 16 bytes.
STRIDE_BYTES = 16
_OTHER_FP8_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def resolve(kv_data_type: torch.dtype, kv_cache_format: Any) -> KvCacheFormat | None:
    """The fp8 format that a plan asks for; None for a cache of plain bf16, fp16 or fp32.

    Raises
    ------
    ValueError
        If the format is none of those known or contradicts ``kv_data_type``, or ``kv_data_type``
        is an fp8 type other than e4m3fn.
    """
    if kv_cache_format is not None and kv_cache_format not in get_args(KvCacheFormat):
        raise ValueError(
            f"kv_cache_format is {kv_cache_format!r}; allowed: None, "
            f"{', '.join(map(repr, get_args(KvCacheFormat)))}"
        )
    if kv_data_type in _OTHER_FP8_DTYPES:
        raise ValueError(
            f"kv_data_type is {kv_data_type}; of the fp8 types only {FP8_DTYPE} is supported "
            "(etap_flashinfer.quantization makes such a cache)"
        )
    if kv_data_type == torch.uint8:
        raise ValueError(
            f"kv_data_type is torch.uint8; plan an fp8 cache as {FP8_DTYPE}: run() then takes its "
            "bytes, too"
        )
    if kv_data_type != FP8_DTYPE:
        if kv_cache_format is not None:
            raise ValueError(
                f"kv_cache_format {kv_cache_format!r} needs kv_data_type {FP8_DTYPE}, got "
                f"{kv_data_type}"
            )
        return None
    return kv_cache_format or "fp8_e4m3"


def refuse_stock(
    kv_data_type: Any, kv_cache_format: Any, backend: str, etap_refusal: str | None
) -> None:
    """Refuse a format that stock FlashInfer does not read, or that is none.

    ``backend`` is the one asked for; ``etap_refusal`` says why ETAP, which would have been taken
    first, does not serve.
    """
    if kv_cache_format is None or resolve(kv_data_type, kv_cache_format) != "flashmla_656":
        return
    reason = f", and ETAP does not serve: {etap_refusal}" if etap_refusal else ""
    raise ValueError(
        f"backend {backend!r}: stock FlashInfer does not read kv_cache_format "
        f"{kv_cache_format!r}{reason}; use backend='etap' on a Hopper GPU or 'reference' (plain "
        "PyTorch), or requantise the cache to 'fp8_e4m3' (etap_flashinfer.quantization: "
        "dequantize_flashmla_656, then quantize_fp8_e4m3)"
    )


def check_head_dims(problem: Problem) -> None:
    """Check that the planned widths are those of FlashMLA's layout, if that is planned."""
    given = (problem.head_dim_ckv, problem.head_dim_kpe)
    if problem.kv_cache_format == "flashmla_656" and given != (HEAD_DIM_CKV, HEAD_DIM_KPE):
        raise ValueError(
            f"kv_cache_format 'flashmla_656' holds head_dim_ckv {HEAD_DIM_CKV} and head_dim_kpe "
            f"{HEAD_DIM_KPE}, got {given[0]} and {given[1]}"
        )


def checked_scales(problem: Problem, ckv_scale: Any, kpe_scale: Any) -> tuple[float, float]:
    """The scales of ckv and kpe, 1.0 where they are not given.

    Raises
    ------
    ValueError, TypeError
        If a scale is given and the cache has none, or it is not a positive and finite float.
    """
    if ckv_scale is None and kpe_scale is None:
        return 1.0, 1.0
    if problem.kv_cache_format != "fp8_e4m3":
        name = "kpe_scale" if ckv_scale is None else "ckv_scale"
        cache = (
            f"a cache of {problem.kv_data_type} has none"
            if problem.kv_cache_format is None
            else f"kv_cache_format {problem.kv_cache_format!r} holds its own"
        )
        raise ValueError(
            f"{name} was given, and {cache}; only kv_cache_format 'fp8_e4m3' (kv_data_type "
            f"{FP8_DTYPE}) takes scales"
        )
    return (
        1.0 if ckv_scale is None else quantization.check_scale("ckv_scale", ckv_scale),
        1.0 if kpe_scale is None else quantization.check_scale("kpe_scale", kpe_scale),
    )


def split_packed(problem: Problem, kv_cache: Any) -> tuple[Any, Any]:
    """The caches that ``run`` got as ``kv_cache``, as ``ckv_cache`` and ``kpe_cache``."""
    if problem.kv_cache_format == "flashmla_656":
        return kv_cache, None
    return validation.split_packed("kv_cache", kv_cache, problem.head_dim_ckv, problem.head_dim_kpe)


def checked_cache(
    ckv_cache: Any, kpe_cache: Any, problem: Problem, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the cache against what was planned; return it as kernel and reference take it.

    An fp8 cache is returned as uint8, and one in FlashMLA's layout, ``[pages, page_size, 656]``,
    as both parts.
    """
    page = problem.page_size
    if problem.kv_cache_format == "flashmla_656":
        _check_flashmla(ckv_cache, kpe_cache, page, device)
        return as_bytes(ckv_cache, kpe_cache)
    dtypes: tuple[torch.dtype, ...] = (problem.kv_data_type,)
    if problem.kv_cache_format == "fp8_e4m3":
        dtypes = (problem.kv_data_type, torch.uint8)
    ckv, kpe = (page, problem.head_dim_ckv), (page, problem.head_dim_kpe)
    validation.check_tensor("ckv_cache", ckv_cache, "pages", ckv, dtypes, device)
    validation.check_tensor("kpe_cache", kpe_cache, "pages", kpe, dtypes, device)
    if kpe_cache.shape[0] != ckv_cache.shape[0]:
        raise ValueError(
            f"kpe_cache has {kpe_cache.shape[0]} pages, ckv_cache {ckv_cache.shape[0]}"
        )
    if problem.kv_cache_format is None:
        return ckv_cache, kpe_cache
    return as_bytes(ckv_cache, kpe_cache)


def as_bytes(
    ckv_cache: torch.Tensor, kpe_cache: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A checked fp8 cache as kernel and reference take it; one in FlashMLA's layout has no kpe."""
    if kpe_cache is None:
        packed = _without_kv_head(ckv_cache).view(torch.uint8)
        return packed, packed
    return ckv_cache.view(torch.uint8), kpe_cache.view(torch.uint8)


def _without_kv_head(cache: torch.Tensor) -> torch.Tensor:
    """FlashMLA's own tensors have a dimension of one KV head."""
    return cache.squeeze(2) if cache.ndim == 4 and cache.shape[2] == 1 else cache


def _check_flashmla(cache: Any, kpe_cache: Any, page_size: int, device: torch.device) -> None:
    if kpe_cache is not None:
        raise ValueError(
            "kpe_cache was given; with kv_cache_format 'flashmla_656' ckv_cache alone holds both "
            "parts, and kpe_cache must be None"
        )
    if isinstance(cache, torch.Tensor):
        cache = _without_kv_head(cache)
    shape = (page_size, FLASHMLA_TOKEN_BYTES)
    validation.check_tensor("ckv_cache", cache, "pages", shape, (torch.uint8, FP8_DTYPE), device)


def check_kernel_cache(ckv_cache: torch.Tensor, kpe_cache: torch.Tensor) -> None:
    """Check strides and alignment of a checked cache for the ETAP kernel."""
    elements = validation.STRIDE_ELEMENTS
    if ckv_cache.dtype == torch.uint8:
        elements = STRIDE_BYTES
    alignment = validation.ALIGNMENT_BYTES
    validation.check_kernel_layout("ckv_cache", ckv_cache, elements, alignment)
    validation.check_kernel_layout("kpe_cache", kpe_cache, elements, alignment)


def page_of_zeros(
    ckv_cache: torch.Tensor, kpe_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of one page for one of none, which TMA can't describe.

    Nothing changes by it: pages outside a cache are read as zeros, too.
    """
    ckv = ckv_cache.new_zeros(1, *ckv_cache.shape[1:])
    if kpe_cache is ckv_cache:  # one tensor holds both parts
        return ckv, ckv
    return ckv, kpe_cache.new_zeros(1, *kpe_cache.shape[1:])
