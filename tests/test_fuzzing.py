"""The generator of random calls: what it draws, its answers, and that wrong results are caught.

What scripts/fuzz_gpu.py does with the kernel is done here with the reference backend.
"""

import json
import math
from collections.abc import Callable

import fuzz_gpu
import pytest
import torch
from decode_bench import evidence
from fuzzing import cases, compare, tensors

from etap_flashinfer import BatchMLAPagedAttentionWrapper

CPU = torch.device("cpu")
SEED = 20261121
# The reference backend rounds no probability: its results are held to the bound of two parts
# whatever the length, and no case here is longer.
ALL_IN_TWO_PARTS = 8192
CODED = ("flashmla_656", "fp8_e4m3")


def make_wrapper() -> BatchMLAPagedAttentionWrapper:
    return BatchMLAPagedAttentionWrapper(torch.empty(16, dtype=torch.uint8), backend="reference")


def judge(given: tensors.Tensors, two_parts_up_to: int = ALL_IN_TWO_PARTS) -> compare.Worst:
    return compare.compare_case(given, two_parts_up_to=two_parts_up_to).on_host()


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_reference_backend_agrees_with_float64(first: int) -> None:
    wrapper = make_wrapper()
    for number in range(first, first + 10):
        case = cases.draw_case(SEED, number, cases.CPU_LIMITS)
        given = tensors.build(case, CPU)
        tensors.run(wrapper, given)
        found = judge(given)
        assert not found.is_mismatch(), (number, found, case.describe())
        assert found.uncertainty < 0.9, "the bounds would mean nothing"


def test_draws_reach_everything() -> None:
    drawn = [cases.draw_case(SEED, number, cases.GPU_LIMITS) for number in range(3000)]
    for name, values in {
        "dtype": cases.DTYPES,
        "heads": cases.HEADS,
        "page_size": cases.PAGE_SIZES,
        "sm_scale": cases.SM_SCALES,
        "pages": cases.PAGES,
        "logits": cases.LOGITS,
        "logit_target": cases.LOGIT_TARGETS,
        "kv_dtype": (*cases.DTYPES, *CODED),
    }.items():
        assert {getattr(case, name) for case in drawn} == set(values), name
    for name in ("causal", "index_on_host", "graph_buffers", "packed", "lse_base_e", "validate"):
        assert {getattr(case, name) for case in drawn} == {False, True}, name
    for layout in ("cache_layout", "query_layout"):
        layouts = [getattr(case, layout) for case in drawn]
        for name in ("fused", "pe_first", "transposed"):
            assert {getattr(each, name) for each in layouts} == {False, True}, name
        assert any(each.lead and each.tail and each.spare_rows for each in layouts)
    lengths = {length for case in drawn for length in case.kv_lens}
    assert lengths >= {0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257}
    assert sum(max(case.kv_lens) >= 100_000 for case in drawn) > 10
    assert {length for case in drawn for length in case.q_lens} == set(range(10))
    assert {len(case.kv_lens) for case in drawn} >= {1, 2, 33, 133, 400}
    assert all(sum(case.kv_lens) <= cases.GPU_LIMITS.tokens for case in drawn)


