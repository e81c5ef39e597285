"""fp8 caches through the wrapper: values against dense float64, the kernel's arguments, errors."""

import math

import fake_kernel
import pytest
import stock_stub
import torch
from fake_kernel import META, FakeKernel, Variant, plan_arguments, run_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from wrapper_problem import PagedProblem

from etap_flashinfer import BatchMLAPagedAttentionWrapper, cache_format, mla, quantization
from etap_flashinfer.reference import mla_paged_attention

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
# Relative error of rounding the output; the reference computes in float64.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FORMATS = ("fp8_e4m3", "flashmla_656")
each_format = pytest.mark.parametrize("cache_format", FORMATS)


# The reference backend


def quantize(
    problem: PagedProblem, cache_format: str, scales: tuple[float, float] = (1.0, 1.0)
) -> dict:
    """The cache arguments of run; ``problem.cache`` becomes their values, NaN where it was NaN."""
    latents = problem.cache.float()
    if cache_format == "flashmla_656":
        packed = quantization.quantize_flashmla_656(latents).cache
        problem.cache = quantization.dequantize_flashmla_656(packed, torch.float64)
        return {"ckv_cache": packed, "kpe_cache": None}
    split = problem.head_dim_ckv
    width = torch.tensor([split, problem.head_dim_kpe])
    columns = torch.tensor(scales, dtype=torch.float64).repeat_interleave(width)
    codes = (latents / columns.float()).clamp(-448, 448).to(FP8)
    problem.cache = codes.double() * columns
    return {
        "ckv_cache": codes[..., :split],
        "kpe_cache": codes[..., split:],
        "ckv_scale": scales[0],
        "kpe_scale": scales[1],
    }


def plan_of(problem: PagedProblem, cache_format: str | None) -> dict:
    return problem.plan_arguments | {"kv_data_type": FP8, "kv_cache_format": cache_format}


def check(problem: PagedProblem, cache_format: str | None, cache: dict) -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16))
    wrapper.plan(**plan_of(problem, cache_format))
    q_nope, q_pe = problem.inputs[:2]
    out, lse = wrapper.run(q_nope, q_pe, **cache, return_lse=True, return_lse_base_on_e=True)
    assert (out.dtype, lse.dtype) == (problem.dtype, torch.float32)
    expected_out, expected_lse = problem.expected()
    rounding = 1.01 * ROUNDING[problem.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_and_scales_match_dense_float64(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 4), label="batch size")
    lengths = st.lists(st.integers(0, 30), min_size=batch_size, max_size=batch_size)
    queries = st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size)
    problem = PagedProblem(
        query_lens=data.draw(queries, label="query lengths"),
        kv_lens=data.draw(lengths, label="kv lengths"),
        num_heads=data.draw(st.integers(1, 4), label="heads"),
        page_size=data.draw(st.integers(1, 9), label="page size"),
        causal=data.draw(st.booleans(), label="causal"),
        dtype=data.draw(st.sampled_from(list(ROUNDING)), label="dtype"),
        seed=data.draw(st.integers(0, 2**16), label="seed"),
    )
    scale = st.sampled_from([1.0, 0.25, 0.01, 0.7, 2.0])
    scales = data.draw(scale, label="ckv scale"), data.draw(scale, label="kpe scale")
    cache = quantize(problem, "fp8_e4m3", scales)
    if data.draw(st.booleans(), label="as bytes"):
        cache |= {name: cache[name].view(torch.uint8) for name in ("ckv_cache", "kpe_cache")}
    named = data.draw(st.sampled_from([None, "fp8_e4m3"]), label="format")
    check(problem, named, cache)


def deepseek_problem(**changes) -> PagedProblem:
    shape = {"num_heads": 3, "head_dim_ckv": 512, "head_dim_kpe": 64, "sm_scale": 192**-0.5}
    return PagedProblem([1, 3, 2, 1], [65, 0, 130, 9], **(shape | {"page_size": 16} | changes))


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_deepseek_widths(cache_format: str, dtype: torch.dtype, causal: bool) -> None:
    problem = deepseek_problem(dtype=dtype, causal=causal)
    check(problem, cache_format, quantize(problem, cache_format, (0.02, 0.03)))


