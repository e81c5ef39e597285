"""The fuzzer's tolerance for a cache of e4m3 with one scale, against an emulation of the kernels:
right arithmetic keeps to it, arithmetic that is a little wrong does not."""

import dataclasses
import math

import pytest
import torch
from codes_emulation import E4M3, multiply_codes, parts_of, run
from decode_bench import evidence
from fuzzing import cases, codes, compare, tensors

CPU = torch.device("cpu")
SEED = 20261128
LIMITS = cases.Limits(heads=16, batch=2, longest=150, tokens=200, scores=1500)
DENSE = cases.Layout(True, False, False, 0, 0, 0)


def judge(given: tensors.Tensors) -> compare.Worst:
    return compare.compare_case(given).on_host()


def plain_case(**changes: object) -> cases.Case:
    """Normal values on 8 heads; large enough for the RMSE to count."""
    case = cases.draw_case(1, 1, LIMITS)
    values = {
        "dtype": "bf16",
        "kv_dtype": "fp8_e4m3",
        "heads": 8,
        "page_size": 16,
        "causal": False,
        "sm_scale": 576**-0.5,
        "q_lens": (1, 1),
        "kv_lens": (120, 90),
        "logits": "normal",
        "positive_ckv": False,
        "ckv_exponent": 0,
        "cache_layout": DENSE,
        "query_layout": DENSE,
        "graph_buffers": False,
        "fixed_split_size": None,
        "fp8": cases.Fp8(ckv_scale=0.03, kpe_scale=0.01),
    }
    return dataclasses.replace(case, **(values | changes))


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_right_arithmetic_keeps_to_the_tolerance(first: int) -> None:
    tried = 0
    for number in range(first, first + 100):
        case = cases.draw_case(SEED, number, LIMITS)
        kernel = codes.Codes.of_case(case)
        for row_tile in kernel.row_tiles if kernel else ():
            given = tensors.build(case, CPU)
            run(given, row_tile)
            found = judge(given)
            assert not found.is_mismatch(), (number, row_tile, found, case.describe())
            assert found.uncertainty < 0.9, "the bounds would mean nothing"
            tried += 1
    assert tried >= 20


each_type = pytest.mark.parametrize("dtype", cases.DTYPES)


@pytest.mark.parametrize(
    ("dtype", "heads", "tokens", "least", "most"),
    [
        ("bf16", 8, 120, 0.85, 1.1),
        ("fp16", 8, 120, 0.45, 1.15),
        ("bf16", 24, 120, 0.85, 1.03),
        ("fp16", 24, 900, 0.7, 1.45),  # weights of fp16, too: a second rounding
    ],
)
def test_right_arithmetic_is_close_to_rounding(
    dtype: str, heads: int, tokens: int, least: float, most: float
) -> None:
    case = plain_case(dtype=dtype, heads=heads, kv_lens=(tokens, 0))
    kernel, given = codes.Codes.of_case(case), tensors.build(case, CPU)
    run(given, *kernel.row_tiles)
    found = judge(given)
    assert not found.is_mismatch()
    assert found.rmse_over_rounding < most
    assert found.rmse > least, "the criterion leaves much room"