def test_a_case_is_repeated_by_its_number() -> None:
    case = cases.draw_case(5, 77, cases.CPU_LIMITS)
    assert case == cases.draw_case(5, 77, cases.CPU_LIMITS)
    assert case != cases.draw_case(6, 77, cases.CPU_LIMITS)
    first, second = (tensors.build(case, CPU) for _ in range(2))
    for one, other in zip(first.inputs + first.index, second.inputs + second.index, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def values_of(stored: torch.Tensor) -> torch.Tensor:
    return (stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored).float()


def test_what_nobody_sees_is_poison() -> None:
    """Pool and page table: everything that no length reaches."""
    found = 0
    for number in range(20):
        case = cases.draw_case(SEED, number, cases.CPU_LIMITS)
        if 0 in case.q_lens:  # its tokens count as unseen
            continue
        given = tensors.build(case, CPU)
        table, ckv = given.index[2].tolist(), given.inputs[2]
        seen = set()
        for begin, length in zip(given.index[1].tolist(), case.kv_lens, strict=False):
            for token in range(length):
                page = table[begin + token // case.page_size]
                seen.add((page, token % case.page_size))
        for page in range(ckv.shape[0]):
            for slot in range(case.page_size):
                token = ckv[page, slot]
                is_given = (
                    (token != 0xFF).any()  # NaN: bytes of FlashMLA's layout
                    if case.kv_dtype == "flashmla_656"
                    else values_of(token).isfinite().all()
                )
                assert bool(is_given) == ((page, slot) in seen)
        found += 1
    assert found > 5


def plain_case(**changes: object) -> cases.Case:
    """Normal values, a few hundred tokens on 16 heads: what a wrong kernel must not pass."""
    case = cases.draw_case(1, 1, cases.CPU_LIMITS)
    dense = cases.Layout(True, False, False, 0, 0, 0)
    values = {
        "dtype": "bf16",
        "kv_dtype": "bf16",
        "heads": 16,
        "page_size": 16,
        "causal": True,
        "sm_scale": 192**-0.5,
        "q_lens": (1, 2, 1),
        "kv_lens": (500, 300, 0),
        "pages": "scattered",
        "logits": "normal",
        "positive_ckv": False,
        "ckv_exponent": 0,
        "cache_layout": dense,
        "query_layout": dense,
        "out_tail": 0,
        "graph_buffers": False,
        "index_on_host": True,
        "packed": False,
        "lse_base_e": False,
        "validate": False,
    }
    return cases.dataclasses.replace(case, **(values | changes))


def run_plain(
    before: Callable[[tensors.Tensors], None] = lambda given: None, **changes: object
) -> tensors.Tensors:
    given = tensors.build(plain_case(**changes), CPU)
    before(given)
    tensors.run(make_wrapper(), given)
    return given


each_type = pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(dtype, kv_dtype) for dtype in cases.DTYPES for kv_dtype in (dtype, *CODED)],
)


@each_type
def test_right_results_pass_close_to_rounding(dtype: str, kv_dtype: str) -> None:
    # Beside weights of fp16 a row is judged only where many tokens count.
    lengths = {"kv_lens": (1500, 1200, 0), "sm_scale": 576**-0.5} if kv_dtype == "fp8_e4m3" else {}
    found = judge(run_plain(dtype=dtype, kv_dtype=kv_dtype, **lengths))
    assert not found.is_mismatch()
    assert found.rmse_over_rounding == pytest.approx(1.0, abs=0.01)
    assert found.uncertainty < 1e-3


def _drop_a_token(given: tensors.Tensors) -> None:
    given.index[3][0] -= 1


def _swap_pages(given: tensors.Tensors) -> None:
    given.index[2][[3, -4]] = given.index[2][[-4, 3]]


def _swap_pages_of_one_request(given: tensors.Tensors) -> None:
    """Wrong under the causal mask only where a page is seen in part."""
    given.index[2][[18, 19]] = given.index[2][[19, 18]]
    given.index[3][1] -= 5


def _read_another_slot(given: tensors.Tensors) -> None:
    table = given.index[2]
    ckv = given.inputs[2]
    ckv[table[2], 5] = ckv[table[2], 6]


@pytest.mark.parametrize(
    "damage", [_drop_a_token, _swap_pages, _swap_pages_of_one_request, _read_another_slot]
)
@each_type
def test_wrong_tokens_are_caught(
    damage: Callable[[tensors.Tensors], None], dtype: str, kv_dtype: str
) -> None:
    assert judge(run_plain(damage, dtype=dtype, kv_dtype=kv_dtype)).is_mismatch()


def test_wrong_causal_mask_is_caught() -> None:
    given = run_plain(lambda given: setattr(given, "case", plain_case(causal=False)))
    given.case = plain_case()
    assert judge(given).is_mismatch()


@pytest.mark.parametrize("row", [0, 3])
def test_rows_not_written_are_caught(row: int) -> None:
    """Row 3 is of the empty request: 0 and -inf, not what was there before."""
    given = run_plain()
    given.out[row] = math.nan
    assert judge(given).element == math.inf
    given = run_plain()
    given.lse[row, 7] = math.nan
    assert judge(given).lse == math.inf
    given = run_plain()
    given.out[3, 2, 100] = 1e-20
    assert judge(given).is_mismatch()


