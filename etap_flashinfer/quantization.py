"""Quantise latents into the fp8 cache formats and back, and say what error that makes.

Both formats hold e4m3 codes (``torch.float8_e4m3fn``: 3 bits of mantissa, largest value 448, no
infinity, NaN codes 0x7f and 0xff). A token is 512 numbers of ckv and 64 of kpe.

``"fp8_e4m3"``
    576 codes a token. A value is its code times a scale: one scale for all of ckv, one for all of
    kpe. A plain cast is scale 1.
``"flashmla_656"``
    FlashMLA's layout, 656 bytes a token: 512 codes of ckv; four fp32 scales, each for 128 columns
    of ckv; 64 bf16 of kpe, not quantised.

Values beyond 448 times the scale saturate, infinities too; NaN stays NaN. Everything here is plain
PyTorch and gives the same bits on CPU and GPU.
"""

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .dispatch import HEAD_DIM_CKV, HEAD_DIM_KPE

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
LATENT_COLUMNS = HEAD_DIM_CKV + HEAD_DIM_KPE
GROUP_COLUMNS = 128  # columns of ckv that share a scale in FlashMLA's layout
GROUPS = HEAD_DIM_CKV // GROUP_COLUMNS
KPE_OFFSET = HEAD_DIM_CKV + 4 * GROUPS  # in bytes: behind the codes and the fp32 scales
FLASHMLA_TOKEN_BYTES = KPE_OFFSET + 2 * HEAD_DIM_KPE

# Kernels multiply by scales in fp32, where smaller ones would lose bits or vanish.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = torch.finfo(torch.float32).max
_ROWS_AT_A_TIME = 1 << 15


@dataclass(frozen=True)
class QuantizationError:
    """What quantising changed, over all values that are not NaN.

    Attributes
    ----------
    rmse : float
        Root of the mean squared difference.
    max : float
        Largest absolute difference; infinite if an infinity saturated.
    relative : float
        ``rmse`` over the root of the mean square of the values.
    """

    rmse: float
    max: float
    relative: float


@dataclass(frozen=True)
class QuantizedLatents:
    """A quantised cache and what ``run`` needs to read it.

    Attributes
    ----------
    cache : torch.Tensor
        ``"fp8_e4m3"``: codes, ``[..., 576]`` float8_e4m3fn. ``"flashmla_656"``: ``[..., 656]``
        uint8.
    ckv_scale, kpe_scale : float, optional
        Of ``"fp8_e4m3"``; None where the cache holds its own scales.
    error : QuantizationError
    """

    cache: torch.Tensor
    ckv_scale: float | None
    kpe_scale: float | None
    error: QuantizationError

    def run_arguments(self) -> dict[str, Any]:
        """The cache as ``BatchMLAPagedAttentionWrapper.run`` takes it, by argument name."""
        if self.ckv_scale is None:
            return {"ckv_cache": self.cache, "kpe_cache": None}
        return {
            "ckv_cache": self.cache[..., :HEAD_DIM_CKV],
            "kpe_cache": self.cache[..., HEAD_DIM_CKV:],
            "ckv_scale": self.ckv_scale,
            "kpe_scale": self.kpe_scale,
        }


def check_scale(name: str, scale: Any) -> float:
    """Check a scale: a positive number that fp32 holds without loss of bits.

    A tensor is refused, for reading one from the GPU would wait for it.
    """
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(f"{name} is {scale!r}; it must be a float")
    value = float(scale)
    if not SMALLEST_SCALE <= value <= LARGEST_SCALE:  # False for NaN, too
        raise ValueError(
            f"{name} is {value}; it must be positive and finite in float32 "
            f"({SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g})"
        )
    return value


def choose_scale(values: torch.Tensor) -> float:
    """The smallest scale with which no finite value saturates: the largest absolute value / 448.

    Parameters
    ----------
    values : torch.Tensor
        Floating point, any shape; copied from the GPU is one number.

    Returns
    -------
    float
        1.0 if there is no finite value but 0.
    """
    rows = values.reshape(-1, values.shape[-1])
    largest = max((float(_largest(part).max()) for part in _parts(rows)), default=0.0)
    if largest == 0:
        return 1.0
    return max(float(torch.tensor(largest, dtype=torch.float32) / FP8_MAX), SMALLEST_SCALE)