@each_type
@pytest.mark.parametrize(
    "wrong",
    [{"parts": 1}, {"query_type": E4M3}, {"kpe_ratio": 1.01}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_slightly_wrong_arithmetic_is_caught(dtype: str, wrong: dict) -> None:
    case = plain_case(dtype=dtype)
    given = tensors.build(case, CPU)
    run(given, 8, **wrong)
    assert judge(given).is_mismatch()


def test_a_part_less_is_caught_beside_a_result_of_fp16() -> None:
    case = plain_case(dtype="fp16")
    given = tensors.build(case, CPU)
    run(given, 8, parts=2)
    found = judge(given)
    assert found.rmse > 1


@each_type
@pytest.mark.parametrize("heads", [8, 24])
def test_a_token_less_is_caught(dtype: str, heads: int) -> None:
    case = plain_case(dtype=dtype, heads=heads)
    kernel, given = codes.Codes.of_case(case), tensors.build(case, CPU)
    for group in given.groups:
        group.kv_lens -= 1
    run(given, *kernel.row_tiles)
    for group in given.groups:
        group.kv_lens += 1
    assert judge(given).is_mismatch()


def test_elements_beyond_what_may_be_cut_off_are_caught() -> None:
    given = tensors.build(plain_case(), CPU)
    run(given, 8)
    typical = given.out.float().square().mean().sqrt().item()
    given.out[1, 5, 17] += 0.1 * typical
    assert judge(given).element > 1


def test_a_single_token_has_no_more_than_rounding() -> None:
    """Nothing is cut off of one product: the bound is that of other caches."""
    given = tensors.build(plain_case(kv_lens=(1, 1)), CPU)
    kernel = codes.Codes.of_case(given.case)
    run(given, 8)
    assert not judge(given).is_mismatch()
    answer = compare.exact(
        given.queries, given.pool, given.groups[0], False, given.case.sm_scale, 0, codes=kernel
    )
    assert (answer.out_bound <= 2.0**-8.9 * answer.out.abs()).all()


def test_the_emulated_products_keep_13_bits() -> None:
    """What scripts/TUNING.md has measured of WGMMA, 'Products of e4m3'."""

    def sum_of(*products: tuple[float, float]) -> float:
        p, v = torch.zeros(1, 32), torch.zeros(32, 1)
        for token, (first, second) in enumerate(products):
            p[0, token], v[token, 0] = first, second
        return multiply_codes(torch.zeros(1, 1), p, v).item()

    assert sum_of((2.0**7, 2.0**6), (1.0, 1.0)) == 2.0**13 + 1
    assert sum_of((2.0**7, 2.0**7), (1.0, 1.0)) == 2.0**14
    random = torch.Generator().manual_seed(1)
    p, v = (torch.randn(shape, generator=random).to(E4M3).float() for shape in ((16, 64), (64, 99)))
    sums, right = torch.zeros(16, 99), p.double() @ v.double()
    for begin, measured in ((0, 14.4), (32, 13.7)):
        some = slice(begin, begin + 32)
        sums = multiply_codes(sums, p[:, some], v[some])
        right = p[:, : begin + 32].double() @ v[: begin + 32].double()
        norms = p[:, : begin + 32].double().square() @ v[: begin + 32].double().square()
        error = ((sums - right).square() / norms).mean().sqrt().log2().item()
        assert error == pytest.approx(-measured, abs=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_lose_what_the_bound_says_and_no_less(dtype: torch.dtype) -> None:
    """Over all sizes of a weight, beside the largest of its tile."""
    p = torch.exp2(torch.linspace(8, -22, 2**17))
    parts = parts_of(p, codes.PARTS[dtype])
    stored = sum(part.double() * 2.0 ** (-4 * number) for number, part in enumerate(parts))
    error = (stored - p).abs()
    kernel = codes.Codes(1.0, frozenset({8}))
    tiles = torch.stack([torch.full_like(p, 256.0), p], 1)  # each beside the largest
    allowed = kernel.storing_error(tiles.double()[:, None], dtype)[:, 0, 1]
    ratio = error / allowed
    assert ratio.max() <= 1
    assert ratio[p > 2.0**-4].max() > 0.9
    assert ratio[p < 2.0**-7].max() > 0.9


def test_what_queries_lose_is_what_the_bound_says() -> None:
    """Beside a value of 1, which is stored as 2^14."""
    values = torch.exp2(torch.linspace(-45, 0, 2**16)).bfloat16().float()
    lost = ((values * 2.0**14).half().float() / 2.0**14 - values).abs().max()
    assert 0.9 * compare.QUERY_ROUNDOFF < lost <= compare.QUERY_ROUNDOFF


@pytest.mark.parametrize(
    ("ckv_scale", "weight", "may_be_lost"),
    [
        (1.0, 2.0**-110, False),
        (2.0**10, 2.0**-110, False),
        (2.0**10, 2.0**-127, True),  # the sum is below float32's normal numbers
        (2.0**-8, 2.0**-120, True),  # that times the scale is
        (2.0**-8, 2.0**-100, False),
    ],
)
def test_what_float32_loses_may_be_missing(
    ckv_scale: float, weight: float, may_be_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heaviest token has a value of 0, so that of another, in the next tile, is the result."""
    column = 7
    case = plain_case(
        heads=1,
        q_lens=(1,),
        kv_lens=(65,),
        fp8=cases.Fp8(ckv_scale=ckv_scale, kpe_scale=ckv_scale),
    )
    given, kernel = tensors.build(case, CPU), codes.Codes.of_case(case)
    (group,) = given.groups
    slots = group.slots[0, :65].tolist()
    heavy, light = slots[0], slots[-1]
    given.queries.zero_()
    given.queries[0, 0, 0] = -math.log(weight) / (case.sm_scale * ckv_scale)
    given.pool[slots] = 0
    given.pool[heavy, 0] = ckv_scale
    given.pool[light, column] = ckv_scale
    answer = compare.exact(given.queries, given.pool, group, False, case.sm_scale, 0, codes=kernel)
    given.out[:] = answer.out[0].to(given.out.dtype)
    given.lse[:] = answer.lse[0] * (1 if case.lse_base_e else 1 / math.log(2))
    assert not judge(given).is_mismatch()
    given.out[..., column] = 0
    # In fp16, a part that has both has no room for the other.
    assert not judge(given).is_mismatch()
    monkeypatch.setattr(compare, "PARTIAL_LOST", 0.0)
    assert judge(given).is_mismatch() != may_be_lost


def test_row_tiles_follow_the_call() -> None:
    def row_tiles(**changes: object) -> frozenset[int]:
        return codes.Codes.of_case(plain_case(**changes)).row_tiles

    assert row_tiles() == {8}
    assert row_tiles(heads=17) == {32}
    assert row_tiles(q_lens=(1, 3)) == {16, 32}  # the mean, or the longest if it is known
    assert row_tiles(fixed_split_size=4, q_lens=(1, 3)) == {8}
    assert codes.Codes.of_case(plain_case(kv_dtype="bf16")) is None


def test_constants_are_those_of_the_kernel() -> None:
    csrc = evidence.REPOSITORY / "csrc"
    traits = (csrc / "etap_mla_fp8_traits.cuh").read_text()
    largest = codes.LARGEST_CODED_ROW_TILE
    assert f"kKvCache == KvCache::kFp8 && kRowTile <= {largest};" in traits
    two, three = codes.PARTS[torch.bfloat16], codes.PARTS[torch.float16]
    assert f"kParts = std::is_same_v<DType, Operand> ? {three} : {two};" in traits
    assert f"kPartShift = {codes.PART_SHIFT};" in traits
    assert f"kPvSteps = kTokenTile / {codes.INSTRUCTION_TOKENS};" in traits
    exponent = math.log2(codes.LARGEST_CODED_WEIGHT)
    assert f"kLargestCodeLog2 = {exponent:.0f}.f;" in (csrc / "etap_mla_fp8_codes.cuh").read_text()


def test_draws_reach_all_kinds_of_codes() -> None:
    drawn = [cases.draw_case(SEED, number, cases.GPU_LIMITS) for number in range(3000)]
    drawn = [case for case in drawn if case.kv_dtype == "fp8_e4m3"]
    assert {case.fp8.pattern for case in drawn} == set(cases.CODE_PATTERNS)
    assert {case.fp8.as_bytes for case in drawn} == {False, True}
    assert {case.dtype for case in drawn} == set(cases.DTYPES)
    for scales in zip(*((case.fp8.ckv_scale, case.fp8.kpe_scale) for case in drawn), strict=True):
        assert 1.0 in scales
        assert min(scales) < 2.0**-40
        assert max(scales) > 2.0**40
    assert any(case.fp8 == cases.Fp8(as_bytes=case.fp8.as_bytes) for case in drawn)  # a plain cast
    assert len({len(codes.Codes.of_case(case).row_tiles) for case in drawn}) == 2


def test_visible_codes_come_from_all_of_e4m3() -> None:
    """Of ckv: the largest, the smallest and 0 of both signs, and nearly everything between."""
    seen = set()
    for number in range(60):
        case = cases.draw_case(SEED, number, LIMITS)
        if case.kv_dtype == "fp8_e4m3":
            given = tensors.build(case, CPU)
            ckv = given.inputs[2].view(torch.uint8)
            seen |= set(ckv[ckv.view(E4M3).float().isfinite()].tolist())
    assert seen >= {0x7E, 0xFE, 0x01, 0x81, 0x07, 0x00, 0x80}
    assert len(seen) > 240
