"""The quantiser: round trips, the error it reports, saturation, NaN, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etap_flashinfer import quantization

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn
QUANTIZERS = {
    "fp8_e4m3": quantization.quantize_fp8_e4m3,
    "flashmla_656": quantization.quantize_flashmla_656,
}
each_format = pytest.mark.parametrize("name", QUANTIZERS)


def dequantize(
    name: str, quantized: quantization.QuantizedLatents, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    if name == "flashmla_656":
        return quantization.dequantize_flashmla_656(quantized.cache, dtype)
    return quantization.dequantize_fp8_e4m3(
        quantized.cache, quantized.ckv_scale, quantized.kpe_scale, dtype
    )


def random_latents(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 576, generator=generator).to(dtype)


def e4m3_values() -> torch.Tensor:
    """The 256 values of e4m3fn, from its definition: 4 bits of exponent, bias 7, 3 of mantissa."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = 1 - 2 * (code >> 7), (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values.append(math.nan)
        elif exponent == 0:
            values.append(sign * mantissa * 2.0**-9)
        else:
            values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(values, dtype=torch.float64)


def test_codes_have_the_values_of_the_definition() -> None:
    codes = torch.arange(576).to(torch.uint8)  # the low byte: every code twice and more
    expected = e4m3_values()[torch.arange(576) % 256]
    decoded = quantization.dequantize_fp8_e4m3(codes, 0.5, 3.0, torch.float64)
    scales = torch.tensor([0.5] * 512 + [3.0] * 64, dtype=torch.float64)
    torch.testing.assert_close(decoded, expected * scales, rtol=0, atol=0, equal_nan=True)
    same = quantization.dequantize_fp8_e4m3(codes.view(FP8), 0.5, 3.0, torch.float64)
    torch.testing.assert_close(same, decoded, rtol=0, atol=0, equal_nan=True)


def test_layout_of_656_bytes() -> None:
    """Decoded by hand, byte by byte, from the layout's definition."""
    latents = random_latents(3)
    packed = quantization.quantize_flashmla_656(latents).cache
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 656)
    for token, values in zip(packed, latents, strict=True):
        scales = token[512:528].clone().view(torch.float32).double()
        codes = e4m3_values()[token[:512].int()]
        groups = values[:512].double().view(4, 128)
        for group in range(4):
            assert scales[group] == (groups[group].abs().max().float() / 448).double()
        expected = (codes.view(4, 128) * scales[:, None]).flatten()
        # Half a unit in the last place of 3 bits, and half of the smallest step.
        bound = groups.abs() * 2.0**-4 + scales[:, None] * 2.0**-10
        assert ((expected.view(4, 128) - groups).abs() <= bound).all()
        assert torch.equal(token[528:].clone().view(BF16), values[512:])
        decoded = quantization.dequantize_flashmla_656(token, torch.float64)
        assert torch.equal(decoded[:512], expected)
        assert torch.equal(decoded[512:], values[512:].double())