def quantize_fp8_e4m3(
    latents: torch.Tensor, ckv_scale: float | None = None, kpe_scale: float | None = None
) -> QuantizedLatents:
    """Quantise with one scale for ckv and one for kpe.

    Parameters
    ----------
    latents : torch.Tensor
        ``[..., 576]`` of bf16, fp16 or fp32: ckv and kpe of any number of tokens.
    ckv_scale, kpe_scale : float, optional
        :func:`choose_scale` of the part if not given.

    Returns
    -------
    QuantizedLatents
        ``cache`` has the shape of ``latents``.

    Raises
    ------
    ValueError, TypeError
        If the last dimension is not 576, the dtype another one, or a scale not positive and finite.
    """
    rows = _latent_rows(latents)
    scales = []
    for name, scale, part in (
        ("ckv_scale", ckv_scale, rows[:, :HEAD_DIM_CKV]),
        ("kpe_scale", kpe_scale, rows[:, HEAD_DIM_CKV:]),
    ):
        scales.append(choose_scale(part) if scale is None else check_scale(name, scale))
    divisors = torch.tensor(scales, dtype=torch.float32, device=rows.device).repeat_interleave(
        torch.tensor([HEAD_DIM_CKV, HEAD_DIM_KPE], device=rows.device)
    )
    codes = torch.empty(rows.shape, dtype=FP8_DTYPE, device=rows.device)
    for part, target in zip(_parts(rows), _parts(codes), strict=True):
        target.copy_(_codes(part.float() / divisors))
    ckv, kpe = scales
    error = _error(rows, codes, lambda part: dequantize_fp8_e4m3(part, ckv, kpe, torch.float64))
    return QuantizedLatents(codes.view(latents.shape), ckv, kpe, error)