def test_ways_to_give_a_packed_cache() -> None:
    problem = deepseek_problem()
    cache = quantize(problem, "flashmla_656")["ckv_cache"]
    for given_cache in (cache, cache.view(FP8), cache.unsqueeze(2), cache.view(FP8).unsqueeze(2)):
        check(problem, "flashmla_656", {"ckv_cache": given_cache})
        check(problem, "flashmla_656", {"kv_cache": given_cache})


def test_packed_codes_as_kv_cache() -> None:
    problem = deepseek_problem()
    codes = quantize(problem, "fp8_e4m3")["ckv_cache"]._base
    assert codes.shape[2] == 576
    check(problem, "fp8_e4m3", {"kv_cache": codes})


def test_scales_default_to_1() -> None:
    problem = PagedProblem([1, 2], [9, 30])
    cache = quantize(problem, "fp8_e4m3", (1.0, 1.0))
    check(problem, None, {name: cache[name] for name in ("ckv_cache", "kpe_cache")})
    problem = PagedProblem([1, 2], [9, 30])
    cache = quantize(problem, "fp8_e4m3", (1.0, 0.25))
    check(problem, None, {name: value for name, value in cache.items() if name != "ckv_scale"})


@each_format
@pytest.mark.parametrize("byte", [0, 300, 575])
def test_nan_code_reaches_its_own_request_only(cache_format: str, byte: int) -> None:
    problem = deepseek_problem()
    cache = quantize(problem, cache_format)
    page, slot = problem._place(2, 77)
    target = cache["ckv_cache"] if byte < 512 else cache["kpe_cache"]
    if cache_format == "flashmla_656":
        # In the rope part the NaN is a bf16: 0x7fff, two bytes.
        columns = [byte] if byte < 512 else [528 + 2 * (byte - 512), 529 + 2 * (byte - 512)]
        cache["ckv_cache"][page, slot, columns] = 0xFF
    else:
        target.view(torch.uint8)[page, slot, byte % 512] = 0x7F
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16))
    wrapper.plan(**plan_of(problem, cache_format))
    out, lse = wrapper.run(*problem.inputs[:2], **cache, return_lse=True)
    expected, _ = problem.expected()
    assert out[4:6].isnan().all()
    assert lse[4:6].isnan().all()
    others = [0, 1, 2, 3, 6]
    torch.testing.assert_close(out[others].double(), expected[others], rtol=2.0**-7, atol=1e-6)


def test_reference_function_takes_float64() -> None:
    problem = deepseek_problem()
    cache = quantize(problem, "flashmla_656")["ckv_cache"]
    out, lse = mla_paged_attention(
        *problem.inputs[:2],
        cache,
        cache,
        *problem.index,
        problem.causal,
        problem.sm_scale,
        accumulate_dtype=torch.float64,
        lse_base_e=True,
        kv_cache_format="flashmla_656",
    )
    expected_out, expected_lse = problem.expected()
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


# The ETAP kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return fake_kernel.install(monkeypatch)


def make_etap(backend: str = "etap") -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.uint8, device=META)
    return BatchMLAPagedAttentionWrapper(workspace, backend=backend)


def plan_fp8(cache_format: str | None = None, **changes) -> dict:
    return plan_arguments(**({"kv_data_type": FP8, "kv_cache_format": cache_format} | changes))


def empty(*shape: int, dtype: torch.dtype = FP8, device=META) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def run_fp8(**changes) -> dict:
    """Arguments of run for ``plan_fp8``: views of one pool of codes."""
    pool = empty(8, 64, 576)
    return run_inputs() | {"ckv_cache": pool[..., :512], "kpe_cache": pool[..., 512:]} | changes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [FP8, torch.uint8])
def test_kernel_gets_codes_as_bytes_and_two_scales(
    kernel: FakeKernel, dtype: torch.dtype, storage: torch.dtype
) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_fp8(q_data_type=dtype), scale_mode="kv-per-tensor")
    inputs = run_fp8() | {name: run_inputs(dtype=dtype)[name] for name in ("q_nope", "q_pe")}
    inputs |= {name: inputs[name].view(storage) for name in ("ckv_cache", "kpe_cache")}
    out = wrapper.run(**inputs, ckv_scale=0.5, kpe_scale=3)
    assert out.dtype == dtype
    ((variant, arguments),) = kernel.calls
    assert variant == Variant(dtype, 16, "tma", "fp8")
    ckv, kpe = arguments[4:6]
    assert ckv.dtype == kpe.dtype == torch.uint8
    assert (ckv.shape, kpe.shape) == ((8, 64, 512), (8, 64, 64))
    assert ckv.stride() == kpe.stride() == (64 * 576, 576, 1)
    assert (ckv.storage_offset(), kpe.storage_offset()) == (0, 512)
    assert arguments[-3:-1] == (0.5, 3.0)
    assert all(isinstance(scale, float) for scale in arguments[-3:-1])
    wrapper.run(**inputs)
    arguments = kernel.calls[1][1]
    assert arguments[-3:-1] == (1.0, 1.0)
    assert [pool.dtype for pool in arguments[4:6]] == [torch.uint8] * 2


