"""Every misuse of the wrapper raises before a launch, saying what was given and what is allowed."""

import math
from types import SimpleNamespace

import fake_kernel
import pytest
import torch
from fake_kernel import META, WORKSPACE_BYTES, FakeKernel, plan_arguments, run_inputs

from etap_flashinfer import BatchMLAPagedAttentionWrapper, dispatch, reference, stock

BF16 = torch.bfloat16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    """A kernel that must never be called."""
    kernel = fake_kernel.install(monkeypatch)
    yield kernel
    assert kernel.calls == []


def make_etap(num_bytes: int = WORKSPACE_BYTES, **arguments) -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=META)
    return BatchMLAPagedAttentionWrapper(workspace, backend="etap", **arguments)


def make_reference() -> BatchMLAPagedAttentionWrapper:
    return BatchMLAPagedAttentionWrapper(torch.empty(16), backend="reference")


# Construction


@pytest.mark.parametrize(
    ("workspace", "arguments", "message"),
    [
        (None, {}, "float_workspace_buffer is a NoneType; it must be a torch.Tensor"),
        (torch.empty(4, 4).T[:2], {}, r"shape \[2, 4\] and strides \[1, 4\]; .* contiguous"),
        (torch.empty(4), {"backend": "fa4"}, "'fa4'; allowed: auto, etap, fa2, fa3, cutlass, ref"),
        (torch.empty(4), {"backend": "etap"}, "compute capability 9.0.*not on cpu; use"),
        (torch.empty(4), {"backend": "fa3"}, "'fa3' runs on GPUs, and the workspace is on the CPU"),
        (torch.empty(4), {"use_cuda_graph": True}, "missing: qo_indptr, kv_indptr, kv_indices, kv"),
    ],
)
def test_constructor(workspace, arguments, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BatchMLAPagedAttentionWrapper(workspace, **arguments)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_etap_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refusal = dispatch.etap_device_refusal(torch.device("cuda:1"))
    if capability == (9, 0):
        assert refusal is None
    else:
        assert refusal is not None
        assert f"cuda:1 has compute capability {capability[0]}.{capability[1]}" in refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_indices": None}, "missing: kv_indices"),
        ({"kv_len_arr": torch.zeros(2)}, "kv_len_arr.dtype is torch.float32; .* torch.int32"),
        ({"qo_indptr": int32(0, 0)}, "qo_indptr has 2 elements; .* batch of 2, so at least 3"),
        ({"kv_indptr": int32(0, 0, 0).to(META)}, "kv_indptr is on meta; .* device, cpu"),
    ],
)
def test_graph_buffers(changes, message: str) -> None:
    buffers = {
        "qo_indptr": int32(0, 0, 0),
        "kv_indptr": int32(0, 0, 0),
        "kv_indices": int32(0, 0, 0),
        "kv_len_arr": int32(0, 0),
    }
    with pytest.raises(ValueError, match=message):
        BatchMLAPagedAttentionWrapper(torch.empty(4), True, **(buffers | changes))


@pytest.mark.usefixtures("kernel")
def test_graph_buffers_must_be_on_the_device() -> None:
    buffers = [int32(0, 0, 0), int32(0, 0, 0), int32(0), int32(0, 0)]
    with pytest.raises(
        ValueError, match=r"buffer qo_indptr is on cpu; .* workspace's device, meta"
    ):
        BatchMLAPagedAttentionWrapper(torch.empty(4, device=META), True, *buffers, backend="etap")


# Planning, alike for ETAP and the reference

