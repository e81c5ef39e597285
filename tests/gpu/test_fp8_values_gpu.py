"""What fp8 codes are worth to the ETAP kernel: saturated, denormal, NaN, scaled, with outliers."""

from __future__ import annotations

import random

import pytest
import torch
from fp8_problems import (
    FORMATS,
    Fp8Problem,
    check_fp8,
    make_fp8_problem,
    token_slot,
    with_codes,
    with_packed_tokens,
)
from gpu_helpers import Problem, exact, make_problem, rmse, run_once
from test_execution_gpu import bits

from etap_flashinfer import quantization

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
# Data of another kind than the bound is meant for: a value read wrong would be off by far more.
ODD_CODES_RMSE_BOUND = 3.0
OUTLIER_RMSE_BOUND = 10.0
each_format = pytest.mark.parametrize("cache_format", FORMATS)
each_loader = pytest.mark.parametrize("page_size", [1, 64], ids=("gather", "tma"))


# Codes, scales and NaN


def packed_tokens(codes: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
    """Tokens in FlashMLA's layout: these codes, scales from half to twice this one, normal kpe."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    count = codes.shape[0]
    scales = scale * torch.exp2(2 * torch.rand(count, 4, generator=generator, device="cuda") - 1)
    kpe = torch.randn(count, 64, generator=generator, device="cuda").to(torch.bfloat16)
    parts = (codes[:, :512], scales.view(torch.uint8), kpe.view(torch.uint8))
    return torch.cat(parts, 1)


def code_choices(kind: str) -> list[int]:
    return {
        "saturated": [0x7E, 0xFE],
        "denormal": [sign | code for sign in (0, 0x80) for code in range(8)],
        "zero": [0x00, 0x80],
        "finite": [code for code in range(256) if code & 0x7F != 0x7F],
    }[kind]


@each_format
@each_loader
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("kind", ["saturated", "denormal", "zero", "finite"])
def test_codes(kind, heads, page_size, cache_format, seed):
    problem = make_problem(seed, [1, 2, 1, 1], [65, 9, 1000, 4000], heads, page_size)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    choices = torch.tensor(code_choices(kind), dtype=torch.uint8, device="cuda")
    shape = (sum(problem.kv_lens), 576)
    drawn = torch.randint(len(choices), shape, generator=generator, device="cuda")
    codes = choices[drawn]
    scale = {"saturated": 2.0**-8, "denormal": 64.0, "zero": 1.0, "finite": 2.0**-6}[kind]
    if cache_format == "flashmla_656":
        problem = with_packed_tokens(problem, packed_tokens(codes, scale, seed))
    else:
        problem = with_codes(problem, codes, (scale, scale))
    check_fp8(problem, *run_once(problem), rmse_bound=ODD_CODES_RMSE_BOUND)


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0), (0.01, 0.02), (0.37, 0.011), (1 / 3, None)], ids=str
)
def test_scales(scales, seed, record):
    problem = make_fp8_problem(
        seed, [1, 2, 1], [65, 9, 3000], 16, scales=scales, cache_format="fp8_e4m3"
    )
    check_fp8(problem, *run_once(problem), record)


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_parts_of_zeros_beside_a_large_scale(heads, seed):
    """Such a part does not suit fp16: it is left in float32, where a large scale keeps it zero."""
    scale = 2.0**60

    def zero_tail(tokens: torch.Tensor, problem: Problem) -> torch.Tensor:
        problem.q_nope.zero_()  # kpe alone decides on weights
        tokens = tokens.float()
        tokens[:, :512] *= scale
        tokens[5000:, :512] = 0.0
        return tokens

    problem = make_fp8_problem(
        seed, [1], [10000], heads, cache_format="fp8_e4m3", scales=(scale, 1.0), change=zero_tail
    )
    check_fp8(problem, *run_once(problem))


def test_scales_default_to_1(seed):
    problem = make_fp8_problem(
        seed, [1] * 3, [65, 9, 3000], 16, scales=(1.0, 1.0), cache_format="fp8_e4m3"
    )
    problem.ckv_scale = problem.kpe_scale = None
    check_fp8(problem, *run_once(problem))


def put_nan(problem: Fp8Problem, page: int, slot: int, place: str, code: int) -> None:
    """Make one number of one token NaN."""
    token = problem.pool[page, slot]
    if place == "kpe" and problem.cache_format == "flashmla_656":
        token[528 + 2 * 17 : 530 + 2 * 17] = torch.tensor([0xC0, code], dtype=torch.uint8)
    elif place == "scale":
        token[512 + 4 : 512 + 8] = torch.tensor([0, 0, 0xC0, code], dtype=torch.uint8)
    else:
        token[{"first": 0, "last": 511, "kpe": 512 + 17}[place]] = code


@pytest.mark.parametrize("code", [0x7F, 0xFF], ids=hex)
@pytest.mark.parametrize(
    ("cache_format", "place"),
    [
        *((name, place) for name in FORMATS for place in ("first", "last", "kpe")),
        ("flashmla_656", "scale"),
    ],
)
@pytest.mark.parametrize(("heads", "page_size"), [(8, 64), (16, 1), (16, 64), (128, 64)])
def test_nan_stays_in_its_request(heads, page_size, cache_format, place, code, seed):
    """A NaN in a visible token makes its request NaN and leaves the bits of the others."""
    lengths = [65, 1000, 300, 5000, 64]
    problem = make_fp8_problem(
        seed, [1, 1, 2, 1, 1], lengths, heads, page_size, cache_format=cache_format
    )
    clean_out, clean_lse = run_once(problem)
    check_fp8(problem, clean_out, clean_lse)
    put_nan(problem, *token_slot(problem, 3, random.Random(seed).randrange(5000)), place, code)
    out, lse = run_once(problem)
    assert out[4].isnan().all(), "a visible NaN was lost"
    assert lse[4].isnan().all(), "a visible NaN was lost from the LSE"
    others = [0, 1, 2, 3, 5]
    assert torch.equal(bits(out[others]), bits(clean_out[others]))
    assert torch.equal(bits(lse[others]), bits(clean_lse[others]))


@pytest.mark.parametrize("poison", [0xFF, 0x7F], ids=("nan", "nan, scales of 3e38"))
@each_format
@each_loader
def test_nan_behind_the_length_is_not_seen(page_size, cache_format, poison, seed):
    """The pool is NaN wherever no token lies; shortening a request adds its own old tokens."""
    problem = make_fp8_problem(
        seed, [1, 2, 1], [700, 129, 64], 16, page_size, cache_format=cache_format
    )
    page, slot = token_slot(problem, 0, 650)
    problem.pool[page, slot] = poison
    problem.kv_len_arr[0] = problem.kv_lens[0] = 650
    problem.tokens[0] = problem.tokens[0][:650]
    check_fp8(problem, *run_once(problem))


# Scales of tokens


def token_scale_factors(kind: str, lengths: list[int], seed: int) -> torch.Tensor:
    """What the four scales of each token are multiplied with, ``[tokens, 4]``."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (sum(lengths), 4)
    drawn = torch.rand(shape, generator=generator, device="cuda")
    if kind in ("tiny", "large"):
        return torch.full_like(drawn, 2.0**-27 if kind == "tiny" else 2.0**14)
    if kind == "zero":
        return (drawn > 0.5).float()
    if kind == "negative":
        return (drawn - 0.5).sign()
    if kind == "decades":
        return 10 ** (3 * drawn - 3)
    assert kind == "growing", kind
    position = torch.cat([torch.linspace(-16, 0, length, device="cuda") for length in lengths])
    return torch.exp2(position[:, None] - drawn)


@each_loader
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("kind", ["decades", "growing", "zero", "negative", "tiny", "large"])
def test_token_scales(kind, heads, page_size, seed, record):
    problem = make_problem(seed, [1, 2, 1, 1], [65, 9, 1000, 4000], heads, page_size)
    packed = quantization.quantize_flashmla_656(torch.cat(problem.tokens)).cache
    scales = packed[:, 512:528].contiguous().view(torch.float32)
    factors = token_scale_factors(kind, problem.kv_lens, seed)
    packed[:, 512:528] = (scales * factors).view(torch.uint8)
    if kind in ("tiny", "large"):  # the logits stay what they are: powers of two are exact
        problem.q_nope /= factors[0, 0]
    problem = with_packed_tokens(problem, packed)
    check_fp8(problem, *run_once(problem), record, rmse_bound=1.15)


@each_loader
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_scale_stays_in_its_request(value, page_size, seed):
    problem = make_fp8_problem(
        seed, [1, 2, 1], [65, 3000, 129], 16, page_size, cache_format="flashmla_656"
    )
    clean_out, clean_lse = run_once(problem)
    check_fp8(problem, clean_out, clean_lse)
    token = problem.pool[token_slot(problem, 1, 1234)]
    token[516:520] = torch.tensor([value], device="cuda").view(torch.uint8)
    out, lse = run_once(problem)
    assert out[1:3, :, 128:256].isnan().all()
    assert torch.equal(bits(out[[0, 3]]), bits(clean_out[[0, 3]]))
    assert torch.equal(bits(lse[[0, 3]]), bits(clean_lse[[0, 3]]))


# Accuracy beside FlashInfer's fp8 path


def channel_outliers(tokens: torch.Tensor, problem) -> torch.Tensor:
    """Per-channel scales over 3 decades."""
    scattered = torch.arange(576, device="cuda") * 37 % 576  # large channels beside small ones
    exponents = torch.linspace(-1.5, 1.5, 576, device="cuda")[scattered]
    return (tokens.float() * 10**exponents).to(tokens.dtype)


def attention_sinks(tokens: torch.Tensor, problem) -> torch.Tensor:
    """The first four tokens of each request draw most of the attention and hold little."""
    column = 11
    problem.q_nope[..., column] = 8.0
    tokens = tokens.clone()
    first = 0
    for length in problem.kv_lens:
        tokens[first : first + 4] *= 0.1
        tokens[first : first + 4, column] = 20.0
        first += length
    return tokens


DATA = {"normal": None, "channels": channel_outliers, "sinks": attention_sinks}


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("data", DATA)
def test_no_worse_than_flashinfer(data, heads, seed):
    mla = pytest.importorskip("flashinfer.mla", exc_type=ImportError)
    problem = make_fp8_problem(
        seed,
        [1] * 4,
        [1024, 8192, 4096, 2048],
        heads,
        spare_entries=0,
        change=DATA[data],
        cache_format="fp8_e4m3",
    )
    workspace = torch.empty(128 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    stock = mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    stock.plan(*problem.plan_arguments())
    theirs = stock.run(*problem.run_arguments(), **problem.run_options())
    ours, _ = run_once(problem)
    assert torch.isfinite(theirs).all(), "FlashInfer's own output is not finite"
    expected, _ = exact(problem)
    rounding = rmse(expected.to(problem.dtype), expected)
    figures = [rmse(each, expected) for each in (ours, theirs)]
    print(
        f"{data}, {heads} heads: ETAP {figures[0]:.3e}, FlashInfer {figures[1]:.3e}, rounding "
        f"{rounding:.3e}"
    )
    # 2 % for what two equally good ways of rounding may differ by on one draw.
    assert figures[0] <= 1.02 * figures[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", ["channels", "sinks"])
@each_format
def test_outliers(cache_format, data, dtype, seed):
    problem = make_fp8_problem(
        seed,
        [1, 2, 1],
        [1024, 300, 5000],
        16,
        dtype=dtype,
        change=DATA[data],
        cache_format=cache_format,
    )
    check_fp8(problem, *run_once(problem), rmse_bound=OUTLIER_RMSE_BOUND)


# The quantiser


@pytest.mark.parametrize("cache_format", ["fp8_e4m3", "flashmla_656"])
def test_quantiser_gives_the_same_bits_on_the_gpu(cache_format, seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 1000, 576, generator=generator).to(torch.bfloat16)
    latents[1, 5, 7], latents[2, 9, 300] = torch.nan, torch.inf
    latents[0, 0] = 0
    quantize = getattr(quantization, f"quantize_{cache_format}")
    here, there = quantize(latents), quantize(latents.cuda())
    assert torch.equal(here.cache.view(torch.uint8), there.cache.cpu().view(torch.uint8))
    assert (here.ckv_scale, here.kpe_scale) == (there.ckv_scale, there.kpe_scale)
    dequantize = getattr(quantization, f"dequantize_{cache_format}")
    values, on_gpu = dequantize(here.cache), dequantize(there.cache).cpu()
    torch.testing.assert_close(on_gpu, values, rtol=0, atol=0, equal_nan=True)