@pytest.mark.parametrize("backend", ["etap", "auto"])
@pytest.mark.parametrize("heads", [16, 128])
def test_kernel_gets_packed_tokens_as_bytes(kernel: FakeKernel, heads: int, backend: str) -> None:
    """Both parts are the whole pool, and no more than 32 rows make a tile."""
    wrapper = make_etap(backend)
    wrapper.plan(**plan_fp8("flashmla_656", num_heads=heads))
    pool = empty(8, 80, 1, 656)[:, :64]
    wrapper.run(**run_inputs(num_heads=heads) | {"ckv_cache": pool, "kpe_cache": None})
    ((variant, arguments),) = kernel.calls
    assert variant == Variant(BF16, min(heads, 32), "tma", "flashmla_656")
    for given_pool in arguments[4:6]:
        assert (given_pool.dtype, given_pool.shape) == (torch.uint8, (8, 64, 656))
        assert given_pool.stride() == (80 * 656, 656, 1)
    assert arguments[-3:] == (1.0, 1.0, 0)


@pytest.mark.parametrize(("page_size", "kv_loader"), [(64, "tma"), (1, "gather")])
def test_loaders(kernel: FakeKernel, page_size: int, kv_loader: str) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_fp8(page_size=page_size, index_device=META))
    assert [variant.kv_loader for variant in kernel.loaded] == [kv_loader]


def test_one_wrapper_for_all_caches(kernel: FakeKernel) -> None:
    wrapper = make_etap()
    for _ in range(2):
        wrapper.plan(**plan_arguments())
        wrapper.run(**run_inputs())
        wrapper.plan(**plan_fp8())
        wrapper.run(**run_fp8())
    assert [call[0].kv_cache for call in kernel.calls] == 2 * ["same", "fp8"]
    assert len(kernel.loaded) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_takes_etap(kernel: FakeKernel, dtype: torch.dtype) -> None:
    wrapper = make_etap("auto")
    wrapper.plan(**plan_fp8(q_data_type=dtype))
    assert wrapper.backend == "etap"
    assert kernel.loaded[0].kv_cache == "fp8"


@pytest.fixture
def fake_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    stock_stub.install(monkeypatch)


@pytest.mark.usefixtures("fake_stock")
@pytest.mark.parametrize("backend", ["auto", "fa3"])  # auto: meta is no Hopper GPU
def test_stock_gets_codes(backend: str) -> None:
    mla._log_choice.cache_clear()
    wrapper = make_etap(backend)
    wrapper.plan(**plan_fp8("fp8_e4m3"))
    assert wrapper._stock.planned["kv_data_type"] == FP8
    assert wrapper.run(**run_fp8(), ckv_scale=0.5, kpe_scale=2.0) == "stock result"
    assert (wrapper._stock.ran["ckv_scale"], wrapper._stock.ran["kpe_scale"]) == (0.5, 2.0)


@pytest.mark.usefixtures("fake_stock", "kernel")
def test_auto_on_hopper_turns_to_stock_for_its_options() -> None:
    wrapper = make_etap("auto")
    wrapper.plan(**plan_fp8(use_profiler=True))
    assert wrapper.backend == "fa3"


@pytest.mark.usefixtures("fake_stock")
@pytest.mark.parametrize(("backend", "is_hopper"), [("fa3", True), ("fa3", False), ("auto", False)])
def test_stock_gets_no_packed_tokens(
    backend: str, is_hopper: bool, request: pytest.FixtureRequest
) -> None:
    if is_hopper:
        request.getfixturevalue("kernel")
    wrapper = make_etap(backend)
    wrapper.plan(**plan_fp8())
    reason = ", and ETAP does not serve: it runs on Hopper" if backend == "auto" else "; use"
    message = f"backend '{backend}': stock FlashInfer does not read .*'flashmla_656'{reason}"
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**plan_fp8("flashmla_656"))
    with pytest.raises(RuntimeError, match="after a plan"):
        wrapper.run(**run_fp8())