def test_weights_below_float32_may_be_lost() -> None:
    """Seed 43, case 2213: the token with all the weight has a value of 0, the next one e^-102."""

    def shape(given: tensors.Tensors) -> None:
        heavy, light = given.groups[0].slots[0, :2].tolist()
        for values in (given.queries, given.pool):
            values.zero_()
        given.queries[..., tensors.HEAD_DIM_CKV] = 1
        given.pool[heavy, tensors.HEAD_DIM_CKV] = 102
        given.pool[light, 7] = 2.0**40

    given = run_plain(shape, q_lens=(1,), kv_lens=(2,), sm_scale=1.0, causal=False)
    given.out.zero_()
    given.lse.fill_(102 / math.log(2))
    assert not judge(given).is_mismatch()
    given.out[0, 3, 7] = 2.0**-84  # four times as much as may be lost
    assert judge(given).element > 1


def test_small_errors_are_caught() -> None:
    given = run_plain()
    given.out[1, 5, 17] *= 1 + 2.0**-6  # two units of the last place
    assert judge(given).element > 1
    given = run_plain()
    given.lse += 1e-3
    assert judge(given).lse > 1
    given = run_plain(lse_base_e=True)
    given.case = plain_case()
    assert judge(given).lse > 1
    given = run_plain()
    random = torch.Generator().manual_seed(1)
    noise = (
        torch.randn(given.out.shape, generator=random) * given.out.float().square().mean().sqrt()
    )
    given.out += (noise * 2.0**-9).to(given.out.dtype)
    assert judge(given).rmse > 1


