"""How the wrapper calls the ETAP kernel, with a stand-in for it on PyTorch's meta device."""

import logging
import subprocess
import sys

import fake_kernel
import pytest
import stock_stub
import torch
from fake_kernel import META, FakeKernel, Variant, plan_arguments, run_inputs

from etap_flashinfer import BatchMLAPagedAttentionWrapper, dispatch, mla


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return fake_kernel.install(monkeypatch)


def make_wrapper(
    backend: str = "etap", device: torch.device | str = META, **arguments
) -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(fake_kernel.WORKSPACE_BYTES, dtype=torch.int8, device=device)
    return BatchMLAPagedAttentionWrapper(workspace, backend=backend, **arguments)


def test_kernel_gets_its_arguments_in_order(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    planned = plan_arguments(index_device=META, causal=True)
    wrapper.plan(**planned)
    inputs = run_inputs()
    out, lse = wrapper.run(**inputs, return_lse=True, return_lse_base_on_e=True)
    ((variant, arguments),) = kernel.calls
    assert variant == Variant(torch.bfloat16, 16, "tma")
    workspace, kept, q_nope, q_pe, ckv, kpe, *index, given_out, given_lse = arguments[:12]
    scalars = list(arguments[12:])
    assert workspace.dtype == torch.uint8
    assert workspace.shape == (fake_kernel.WORKSPACE_BYTES,)
    assert kept is wrapper._executor.kept[torch.bfloat16, 16, "tma", "same"]
    for tensor, name in zip((q_nope, q_pe, ckv, kpe), inputs, strict=True):
        assert tensor is inputs[name]
    for tensor, name in zip(
        index, ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"), strict=True
    ):
        assert tensor is planned[name]  # on the device: referenced, neither copied nor read
    assert given_out is out
    assert given_lse is lse
    assert out.shape == (2, 16, 512)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    assert lse.shape == (2, 16)
    assert lse.dtype == torch.float32
    # causal, sm_scale, lse_base_e, ckv_scale, kpe_scale, fixed_split_tiles
    assert scalars == [True, 192**-0.5, True, 1.0, 1.0, 0]


@pytest.mark.parametrize("name", ["q_nope", "q_pe", "ckv_cache", "kpe_cache"])
def test_every_run_is_checked_whatever_ran_before(kernel: FakeKernel, name: str) -> None:
    """Inputs of a layout that passed need not be checked again; all others must be."""
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    inputs = run_inputs()
    wrapper.run(**inputs)
    wrapper.run(**run_inputs())
    assert len(kernel.calls) == 2
    good = inputs[name]
    rows = good.new_empty(*good.shape[:2], good.shape[2] + 4)
    for bad, message in (
        (good.half(), "dtype is torch.float16"),
        (torch.empty(good.shape, dtype=good.dtype), "is on cpu"),
        (rows[..., : good.shape[2]], "multiples of 8 elements"),
        (rows, r"has shape .*; planned"),
        (torch.cat((good, good)), r"queries|pages"),
        ("tensor", "is a str"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrapper.run(**(inputs | {name: bad}))
    wrapper.run(**inputs)
    assert len(kernel.calls) == 3


def test_every_result_buffer_is_checked_whatever_ran_before(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    out = torch.empty(2, 16, 512, dtype=torch.bfloat16, device=META)
    lse = torch.empty(2, 16, device=META)
    good = {"out": out, "lse": lse}
    for _ in range(2):
        wrapper.run(**run_inputs(), **good)
    wide = out.new_empty(2, 16, 516)
    for name, bad, message in (
        ("out", out.half(), "torch.float16"),
        ("out", out[:1], r"\[1, 16, 512\]"),
        ("out", wide[..., :512], "multiples of 8 elements"),
        ("out", out[:1].expand(2, 16, 512), "must not share memory"),
        ("out", "tensor", "is a str"),
        ("lse", lse.double(), "torch.float64"),
        ("lse", lse.t(), r"\[16, 2\]"),
        ("lse", torch.empty(16, 2, device=META).t(), "must be contiguous"),
        ("lse", (), "is a tuple"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrapper.run(**run_inputs(), **(good | {name: bad}))
    wrapper.run(**run_inputs(), **good)
    assert len(kernel.calls) == 3


def test_a_plan_like_the_last_one_knows_the_total_of_queries(kernel: FakeKernel) -> None:
    """What a plan takes over from another of the same problem follows its own index tensors."""
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments((1, 1)))
    wrapper.run(**run_inputs(2))
    wrapper.plan(**plan_arguments((1, 2)))
    with pytest.raises(ValueError, match="q_nope holds 2 queries; planned: 3"):
        wrapper.run(**run_inputs(2))
    wrapper.plan(**plan_arguments((0, 2)))
    wrapper.run(**run_inputs(2))
    assert [variant.row_tile for variant, _ in kernel.calls] == [16, 32]


def test_what_calls_share_is_converted_once(kernel: FakeKernel) -> None:
    """Workspace and kept memory once for a variant, index tensors once for a plan."""
    wrapper = make_wrapper()
    for number in range(3):
        planned = plan_arguments(index_device=META)
        wrapper.plan(**planned)
        for _ in range(3):
            wrapper.run(**run_inputs())
        assert len(kernel.converted) == 2 + 4 * (number + 1)
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
        for tensor, name in zip(kernel.converted[-4:], names, strict=True):
            assert tensor is planned[name]
    assert kernel.converted[1] is wrapper._executor.kept[torch.bfloat16, 16, "tma", "same"]


def test_a_converted_tensor_shares_and_keeps_the_memory() -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi")
    from etap_flashinfer import jit

    tensor = torch.arange(6, dtype=torch.int32)[2:]
    converted = jit.argument_converter()(tensor)
    assert isinstance(converted, tvm_ffi.Tensor)
    assert converted.data_ptr() == tensor.data_ptr()
    view = torch.from_dlpack(converted)
    tensor[0] = 7
    del tensor
    assert view.tolist() == [7, 3, 4, 5]


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 64.0},
        {"num_heads": True},
        {"sm_scale": torch.ones(())},
        {"sm_scale": float("nan")},
        {"head_dim_kpe": 32},
        {"kv_data_type": torch.float16},
        {"lse_mode": "none of them"},
        {"use_sinks": True},
    ],
)
def test_every_plan_is_checked_whatever_was_planned_before(kernel: FakeKernel, change) -> None:
    """Of a problem like the last one only the index tensors are checked; of all others all is."""
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    wrapper.plan(**plan_arguments())
    assert len(kernel.loaded) == 1
    for _ in range(2):
        with pytest.raises((ValueError, TypeError, NotImplementedError)):
            wrapper.plan(**(plan_arguments() | change))
        with pytest.raises(RuntimeError, match="before plan"):
            wrapper.run(**run_inputs())
    wrapper.plan(**plan_arguments())
    wrapper.run(**run_inputs())
    assert len(kernel.calls) == 1


def test_a_new_plan_checks_anew(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    wrapper.run(**run_inputs())
    wrapper.plan(**(plan_arguments() | {"page_size": 128}))
    with pytest.raises(ValueError, match=r"ckv_cache has shape .* planned: \[pages, 128, 512\]"):
        wrapper.run(**run_inputs())


def test_without_lse_the_kernel_gets_none(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    result = wrapper.run(**run_inputs())
    assert isinstance(result, torch.Tensor)
    assert kernel.calls[0][1][11] is None


def test_a_variant_of_a_wrapper_has_kept_memory(kernel: FakeKernel) -> None:
    """Ones at first, given to every call of every plan of the variant, and to no others."""
    wrapper = make_wrapper(device="cpu")
    assert not wrapper._executor.kept
    wrapper.plan(**plan_arguments())
    (kept,) = wrapper._executor.kept.values()
    assert kept.dtype == torch.uint8
    assert kept.shape == (fake_kernel.KEPT_BYTES,)
    assert kept.device.type == "cpu"
    assert (kept == 0xFF).all()
    kept.fill_(7)  # as the kernel would
    for heads in (16, 16, 64):
        wrapper.plan(**plan_arguments(num_heads=heads))
        for _ in range(2):
            wrapper.run(**run_inputs(num_heads=heads, device="cpu"))
    assert len(kernel.loaded) == 2
    for variant, arguments in kernel.calls:
        assert arguments[1] is wrapper._executor.kept[tuple(variant)]
        assert (arguments[1] is kept) == (variant.row_tile == 16)
    assert (kept == 7).all()
    other = BatchMLAPagedAttentionWrapper(wrapper._float_workspace_buffer, backend="etap")
    other.plan(**plan_arguments())
    other.run(**run_inputs(device="cpu"))
    _, (workspace, others_kept, *_) = kernel.calls[-1]
    assert workspace.data_ptr() == wrapper._float_workspace_buffer.data_ptr()
    assert others_kept is not kept
    assert (others_kept == 0xFF).all()


def test_out_and_lse_buffers_reach_the_kernel(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    out = torch.empty(2, 16, 1024, dtype=torch.bfloat16, device=META)[..., :512]
    lse = torch.empty(2, 16, device=META)
    assert wrapper.run(**run_inputs(), out=out, lse=lse) is out
    assert kernel.calls[0][1][10] is out
    assert kernel.calls[0][1][11] is lse


def test_cpu_index_tensors_are_moved_to_the_device(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    wrapper.run(**run_inputs())
    assert all(tensor.device == META for tensor in kernel.calls[0][1][6:10])


@pytest.mark.parametrize("index_device", ["cpu", "meta"])
def test_graph_buffers_are_what_the_kernel_gets(kernel: FakeKernel, index_device: str) -> None:
    buffers = {
        "qo_indptr": torch.empty(9, dtype=torch.int32, device=META),
        "kv_indptr": torch.empty(9, dtype=torch.int32, device=META),
        "kv_indices": torch.empty(64, dtype=torch.int32, device=META),
        "kv_len_arr": torch.empty(2, dtype=torch.int32, device=META),
    }
    wrapper = make_wrapper(use_cuda_graph=True, **buffers)
    for _ in range(2):
        wrapper.plan(**plan_arguments(index_device=index_device))
        wrapper.run(**run_inputs())
        for tensor, buffer in zip(kernel.calls[-1][1][6:10], buffers.values(), strict=True):
            assert tensor is buffer


@pytest.mark.parametrize(
    ("num_heads", "query_lens", "row_tile"),
    [(8, (1, 1), 8), (16, (1, 3), 64), (9, (1, 1), 16), (16, (2, 2), 32), (64, (1, 1), 64)],
)
def test_row_tile_from_query_lengths_on_the_cpu(
    kernel: FakeKernel, num_heads: int, query_lens: tuple[int, ...], row_tile: int
) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments(query_lens, num_heads=num_heads))
    wrapper.run(**run_inputs(sum(query_lens), num_heads))
    assert [variant.row_tile for variant in kernel.loaded] == [row_tile]
    assert kernel.calls[0][0].row_tile == row_tile


def test_more_than_64_rows_have_a_kernel_for_short_and_one_for_long_requests(
    kernel: FakeKernel,
) -> None:
    """Both loaded by the first plan; chosen by each from the pages that kv_indices has room for."""
    wrapper = make_wrapper()
    for num_pages in (2047, 2048, 2047, 2048):  # of 64 tokens, each in two row tiles
        indices = torch.zeros(num_pages, dtype=torch.int32)
        wrapper.plan(**plan_arguments(num_heads=128, kv_indices=indices))
        assert sorted(variant.row_tile for variant in kernel.loaded) == [64, 128]
        for _ in range(2):
            wrapper.run(**run_inputs(num_heads=128))
    used = [variant.row_tile for variant, _ in kernel.calls]
    assert used == [64, 64, 128, 128, 64, 64, 128, 128]


def test_graph_buffers_choose_the_kernel_of_more_than_64_rows(kernel: FakeKernel) -> None:
    """By their size: what a captured graph will find there at its replays is not known."""
    indptr = torch.empty(3, dtype=torch.int32, device=META)
    buffers = {"qo_indptr": indptr, "kv_indptr": indptr.clone(), "kv_len_arr": indptr[:2].clone()}
    for num_pages, row_tile in ((2047, 64), (2048, 128)):
        indices = torch.empty(num_pages, dtype=torch.int32, device=META)
        wrapper = make_wrapper(use_cuda_graph=True, kv_indices=indices, **buffers)
        wrapper.plan(**plan_arguments(num_heads=128))
        wrapper.run(**run_inputs(num_heads=128))
        assert kernel.calls[-1][0].row_tile == row_tile


@pytest.mark.parametrize("num_pages", [4, 4096])
def test_batch_invariant_calls_have_one_kernel_whatever_their_lengths(
    kernel: FakeKernel, num_pages: int
) -> None:
    indices = torch.zeros(num_pages, dtype=torch.int32)
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments(num_heads=128, kv_indices=indices), fixed_split_size=2)
    wrapper.run(**run_inputs(num_heads=128))
    assert [variant.row_tile for variant, _ in kernel.calls] == [128]
    assert {variant.row_tile for variant in kernel.loaded} == {128}


def test_row_tile_from_the_mean_where_lengths_are_on_the_device(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments((1, 3), index_device=META))
    assert [variant.row_tile for variant in kernel.loaded] == [16]  # decode: loaded by plan
    wrapper.run(**run_inputs(4))
    wrapper.run(**run_inputs(4))
    assert kernel.calls[0][0].row_tile == kernel.calls[1][0].row_tile == 32
    assert len(kernel.loaded) == 2  # each variant once


@pytest.mark.parametrize(("page_size", "kv_loader"), [(64, "tma"), (24, "tma"), (12, "gather")])
def test_kv_loader(kernel: FakeKernel, page_size: int, kv_loader: str) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments(page_size=page_size, index_device=META))
    wrapper.run(**run_inputs(page_size=page_size))
    assert kernel.calls[0][0].kv_loader == kv_loader


@pytest.mark.parametrize("query_lens", [(), (0, 0)])
def test_nothing_is_launched_without_queries(
    kernel: FakeKernel, query_lens: tuple[int, ...]
) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments(query_lens))
    out, lse = wrapper.run(**run_inputs(0), return_lse=True)
    assert out.shape == (0, 16, 512)
    assert lse.shape == (0, 16)
    assert kernel.calls == []


def test_head_major_queries_and_single_element_dimensions(kernel: FakeKernel) -> None:
    wrapper = make_wrapper()
    wrapper.plan(**plan_arguments())
    inputs = run_inputs()
    head_major = torch.empty(16, 2, 512, dtype=torch.bfloat16, device=META).transpose(0, 1)
    wrapper.run(**(inputs | {"q_nope": head_major}))
    wrapper.plan(**plan_arguments((1,)))
    odd_stride = torch.empty(1, dtype=torch.bfloat16, device=META)
    odd_stride = odd_stride.as_strided((1, 16, 512), (3, 512, 1))
    wrapper.run(**(run_inputs(1) | {"q_nope": odd_stride}))
    assert len(kernel.calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_takes_etap_and_logs_it_once(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    mla._log_choice.cache_clear()
    caplog.set_level(logging.INFO, "etap_flashinfer")
    for _ in range(2):
        wrapper = make_wrapper("auto")
        assert wrapper.backend == "auto"
        wrapper.plan(**plan_arguments(q_data_type=dtype, kv_data_type=dtype))
        wrapper.run(**run_inputs(dtype=dtype))
        assert wrapper.backend == "etap"
    assert len(kernel.calls) == 2
    assert [record.message for record in caplog.records] == [
        "backend='auto' on meta takes etap: a Hopper GPU and a problem it serves"
    ]


@pytest.fixture
def fake_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    stock_stub.install(monkeypatch)


@pytest.mark.usefixtures("fake_stock")
@pytest.mark.parametrize("backend", ["fa2", "fa3", "cutlass"])
def test_forced_stock_backend_gets_everything(backend: str) -> None:
    wrapper = make_wrapper(backend)
    inner = wrapper._stock
    assert inner.made_with[3] == backend
    assert wrapper.backend == backend
    planned = plan_arguments()
    wrapper.plan(**planned, use_profiler=True)
    for name, value in planned.items():
        assert inner.planned[name] is value
    assert inner.planned["use_profiler"] is True
    extras = {name: object() for name in ("out", "lse", "profiler_buffer", "kv_len", "page_table")}
    scales = {"o_scale": 0.5, "ckv_scale": 0.25, "kpe_scale": 0.125}
    inputs = run_inputs()
    result = wrapper.run(**inputs, **extras, **scales, return_lse=True, return_lse_base_on_e=True)
    assert result == "stock result"
    for name, value in (inputs | extras | scales).items():
        assert inner.ran[name] is value
    assert inner.ran["return_lse"] is inner.ran["return_lse_base_on_e"] is True


@pytest.mark.usefixtures("fake_stock")
def test_cutlass_runs_without_a_plan() -> None:
    assert make_wrapper("cutlass").run(**run_inputs(), kv_len=1, page_table=2) == "stock result"


@pytest.mark.usefixtures("fake_stock", "kernel")
@pytest.mark.parametrize(
    ("changes", "asked_for"),
    [
        ({"kv_data_type": torch.float8_e4m3fn, "use_profiler": True}, "fa3"),
        ({"num_heads": 129}, "auto"),
        ({"head_dim_ckv": 256}, "auto"),
        ({"q_data_type": torch.float16}, "auto"),
        ({"use_profiler": True}, "auto"),
    ],
)
def test_auto_on_hopper_takes_stock_where_etap_does_not_serve(changes, asked_for) -> None:
    wrapper = make_wrapper("auto")
    wrapper.plan(**plan_arguments(**changes))
    assert wrapper.backend == "fa3"
    assert wrapper._stock.made_with[3] == asked_for
    assert wrapper.run(**run_inputs(), ckv_scale=1.0) == "stock result"
    wrapper.plan(**plan_arguments())
    assert wrapper.backend == "etap"
    assert isinstance(wrapper.run(**run_inputs()), torch.Tensor)


@pytest.mark.usefixtures("fake_stock")
def test_auto_takes_stock_on_other_gpus(caplog: pytest.LogCaptureFixture) -> None:
    mla._log_choice.cache_clear()
    caplog.set_level(logging.INFO, "etap_flashinfer")
    wrapper = make_wrapper("auto")  # meta is no Hopper GPU
    assert wrapper.backend == "fa3"
    wrapper.plan(**plan_arguments())
    assert wrapper.run(**run_inputs()) == "stock result"
    (record,) = caplog.records
    assert "takes fa3: stock FlashInfer" in record.message


@pytest.mark.usefixtures("fake_stock")
def test_stock_error_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = make_wrapper("fa3")
    with pytest.raises(RuntimeError, match=r"run\(\) was called before plan\(\)"):
        wrapper.run(**run_inputs())
    monkeypatch.setitem(sys.modules, "flashinfer", type("F", (), {"__version__": "0.6.14"}))
    with pytest.raises(TypeError, match=r"plan\(\).*flashinfer 0.6.14 does not take lse_mode"):
        wrapper.plan(**plan_arguments(), lse_mode="base2")


def test_auto_on_the_cpu_takes_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    mla._log_choice.cache_clear()
    caplog.set_level(logging.INFO, "etap_flashinfer")
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(16))
    assert wrapper.backend == "reference"
    assert "takes reference: the workspace is on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("rows", "row_tile"), [(1, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (512, 128)]
)
def test_choose_row_tile(rows: int, row_tile: int) -> None:
    assert dispatch.choose_row_tile(rows, 1) == dispatch.choose_row_tile(1, rows) == row_tile
    assert dispatch.choose_row_tile(rows, 1, "fp8") == min(row_tile, 64)
    assert dispatch.choose_row_tile(rows, 1, "flashmla_656") == min(row_tile, 32)
    assert dispatch.choose_row_tile(rows, 1, is_long=False) == min(row_tile, 64)


def test_choose_kv_loader() -> None:
    tma = [size for size in range(1, 130) if dispatch.choose_kv_loader(size) == "tma"]
    assert tma == list(range(8, 130, 8))


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, etap_flashinfer, torch; "
        "etap_flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(16), backend='reference'); "
        "sys.exit(any(name in sys.modules for name in ('flashinfer', 'tvm_ffi', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cache_format", "widths"),
    [(None, (512, 64)), ("fp8_e4m3", (512, 64)), ("flashmla_656", (656, 656))],
)
def test_a_cache_without_pages_becomes_a_page_of_zeros(
    kernel: FakeKernel, cache_format: str | None, widths: tuple[int, int]
) -> None:
    """TMA has no tensors of no size; requests of no tokens, or of pages outside, are served."""
    wrapper = make_wrapper()
    kv_type = torch.bfloat16 if cache_format is None else torch.float8_e4m3fn
    wrapper.plan(**plan_arguments(kv_data_type=kv_type), kv_cache_format=cache_format)
    is_packed = cache_format == "flashmla_656"
    pool = torch.empty(0, 64, 656 if is_packed else 576, dtype=kv_type, device="meta")
    parts = (pool, None) if is_packed else (pool[..., :512], pool[..., 512:])
    inputs = run_inputs() | dict(zip(("ckv_cache", "kpe_cache"), parts, strict=True))
    for _ in range(2):  # not once and then remembered as checked
        wrapper.run(**inputs)
    for _, arguments in kernel.calls:
        ckv, kpe = arguments[4:6]
        assert ckv.shape == (1, 64, widths[0])
        assert kpe.shape == (1, 64, widths[1])
        assert (kpe is ckv) == is_packed
    assert len(kernel.calls) == 2