PLAN_ERRORS = [
    ({"num_heads": None, "causal": None}, r"plan\(\) is missing num_heads, causal"),
    ({"kv_indptr": None}, r"plan\(\) is missing kv_indptr"),
    ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
    ({"num_heads": 16.0}, "num_heads is 16.0; it must be an int"),
    ({"num_heads": True}, "num_heads is True; it must be an int"),
    ({"page_size": 0}, "page_size is 0; it must be at least 1"),
    ({"head_dim_ckv": -1}, "head_dim_ckv is -1; it must be at least 1"),
    ({"head_dim_kpe": "64"}, "head_dim_kpe is '64'; it must be an int"),
    ({"causal": 1}, "causal is 1; it must be True or False"),
    ({"sm_scale": math.nan}, "sm_scale is nan; it must be finite"),
    ({"sm_scale": -math.inf}, "sm_scale is -inf; it must be finite"),
    ({"sm_scale": torch.ones(1)}, r"sm_scale is tensor\(\[1.\]\); it must be a float"),
    ({"sm_scale": True}, "sm_scale is True; it must be a float"),
    ({"q_data_type": "bf16"}, "q_data_type is 'bf16'; it must be a torch.dtype"),
    ({"kv_data_type": torch.int8}, r"kv_data_type (is )?torch.int8.*allowed"),
    ({"kv_data_type": torch.float8_e5m2}, "float8_e5m2; of the fp8 types only torch.float8_e4m3fn"),
    ({"kv_data_type": torch.uint8}, "plan an fp8 cache as torch.float8_e4m3fn: run.. then takes"),
    ({"kv_cache_format": "fp8_e4m3"}, "'fp8_e4m3' needs kv_data_type torch.float8_e4m3fn, got tor"),
    ({"kv_cache_format": "packed"}, "'packed'; allowed: None, 'fp8_e4m3', 'flashmla_656'"),
    ({"use_profiler": True}, "use_profiler is True, which is not supported"),
    ({"block_tables": int32(1)}, "block_tables .dense page tables. is not supported"),
    ({"max_q_len": 3}, "max_q_len is 3, which is not supported"),
    ({"output_dtype": torch.float32}, "output_dtype is torch.float32; allowed: .* torch.bfloat16"),
    ({"output_scale": "per-tensor"}, "output_scale is 'per-tensor', which is not supported"),
    ({"scale_mode": "kv-per-tensor"}, "'kv-per-tensor', which needs kv_cache_format 'fp8_e4m3'"),
    ({"scale_mode": "bmm-scalar"}, "scale_mode is 'bmm-scalar', which is not supported"),
    ({"skip_softmax": True}, "skip_softmax is True, which is not supported"),
    ({"use_sinks": True}, "use_sinks is True, which is not supported"),
    ({"enable_pdl": True}, "enable_pdl is True; allowed: None or False"),
    ({"lse_mode": "base10"}, "lse_mode is 'base10'; allowed: none, base2, basee"),
    ({"query_layout": "flat"}, "query_layout is 'flat'; allowed: 'packed', 'split'"),
    ({"metadata": SimpleNamespace(qo_indptr=None)}, "metadata holds dense page tables only"),
    ({"metadata": SimpleNamespace(qo_indptr=1)}, "both metadata and qo_indptr, kv_indptr"),
    ({"qo_indptr": [0, 1, 2]}, "qo_indptr is a list; it must be a torch.Tensor"),
    ({"qo_indptr": torch.arange(3)}, "qo_indptr.dtype is torch.int64; it must be torch.int32"),
    ({"kv_indices": int32(0, 1, 2, 3).view(2, 2)}, r"kv_indices has shape \[2, 2\]"),
    ({"kv_len_arr": int32(1, 2, 3, 4)[::2]}, r"kv_len_arr .* strides \[2\]; .* contiguous"),
    ({"kv_indptr": int32(0, 2)}, "kv_indptr has 2 elements; .* so at least 3 are needed"),
    ({"qo_indptr": int32(1, 2, 3)}, "qo_indptr starts at 1; it must start at 0"),
    ({"qo_indptr": int32(0, 2, 1)}, "qo_indptr falls from 2 to 1 at request 1"),
    ({"qo_indptr": int32(0, 2**31 - 1, -5)}, "qo_indptr falls from 2147483647 to -5"),
    ({"kv_len_arr": int32(5, -1)}, "kv_len_arr is -1 for request 1; it must be at least 0"),
    ({"kv_indptr": int32(-2, 0, 2)}, "kv_indptr starts at -2"),
    ({"kv_indptr": int32(0, 3, 2)}, "kv_indptr starts at 0 and has differences down to -1"),
    ({"kv_indptr": int32(0, 2, 5)}, "kv_indptr ends at 5; kv_indices has only 4 elements"),
    ({"kv_len_arr": int32(128, 129)}, "129 for request 1, whose 2 pages of 64 tokens hold 128"),
]