def scores_and_values(
    given: tensors.Tensors, group: tensors.Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[requests, rows, tokens]``, -inf beyond a request, and ``[requests, tokens, 512]``."""
    k = given.pool[group.slots].double().nan_to_num(0.0, 0.0, 0.0)
    q = given.queries[group.rows].double().flatten(1, 2)
    scores = (q @ k.mT) * given.case.sm_scale
    scores.masked_fill_(torch.arange(k.shape[1]) >= group.kv_lens[:, None, None], -math.inf)
    return scores, k[..., :512]


def weights_of(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return (scores - top.clamp(min=-1e30)).exp()


def put_out(given: tensors.Tensors, group: tensors.Group, out: torch.Tensor) -> None:
    out = out.to(given.out.dtype).view(-1, *given.out.shape[1:])
    given.out[group.rows.flatten()] = out


def test_weights_rounded_once_are_beyond_the_bound_of_two_parts() -> None:
    """Rounding P to bf16 costs 1.1 to 1.5 times rounding alone: right only for long requests."""
    given = run_plain(causal=False, q_lens=(1, 1, 1), kv_lens=(2000, 3000, 0))
    scale = given.case.sm_scale
    for group in given.groups:
        answer = compare.exact(given.queries, given.pool, group, False, scale, ALL_IN_TWO_PARTS)
        scores, values = scores_and_values(given, group)
        weights = weights_of(scores, scores.amax(-1, keepdim=True))
        rounded = weights.bfloat16().double() @ values
        total = weights.sum(-1, keepdim=True).clamp(min=1e-300)
        put_out(given, group, rounded / total)
        assert torch.allclose((weights @ values) / total, answer.out)
    found = judge(given)
    assert 1.1 < found.rmse_over_rounding < 1.5
    assert found.rmse > 1
    allowed = judge(given, two_parts_up_to=1000)
    assert not allowed.is_mismatch()
    assert allowed.rmse == pytest.approx(found.rmse_over_rounding / 1.5, rel=0.05)


@pytest.mark.parametrize(("dtype", "is_right"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("exponent", [-40, 0, 40])
def test_parts_may_be_fp16_times_a_power_of_two(
    exponent: int, dtype: torch.dtype, is_right: bool
) -> None:
    """At least as exact is what csrc/etap_mla_partial.cuh does with O of a part, which it stores in
    float32 where fp16 alone does not suit; bf16 would be too short for it."""
    least, end = compare.PARTIAL_LEAST, torch.finfo(torch.float16).max
    given = run_plain(
        causal=False, q_lens=(1, 1, 1), kv_lens=(2000, 1000, 0), ckv_exponent=exponent
    )
    for group in given.groups:
        scores, values = scores_and_values(given, group)
        top = scores.amax(-1, keepdim=True)
        out, total = 0.0, weights_of(scores, top).sum(-1, keepdim=True)
        for part in range(0, scores.shape[-1], 448):
            tokens = slice(part, part + 448)
            part_top = scores[..., tokens].amax(-1, keepdim=True)
            of_part = weights_of(scores[..., tokens], part_top) @ values[:, tokens]
            largest = of_part.abs().amax().clamp(min=1e-300)
            is_usual = bool(least <= largest <= end)
            assert not (is_usual and exponent)
            power = 1.0 if is_usual else torch.exp2(largest.log2().floor() - 14)
            out = out + weights_of(part_top, top) * ((of_part / power).to(dtype).double() * power)
        put_out(given, group, out / total.clamp(min=1e-300))
    found = judge(given)
    assert found.is_mismatch() != is_right
    if is_right:
        assert 1.0 < found.rmse_over_rounding < 1.02


def test_two_parts_follow_the_row_tile() -> None:
    assert compare.two_part_tokens(8, 2) == compare.TWO_PART_TOKENS
    assert compare.two_part_tokens(16, 2) == compare.TWO_PART_TOKENS_MANY_ROWS
    csrc = evidence.REPOSITORY / "csrc"
    for header, tokens in (
        (
            "etap_mla_traits.cuh",
            f"kRowTile == 32 ? {compare.TWO_PART_TOKENS_MANY_ROWS} : {compare.TWO_PART_TOKENS}",
        ),
        ("etap_mla_rows_traits.cuh", f"{compare.TWO_PART_TOKENS_MANY_ROWS}"),
    ):
        assert f"kLongestSplitPRequest = {tokens};" in (csrc / header).read_text()


# The script


def test_script_runs_and_repeats_a_case(capsys: pytest.CaptureFixture) -> None:
    assert fuzz_gpu.main(["--device", "cpu", "--cases", "5", "--seed", "3"]) == 0
    assert "5 cases in" in capsys.readouterr().out
    assert fuzz_gpu.main(["--device", "cpu", "--case", "4", "--seed", "3"]) == 0
    assert "whole: right" in capsys.readouterr().out


def test_script_reports_what_is_wrong(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    right = tensors.run

    def wrong(wrapper: object, given: tensors.Tensors) -> None:
        if given.case.number == 7:
            raise ValueError("no such page size")
        right(wrapper, given)
        if given.case.number == 6:
            given.out[0, 0, 0] += 1

    monkeypatch.setattr(tensors, "run", wrong)
    assert fuzz_gpu.main(["--device", "cpu", "--first", "5", "--cases", "4", "--seed", "3"]) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH --case 6 --seed 3 --device cpu | of what is allowed" in printed
    assert "MISMATCH --case 7 --seed 3 --device cpu | ValueError: no such page size" in printed
    assert "4 cases in" in printed
    assert "2 mismatches" in printed
    assert fuzz_gpu.main(["--device", "cpu", "--case", "6", "--seed", "3"]) == 1


def test_script_needs_the_seed_of_a_case(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        fuzz_gpu.parse_arguments(["--case", "4"])
    assert "--case needs the --seed" in capsys.readouterr().err


def test_evidence_keeps_other_seeds_of_the_same_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    path = tmp_path / "fuzz.json"
    for seed, cases_run in ((1, 10), (2, 20), (1, 30)):
        fuzz_gpu.write_evidence(path, "a" * 64, {"seed": seed, "cases": cases_run})
    found = json.loads(path.read_text())
    assert [(run["seed"], run["cases"]) for run in found["runs"]] == [(2, 20), (1, 30)]
    assert evidence.schema_errors(found) == []
    fuzz_gpu.write_evidence(path, "b" * 64, {"seed": 3, "cases": 1})
    assert [run["seed"] for run in json.loads(path.read_text())["runs"]] == [3]