@each_format
def test_error_is_that_of_the_round_trip(name: str) -> None:
    latents = random_latents(70_000 // 576 + 1, 3, seed=5)
    quantized = QUANTIZERS[name](latents)
    difference = dequantize(name, quantized) - latents.double()
    rmse = difference.square().mean().sqrt().item()
    assert quantized.error.rmse == pytest.approx(rmse, rel=1e-9)
    assert quantized.error.max == pytest.approx(difference.abs().max().item(), rel=1e-12)
    size = latents.double().square().mean().sqrt().item()
    assert quantized.error.relative == pytest.approx(rmse / size, rel=1e-9)
    assert 0.01 < quantized.error.relative < 0.04  # 3 bits of mantissa


@each_format
def test_parts_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = random_latents(11, 7, seed=1)
    whole = QUANTIZERS[name](latents)
    monkeypatch.setattr(quantization, "_ROWS_AT_A_TIME", 10)
    parts = QUANTIZERS[name](latents)
    assert torch.equal(whole.cache.view(torch.uint8), parts.cache.view(torch.uint8))
    assert (whole.ckv_scale, whole.kpe_scale) == (parts.ckv_scale, parts.kpe_scale)
    assert parts.error.rmse == pytest.approx(whole.error.rmse, rel=1e-12)
    assert parts.error.max == whole.error.max


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(QUANTIZERS)),
    exponent=st.floats(-30, 30),
    spread=st.floats(0, 3),
    dtype=st.sampled_from([BF16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_round_trip_at_every_size(
    name: str, exponent: float, spread: float, dtype: torch.dtype, seed: int
) -> None:
    """Each value within half a unit of its 3 bits, or half the smallest step; again: the same."""
    generator = torch.Generator().manual_seed(seed)
    channels = 10.0 ** (spread * (torch.rand(576, generator=generator) - 0.5))
    latents = random_latents(4, seed=seed, dtype=torch.float32) * channels * 10.0**exponent
    latents = latents.to(dtype)
    quantized = QUANTIZERS[name](latents)
    decoded = dequantize(name, quantized)
    values = latents.double()
    steps = torch.empty_like(values)
    if name == "flashmla_656":
        groups = values[:, :512].abs().reshape(4, 4, 128).amax(2, keepdim=True)
        steps[:, :512] = (groups / 448 * 2.0**-10).expand(4, 4, 128).reshape(4, 512)
        steps[:, 512:] = 0
    else:
        steps[:, :512] = quantized.ckv_scale * 2.0**-10
        steps[:, 512:] = quantized.kpe_scale * 2.0**-10
    bound = (values.abs() * 2.0**-4 + steps) * (1 + 1e-6)
    assert ((decoded - values).abs() <= bound).all()
    largest, decoded_largest = (each[:, :512].abs().max() for each in (values, decoded))
    assert decoded_largest == pytest.approx(largest.item(), rel=1e-6)  # no bit of it is lost
    again = QUANTIZERS[name](decoded.float())
    torch.testing.assert_close(dequantize(name, again), decoded, rtol=1e-6, atol=0)


def test_given_scales_are_used_and_saturate() -> None:
    latents = random_latents(5) * 100
    quantized = quantization.quantize_fp8_e4m3(latents, 0.25, 1.0)
    assert (quantized.ckv_scale, quantized.kpe_scale) == (0.25, 1.0)
    decoded = dequantize("fp8_e4m3", quantized)
    assert decoded[:, :512].abs().max() == 112.0
    beyond = latents[:, :512].abs() > 112
    assert beyond.any()
    assert torch.equal(decoded[:, :512][beyond], latents[:, :512][beyond].sign().double() * 112)
    assert quantized.error.max >= latents[:, :512].abs().max() - 112


def test_a_plain_cast_is_scale_1() -> None:
    latents = random_latents(9)
    quantized = quantization.quantize_fp8_e4m3(latents, 1.0, 1.0)
    assert torch.equal(quantized.cache.view(torch.uint8), latents.to(FP8).view(torch.uint8))


@each_format
@pytest.mark.parametrize("column", [3, 575])
def test_nan_stays_nan_alone(name: str, column: int) -> None:
    latents = random_latents(4, seed=2)
    clean = QUANTIZERS[name](latents)
    broken = latents.clone()
    broken[1, column] = math.nan
    broken[1, column - 1] = 0  # keep the largest value out of the two columns that change
    latents[1, column - 1 : column + 1] = 0
    clean, quantized = QUANTIZERS[name](latents), QUANTIZERS[name](broken)
    decoded, expected = dequantize(name, quantized), dequantize(name, clean)
    assert decoded.isnan().nonzero().tolist() == [[1, column]]
    decoded[1, column] = expected[1, column] = 0
    assert torch.equal(decoded, expected)
    assert math.isfinite(quantized.error.rmse)


@each_format
def test_infinity_saturates(name: str) -> None:
    latents = random_latents(3, seed=3)
    latents[0, 7], latents[2, 130] = math.inf, -math.inf
    quantized = QUANTIZERS[name](latents)
    decoded = dequantize(name, quantized)
    assert decoded.isfinite().all()
    finite = torch.where(latents.isfinite(), latents, 0).double()
    first, second = finite[:, :512].abs().max(), -finite[:, :512].abs().max()
    if name == "flashmla_656":
        first, second = finite[0, :128].abs().max(), -finite[2, 128:256].abs().max()
    assert decoded[0, 7] == pytest.approx(first.item(), rel=1e-6)
    assert decoded[2, 130] == pytest.approx(second.item(), rel=1e-6)
    assert quantized.error.rmse == quantized.error.max == quantized.error.relative == math.inf


@each_format
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_nothing_to_scale_by(name: str, value: float) -> None:
    quantized = QUANTIZERS[name](torch.full((2, 576), value, dtype=BF16))
    decoded = dequantize(name, quantized)
    assert (decoded.isnan() if math.isnan(value) else decoded == 0).all()
    assert quantized.error == quantization.QuantizationError(0.0, 0.0, 0.0)
    if name == "fp8_e4m3":
        assert (quantized.ckv_scale, quantized.kpe_scale) == (1.0, 1.0)


@each_format
def test_shapes_and_views(name: str) -> None:
    wide = random_latents(3, 8, seed=4)
    padded = torch.cat([wide, wide], -1)[..., :576]  # a strided view
    assert not padded.is_contiguous()
    quantized = QUANTIZERS[name](padded)
    width = 656 if name == "flashmla_656" else 576
    assert quantized.cache.shape == (3, 8, width)
    same = QUANTIZERS[name](wide).cache
    assert torch.equal(quantized.cache.view(torch.uint8), same.view(torch.uint8))
    assert dequantize(name, quantized, BF16).shape == (3, 8, 576)
    assert dequantize(name, quantized, BF16).dtype == BF16
    empty = QUANTIZERS[name](torch.empty(0, 8, 576, dtype=BF16))
    assert empty.cache.shape == (0, 8, width)
    assert empty.error == quantization.QuantizationError(0.0, 0.0, 0.0)


def test_packed_tokens_at_odd_addresses() -> None:
    packed = quantization.quantize_flashmla_656(random_latents(5)).cache
    shifted = torch.empty(5, 700, dtype=torch.uint8)[:, 3:659]
    shifted.copy_(packed)
    decoded = quantization.dequantize_flashmla_656(shifted)
    assert torch.equal(decoded, quantization.dequantize_flashmla_656(packed))
    assert torch.equal(decoded, quantization.dequantize_flashmla_656(packed.view(FP8)))


def test_run_arguments() -> None:
    latents = random_latents(2, 4)
    given = quantization.quantize_fp8_e4m3(latents, 0.5, 2.0).run_arguments()
    assert {name: given[name] for name in ("ckv_scale", "kpe_scale")} == {
        "ckv_scale": 0.5,
        "kpe_scale": 2.0,
    }
    assert given["ckv_cache"].shape == (2, 4, 512)
    assert given["kpe_cache"].shape == (2, 4, 64)
    packed = quantization.quantize_flashmla_656(latents)
    assert packed.run_arguments() == {"ckv_cache": packed.cache, "kpe_cache": None}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("quantize_fp8_e4m3", (torch.empty(2, 512, dtype=BF16),), r"\[2, 512\]; .* must be 576"),
        ("quantize_fp8_e4m3", (torch.empty(576, dtype=torch.int8),), "torch.int8; allowed: tor"),
        ("quantize_fp8_e4m3", ([1.0],), "latents is a list; it must be a torch.Tensor"),
        ("quantize_fp8_e4m3", (torch.empty(576, dtype=BF16), 0.0), "ckv_scale is 0.0; .* positive"),
        ("quantize_fp8_e4m3", (torch.empty(576, dtype=BF16), 1, math.nan), "kpe_scale is nan"),
        ("quantize_fp8_e4m3", (torch.empty(576, dtype=BF16), torch.ones(1)), "must be a float"),
        ("quantize_flashmla_656", (torch.empty((), dtype=BF16),), r"shape \[\]; .* 576"),
        ("dequantize_fp8_e4m3", (torch.empty(576, dtype=torch.float8_e5m2),), "float8_e5m2; al"),
        ("dequantize_fp8_e4m3", (torch.empty(656, dtype=torch.uint8),), "must be 576"),
        ("dequantize_fp8_e4m3", (torch.empty(576, dtype=torch.uint8), -1.0), "ckv_scale is -1.0"),
        ("dequantize_flashmla_656", (torch.empty(576, dtype=torch.uint8),), "must be 656"),
        ("dequantize_flashmla_656", (torch.empty(656, dtype=BF16),), "torch.bfloat16; allowed"),
    ],
)
def test_errors(function: str, arguments: tuple, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(quantization, function)(*arguments)