@pytest.mark.parametrize(("changes", "message"), PLAN_ERRORS)
def test_plan_of_the_reference(changes, message: str) -> None:
    wrapper = make_reference()
    with pytest.raises((ValueError, TypeError), match=message):
        wrapper.plan(**plan_arguments(**changes))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("changes", "message"), PLAN_ERRORS)
def test_plan_of_etap(changes, message: str) -> None:
    wrapper = make_etap()
    with pytest.raises((ValueError, TypeError), match=message):
        wrapper.plan(**plan_arguments(**changes))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 129}, "'etap': got num_heads 129; allowed: 1 to 128"),
        ({"head_dim_ckv": 256}, "head_dim_ckv 256 and head_dim_kpe 64; allowed: 512 and 64"),
        ({"head_dim_kpe": 0}, "head_dim_ckv 512 and head_dim_kpe 0; allowed: 512 and 64"),
        ({"q_data_type": torch.float16}, "q_data_type torch.float16 and kv_data_type torch.bfl"),
        (
            {"q_data_type": torch.float8_e4m3fn, "kv_data_type": torch.float8_e4m3fn},
            "allowed: torch.bfloat16 or torch.float16, and a cache of the same or of torch.float8",
        ),
    ],
)
def test_what_etap_does_not_serve(changes, message: str) -> None:
    wrapper = make_etap()
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**plan_arguments(**changes))


def test_workspace_too_small(kernel: FakeKernel) -> None:
    wrapper = make_etap(WORKSPACE_BYTES - 1)
    with pytest.raises(ValueError, match=r"has 4095 bytes; the ETAP kernel needs 4096 on meta"):
        wrapper.plan(**plan_arguments())


@pytest.mark.usefixtures("kernel")
def test_workspace_misaligned() -> None:
    workspace = torch.empty(WORKSPACE_BYTES + 8, dtype=torch.uint8)[8:]
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="etap")
    with pytest.raises(ValueError, match=r"starts at address 0x.*8; .* multiple of 16 bytes"):
        wrapper.plan(**plan_arguments())


@pytest.mark.usefixtures("kernel")
def test_index_tensor_on_another_device() -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE_BYTES), backend="etap")
    with pytest.raises(ValueError, match=r"kv_indices is on meta; .* device, cpu, or on the CPU"):
        wrapper.plan(**plan_arguments(kv_indices=int32(0, 1, 2, 3).to(META)))


@pytest.mark.parametrize(
    ("query_lens", "message"),
    [
        ((1, 1, 1), "kv_len_arr has 3 elements; .* a batch of 2, which cannot change"),
        ((1, 1), "kv_indices has 4 elements; the CUDA-graph buffer holds 3"),
    ],
)
def test_plan_beyond_the_graph_buffers(query_lens: tuple[int, ...], message: str) -> None:
    buffers = [int32(7, 7, 7, 7), int32(7, 7, 7, 7), int32(7, 7, 7), int32(7, 7)]
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(4), True, *buffers)
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**plan_arguments(query_lens))
    assert all(torch.all(buffer == 7) for buffer in buffers)  # nothing half copied


# Running


def test_run_before_plan() -> None:
    wrapper = make_reference()
    with pytest.raises(RuntimeError, match=r"run\(\) was called before plan\(\)"):
        wrapper.run(**run_inputs(device="cpu"))


def test_run_after_a_failed_plan(kernel: FakeKernel) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_arguments())
    with pytest.raises(ValueError, match="num_heads"):
        wrapper.plan(**plan_arguments(num_heads=0))
    with pytest.raises(RuntimeError, match=r"after a plan\(\) that failed"):
        wrapper.run(**run_inputs())


def empty(*shape: int, dtype: torch.dtype = BF16, device=META) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