@pytest.mark.usefixtures("fake_stock", "kernel")
def test_auto_on_hopper_leaves_no_packed_tokens_to_stock() -> None:
    wrapper = make_etap("auto")
    with pytest.raises(ValueError, match=r"ETAP does not serve: use_profiler is True"):
        wrapper.plan(**plan_fp8("flashmla_656", use_profiler=True))
    with pytest.raises(RuntimeError, match=r"before plan\(\)"):
        wrapper.run(**run_fp8())


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_data_type": torch.float8_e5m2}, "float8_e5m2; of the fp8 types only torch.float8_e4"),
        (
            {"kv_cache_format": "flashmla_656", "kv_data_type": BF16},
            "'flashmla_656' needs kv_data_type torch.float8_e4m3fn, got torch.bfloat16",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "etap", "reference"])
@pytest.mark.usefixtures("fake_stock", "kernel")
def test_plan_errors(backend: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_etap(backend).plan(**plan_fp8(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head_dim_kpe": 128},
            "'flashmla_656' holds head_dim_ckv 512 and head_dim_kpe 64, got 512 and 128",
        ),
        (
            {"scale_mode": "kv-per-tensor"},
            "'kv-per-tensor', which needs kv_cache_format 'fp8_e4m3'",
        ),
    ],
)
def test_plan_errors_of_packed_tokens(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_etap("reference").plan(**plan_fp8("flashmla_656", **changes))


RUN_ERRORS = [
    ("fp8_e4m3", {"ckv_cache": empty(8, 64, 512, dtype=BF16)}, "bfloat16; planned: torch.float8_e"),
    ("fp8_e4m3", {"kpe_cache": empty(8, 64, 64, dtype=torch.int8)}, "e4m3fn or torch.uint8"),
    (
        "fp8_e4m3",
        {"ckv_cache": empty(8, 64, 512, dtype=torch.float8_e5m2)},
        "dtype is torch.float8_e5",
    ),
    ("fp8_e4m3", {"ckv_cache": empty(8, 64, 656)}, r"\[8, 64, 656\]; planned: \[pages, 64, 512\]"),
    ("fp8_e4m3", {"kpe_cache": None}, "kpe_cache is a NoneType; it must be a torch.Tensor"),
    ("fp8_e4m3", {"kpe_cache": empty(7, 64, 64)}, "kpe_cache has 7 pages, ckv_cache 8"),
    ("fp8_e4m3", {"ckv_scale": 0.0}, "ckv_scale is 0.0; it must be positive and finite in float32"),
    ("fp8_e4m3", {"ckv_scale": -1.0}, "ckv_scale is -1.0; it must be positive"),
    ("fp8_e4m3", {"kpe_scale": math.nan}, "kpe_scale is nan; it must be positive"),
    ("fp8_e4m3", {"kpe_scale": math.inf}, "kpe_scale is inf; it must be positive"),
    ("fp8_e4m3", {"kpe_scale": 1e-40}, "kpe_scale is 1e-40; it must be positive and finite in fl"),
    ("fp8_e4m3", {"ckv_scale": True}, "ckv_scale is True; it must be a float"),
    ("fp8_e4m3", {"ckv_scale": torch.ones(1)}, "ckv_scale is tensor.*; it must be a float"),
    ("fp8_e4m3", {"ckv_scale_arr": empty(8, 64, 4)}, "ckv_scale_arr was given, .*'etap' does not"),
    ("flashmla_656", {"ckv_scale": 1.0}, "ckv_scale was given, .*'flashmla_656' holds its own"),
    ("flashmla_656", {"kpe_scale": 1.0}, "kpe_scale was given, .*'flashmla_656' holds its own"),
    ("flashmla_656", {"kpe_cache": empty(8, 64, 64)}, "kpe_cache was given; .* must be None"),
    ("flashmla_656", {"ckv_cache": empty(8, 64, 576)}, r"planned: \[pages, 64, 656\]"),
    ("flashmla_656", {"ckv_cache": empty(8, 64, 2, 656)}, r"\[8, 64, 2, 656\]; planned"),
    ("flashmla_656", {"ckv_cache": empty(8, 64, 656, dtype=BF16)}, "uint8 or torch.float8_e4m3fn"),
    ("flashmla_656", {"ckv_cache": None}, "ckv_cache is a NoneType; it must be a torch.Tensor"),
    ("flashmla_656", {"kv_cache": empty(8, 64, 656)}, "both kv_cache and its two parts"),
]


@pytest.mark.parametrize(("cache_format", "changes", "message"), RUN_ERRORS)
def test_run_errors(kernel: FakeKernel, cache_format: str, changes: dict, message: str) -> None:
    packed = {"ckv_cache": empty(8, 64, 656), "kpe_cache": None}
    is_packed = cache_format == "flashmla_656"
    wrapper = make_etap()
    wrapper.plan(**plan_fp8(cache_format))
    with pytest.raises((ValueError, TypeError), match=message):
        wrapper.run(**run_fp8(**((packed | changes) if is_packed else changes)))
    assert kernel.calls == []


LAYOUT_ERRORS = [
    ({"ckv_cache": empty(8, 64, 520)[..., :512]}, "ckv_cache has strides .* of 16 elements"),
    ({"kpe_cache": empty(8, 64, 72)[..., :64]}, "kpe_cache has strides .* of 16 elements"),
    ({"ckv_cache": empty(8, 64, 1024)[..., ::2]}, "last dimension must be contiguous"),
]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (empty(8, 64, 664)[..., :656], "ckv_cache has strides .* of 16 elements"),
        (empty(8, 64, 1312)[..., ::2], "last dimension must be contiguous"),
    ],
)
def test_layout_errors_of_packed_tokens(
    kernel: FakeKernel, pool: torch.Tensor, message: str
) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_fp8("flashmla_656"))
    with pytest.raises(ValueError, match=message):
        wrapper.run(**run_inputs() | {"ckv_cache": pool, "kpe_cache": None})
    assert kernel.calls == []