def dequantize_fp8_e4m3(
    codes: torch.Tensor,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The values of codes, ``code * scale``.

    Parameters
    ----------
    codes : torch.Tensor
        ``[..., 576]`` float8_e4m3fn, or its bytes as uint8.
    ckv_scale, kpe_scale : float
    dtype : torch.dtype
        Of the result; the arithmetic is in float64 for it and in float32 for others.

    Returns
    -------
    torch.Tensor
        Shape of ``codes``.
    """
    _check_last("codes", codes, LATENT_COLUMNS, (FP8_DTYPE, torch.uint8))
    check_scale("ckv_scale", ckv_scale)
    check_scale("kpe_scale", kpe_scale)
    values = codes.view(FP8_DTYPE).to(_arithmetic(dtype))
    values[..., :HEAD_DIM_CKV] *= ckv_scale
    values[..., HEAD_DIM_CKV:] *= kpe_scale
    return values.to(dtype)


def quantize_flashmla_656(latents: torch.Tensor) -> QuantizedLatents:
    """Quantise into FlashMLA's 656 bytes a token: each 128 columns of ckv by their own largest.

    Parameters
    ----------
    latents : torch.Tensor
        ``[..., 576]`` of bf16, fp16 or fp32; kpe is rounded to bf16.

    Returns
    -------
    QuantizedLatents
        ``cache`` is uint8, shape ``[..., 656]``.

    Raises
    ------
    ValueError, TypeError
        If the last dimension is not 576, or the dtype another one.
    """
    rows = _latent_rows(latents)
    cache = torch.empty(
        (rows.shape[0], FLASHMLA_TOKEN_BYTES), dtype=torch.uint8, device=rows.device
    )
    fp8_max = torch.tensor([FP8_MAX], dtype=torch.float32, device=rows.device)
    for part, target in zip(_parts(rows), _parts(cache), strict=True):
        groups = part[:, :HEAD_DIM_CKV].float().reshape(-1, GROUPS, GROUP_COLUMNS)
        largest = _largest(groups)
        scales = (largest / fp8_max).clamp(min=SMALLEST_SCALE).masked_fill(largest == 0, 1.0)
        codes = _codes(groups / scales.unsqueeze(2)).flatten(1)
        target[:, :HEAD_DIM_CKV] = codes.view(torch.uint8)
        target[:, HEAD_DIM_CKV:KPE_OFFSET] = scales.view(torch.uint8)
        kpe = part[:, HEAD_DIM_CKV:].to(torch.bfloat16).contiguous()
        target[:, KPE_OFFSET:] = kpe.view(torch.uint8)
    error = _error(rows, cache, lambda part: dequantize_flashmla_656(part, torch.float64))
    return QuantizedLatents(
        cache.view(*latents.shape[:-1], FLASHMLA_TOKEN_BYTES), None, None, error
    )


def dequantize_flashmla_656(
    cache: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The values of tokens in FlashMLA's layout.

    Parameters
    ----------
    cache : torch.Tensor
        ``[..., 656]`` uint8, or the same bytes as float8_e4m3fn.
    dtype : torch.dtype
        Of the result; the arithmetic is in float64 for it and in float32 for others.

    Returns
    -------
    torch.Tensor
        ``[..., 576]``.
    """
    _check_last("cache", cache, FLASHMLA_TOKEN_BYTES, (torch.uint8, FP8_DTYPE))
    rows = cache.view(torch.uint8).reshape(-1, FLASHMLA_TOKEN_BYTES)
    # Copies, because a view as a wider type needs an aligned start.
    codes, scales, kpe = (
        rows[:, begin:end].clone(memory_format=torch.contiguous_format).view(type_)
        for begin, end, type_ in (
            (0, HEAD_DIM_CKV, FP8_DTYPE),
            (HEAD_DIM_CKV, KPE_OFFSET, torch.float32),
            (KPE_OFFSET, FLASHMLA_TOKEN_BYTES, torch.bfloat16),
        )
    )
    exact = _arithmetic(dtype)
    groups = codes.to(exact).view(-1, GROUPS, GROUP_COLUMNS)
    ckv = (groups * scales.to(exact).unsqueeze(2)).flatten(1)
    values = torch.cat([ckv.to(dtype), kpe.to(dtype)], dim=1)
    return values.view(*cache.shape[:-1], LATENT_COLUMNS)


def _latent_rows(latents: torch.Tensor) -> torch.Tensor:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    _check_last("latents", latents, LATENT_COLUMNS, dtypes)
    return latents.reshape(-1, LATENT_COLUMNS)


def _check_last(name: str, tensor: Any, columns: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}.dtype is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if tensor.ndim == 0 or tensor.shape[-1] != columns:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; the last dimension must be {columns}"
        )


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parts(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows a part at a time, so that what is computed of them stays small beside them."""
    for first in range(0, rows.shape[0], _ROWS_AT_A_TIME):
        yield rows[first : first + _ROWS_AT_A_TIME]


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest absolute finite value along the last dimension, in fp32; 0 if there is none."""
    return values.float().abs().masked_fill(~values.isfinite(), 0.0).amax(-1)


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    # What a cast makes of values beyond 448 differs between versions of PyTorch: never give it one.
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def _error(rows: torch.Tensor, cache: torch.Tensor, dequantize: Any) -> QuantizationError:
    squares = energy = largest = 0.0
    count = 0
    for part, quantized in zip(_parts(rows), _parts(cache), strict=True):
        values = part.double()
        given = ~values.isnan()
        difference = (dequantize(quantized) - values)[given].abs()
        if difference.numel() == 0:
            continue
        squares += float(difference.square().sum())
        energy += float(values[given].square().sum())
        largest = max(largest, float(difference.max()))
        count += difference.numel()
    rmse = math.sqrt(squares / count) if count else 0.0
    if rmse == 0 or math.isinf(rmse):
        return QuantizationError(rmse, largest, rmse)
    return QuantizationError(rmse, largest, math.sqrt(squares / energy))