RUN_ERRORS = [
    ({"q_nope": None}, "q_nope is a NoneType; it must be a torch.Tensor"),
    ({"q_nope": empty(2, 16, 512, dtype=torch.half)}, "q_nope.dtype is torch.float16; planned"),
    (
        {"q_pe": empty(2, 16, 64, dtype=torch.half)},
        "q_pe.dtype is torch.float16; planned: torch.b",
    ),
    ({"ckv_cache": empty(8, 64, 512, dtype=torch.half)}, "ckv_cache.dtype is torch.float16"),
    ({"kpe_cache": empty(8, 64, 64, dtype=torch.half)}, "kpe_cache.dtype is torch.float16"),
    ({"q_pe": empty(2, 16, 64, device="cpu")}, "q_pe is on cpu; .* workspace's device, meta"),
    ({"ckv_cache": empty(8, 64, 512, device="cpu")}, "ckv_cache is on cpu; .* device, meta"),
    ({"q_nope": empty(2, 8, 512)}, r"\[2, 8, 512\]; planned: \[total queries, 16, 512\]"),
    ({"q_nope": empty(32, 512)}, r"\[32, 512\]; planned: \[total queries, 16, 512\]"),
    ({"q_pe": empty(2, 16, 32)}, r"q_pe has shape \[2, 16, 32\]; planned: .*, 16, 64\]"),
    ({"q_pe": empty(3, 16, 64)}, "q_pe holds 3 queries, q_nope 2"),
    ({"ckv_cache": empty(8, 32, 512)}, r"\[8, 32, 512\]; planned: \[pages, 64, 512\]"),
    ({"kpe_cache": empty(8, 64, 512)}, r"\[8, 64, 512\]; planned: \[pages, 64, 64\]"),
    ({"kpe_cache": empty(7, 64, 64)}, "kpe_cache has 7 pages, ckv_cache 8"),
    (
        {"q_nope": empty(3, 16, 512), "q_pe": empty(3, 16, 64)},
        r"q_nope holds 3 queries; planned: 2 \(the end of qo_indptr\)",
    ),
    ({"q_nope": empty(2, 16, 1024)[..., ::2]}, r"\[16384, 1024, 2\]; the last .* contiguous"),
    ({"q_nope": empty(2, 16, 516)[..., :512]}, r"q_nope has strides \[8256, 516, 1\].* of 8 elem"),
    ({"kpe_cache": empty(8, 64, 68)[..., :64]}, r"kpe_cache has strides \[4352, 68, 1\].* of 8"),
    ({"out": empty(2, 16, 256)}, r"out is torch.bfloat16 \[2, 16, 256\] on meta; it must be"),
    ({"out": empty(2, 16, 512, dtype=torch.float)}, "out is torch.float32 .* must be torch.bfloat"),
    ({"out": empty(2, 16, 512, device="cpu")}, r"out is .* on cpu; it must be .* on meta"),
    ({"out": empty(2, 16, 1024)[..., ::2]}, "out has strides .* last dimension must be contig"),
    ({"out": empty(2, 16, 514)[..., :512]}, r"out has strides \[8224, 514, 1\].* of 8 elements"),
    ({"out": empty(1, 16, 512).expand(2, 16, 512)}, "must not share memory"),
    ({"out": 1}, "out is a int; it must be a torch.Tensor"),
    ({"lse": empty(2, 16)}, r"lse is torch.bfloat16 \[2, 16\] on meta; it must be torch.float32"),
    ({"lse": empty(16, 2, dtype=torch.float)}, r"\[16, 2\] on meta; .* torch.float32 \[2, 16\]"),
    ({"lse": empty(16, 2, dtype=torch.float).T}, r"lse has strides \[1, 2\]; .* contiguous"),
    ({"query": empty(2, 16, 576)}, r"run\(\) got both query and its two parts"),
    ({"profiler_buffer": empty(1)}, "profiler_buffer was given, .*'etap' does not support"),
    ({"kv_len": empty(1)}, "kv_len was given, .* only backend='cutlass' takes it"),
    ({"page_table": empty(1)}, "page_table was given, .* only backend='cutlass' takes it"),
    ({"o_scale": 1.0}, "o_scale was given, .* only backend='cutlass' takes it"),
    ({"ckv_scale": 1.0}, "ckv_scale was given, and a cache of torch.bfloat16 has none; only kv_c"),
    ({"ckv_scale_arr": empty(1)}, "ckv_scale_arr was given"),
    ({"kpe_scale": 1.0}, "kpe_scale was given"),
    ({"sinks": empty(16)}, "sinks was given"),
    ({"skip_softmax_threshold_scale_factor": 1.0}, "skip_softmax_threshold_scale_factor was given"),
    ({"bmm1_scale": 1.0}, "bmm1_scale was given"),
    ({"bmm2_scale": 1.0}, "bmm2_scale was given"),
]