@pytest.mark.parametrize("shape", [(8, 64, 656), (8, 64, 1, 656)])
def test_packed_tokens_are_checked_whatever_ran_before(
    kernel: FakeKernel, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a layout that passed need not be checked again; all others must be."""
    wrapper = make_etap()
    wrapper.plan(**plan_fp8("flashmla_656"))
    inputs = run_fp8(ckv_cache=empty(*shape), kpe_cache=None)
    with monkeypatch.context() as patch:
        wrapper.run(**inputs)
        patch.setattr(cache_format, "checked_cache", None)
        wrapper.run(**(inputs | {"ckv_cache": empty(*shape)}))
    first, second = ([tensor.shape for tensor in call[:6]] for _, call in kernel.calls)
    assert first == second
    for changes, message in (
        ({"ckv_cache": empty(8, 64, 664)[..., :656]}, "strides .* of 16 elements"),
        ({"ckv_cache": empty(8, 64, 652)}, r"planned: \[pages, 64, 656\]"),
        ({"ckv_cache": empty(8, 64, 2, 656)}, r"planned: \[pages, 64, 656\]"),
        ({"kpe_cache": inputs["ckv_cache"]}, "kpe_cache must be None"),
        ({"ckv_cache": None}, "is a NoneType"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrapper.run(**(inputs | changes))
    assert len(kernel.calls) == 2


@pytest.mark.parametrize(("changes", "message"), LAYOUT_ERRORS)
def test_layout_errors(kernel: FakeKernel, changes: dict, message: str) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_fp8())
    with pytest.raises(ValueError, match=message):
        wrapper.run(**run_fp8(**changes))
    assert kernel.calls == []


def test_misaligned_caches(kernel: FakeKernel) -> None:
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES)
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    wrapper.plan(**plan_fp8())
    pool = torch.empty(8 * 64 * 512 + 16, dtype=torch.uint8)
    shifted = pool[8 : 8 + 8 * 64 * 512].view(8, 64, 512)
    inputs = run_fp8() | run_inputs(device="cpu") | {"ckv_cache": shifted}
    inputs["kpe_cache"] = torch.empty(8, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"ckv_cache starts at .* multiple of 16 bytes"):
        wrapper.run(**inputs)
    assert kernel.calls == []