@pytest.mark.parametrize(("changes", "message"), RUN_ERRORS)
def test_run_of_etap(kernel: FakeKernel, changes, message: str) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_arguments())
    with pytest.raises((ValueError, TypeError), match=message):
        wrapper.run(**(run_inputs() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": empty(2, 16, 575)}, r"\[2, 16, 575\]; planned: .* of 512 \+ 64 elements"),
        ({"query": [1, 2]}, "query is a list; it must be a packed torch.Tensor or a pair"),
    ],
)
def test_packed_inputs(kernel: FakeKernel, changes, message: str) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_arguments())
    with pytest.raises((ValueError, TypeError), match=message):
        wrapper.run(kv_cache=empty(8, 64, 576), **changes)


@pytest.mark.parametrize("name", ["q_nope", "ckv_cache", "out"])
def test_misaligned_tensors(kernel: FakeKernel, name: str) -> None:
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE_BYTES), backend="etap")
    wrapper.plan(**plan_arguments())
    inputs = run_inputs(device="cpu")
    tensor = inputs["q_nope"] if name == "out" else inputs[name]
    shifted = torch.empty(tensor.numel() + 8, dtype=BF16)[1:][: tensor.numel()].view(tensor.shape)
    with pytest.raises(ValueError, match=f"{name} starts at .* multiple of 16 bytes"):
        wrapper.run(**(inputs | {name: shifted}))


def test_queries_without_requests(kernel: FakeKernel) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_arguments((), index_device=META))
    with pytest.raises(ValueError, match="q_nope holds 2 queries; planned: 0"):
        wrapper.run(**run_inputs())


@pytest.mark.parametrize(("planned", "base_e"), [("base2", True), ("basee", False)])
def test_lse_base_other_than_planned(kernel: FakeKernel, planned: str, base_e: bool) -> None:
    wrapper = make_etap()
    wrapper.plan(**plan_arguments(), lse_mode=planned)
    with pytest.raises(ValueError, match=f"={base_e} asks for lse_mode .*; planned: '{planned}'"):
        wrapper.run(**run_inputs(), return_lse=True, return_lse_base_on_e=base_e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32])
def test_dtypes_of_the_reference(dtype: torch.dtype) -> None:
    wrapper = make_reference()
    with pytest.raises(ValueError, match=f"q_data_type is {dtype}; allowed: torch.bfloat16, torch"):
        wrapper.plan(**plan_arguments(q_data_type=dtype))


@pytest.mark.parametrize("page", [-1, 8])
def test_page_outside_the_pool(page: int) -> None:
    wrapper = make_reference()
    wrapper.plan(**plan_arguments(kv_indices=int32(0, 1, 2, page)))
    with pytest.raises(ValueError, match=f"gives request 1 page {page}; .* pages 0 to 7"):
        wrapper.run(**run_inputs(device="cpu"))


def test_reference_checks_the_index_tensors_when_it_runs() -> None:
    planned = plan_arguments()
    wrapper = make_reference()
    wrapper.plan(**planned)
    planned["qo_indptr"][2] = 3
    with pytest.raises(ValueError, match="q_nope holds 2 queries; qo_indptr ends at 3"):
        wrapper.run(**run_inputs(device="cpu"))
    planned["kv_len_arr"][0] = 129
    with pytest.raises(ValueError, match="129 for request 0, whose 2 pages"):
        reference.mla_paged_attention(
            *run_inputs(device="cpu").values(), *list(planned.values())[:4], False, 1.0
        )


# Stock FlashInfer


def test_flashinfer_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'flashinfer'", name="flashinfer")

    monkeypatch.setattr(stock.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="flashinfer, which is not installed: pip install"):
        stock.import_flashinfer_mla()


def test_flashinfer_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("cannot find the CUDA driver")

    monkeypatch.setattr(stock.importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"cannot find the CUDA driver. FlashInfer 0.6.14 beside"):
        BatchMLAPagedAttentionWrapper(torch.empty(4, device=META), backend="fa2")
    assert make_reference().backend == "reference"
