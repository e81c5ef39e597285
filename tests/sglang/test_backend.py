"""The backend: SGLang's contract, and its computation on SGLang's own fixtures, on the CPU.

FlashInfer's wrappers, which only prefill uses, and the compiled kernel are replaced: the kernel by
the reference in PyTorch, given the same arguments. SGLang is the real one.
"""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from sglang_eval.fp8_kit import fp8_cache

from etap_flashinfer import jit, reference

METHODS = (
    "init_forward_metadata",
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
    "init_cuda_graph_state",
    "get_cuda_graph_seq_len_fill_value",
    "forward_decode",
    "forward_extend",
)
MULTI_STEP_METHODS = METHODS[:4]
SHAPE = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "hidden_size": 128,
    "max_context_len": 256,
    "dtype": torch.bfloat16,
    "device": "cpu",
}


@pytest.fixture
def backend(plugin):
    from sglang_patch import backend

    return backend


def accepts(ours, theirs) -> bool:
    """Whether a function can be called in every way that another one can."""
    mine, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    names = [name for name, p in wanted.items() if p.kind is not p.VAR_KEYWORD]
    extra = [p for name, p in mine.items() if name not in wanted]
    return list(mine)[: len(names)] == names and all(p.default is not p.empty for p in extra)


@pytest.mark.parametrize("method", METHODS)
def test_signatures_are_those_of_the_base_class(backend, method):
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    assert accepts(getattr(backend.EtapMLABackend, method), getattr(AttentionBackend, method))


@pytest.mark.parametrize("method", ["forward_decode", "forward_extend"])
def test_queries_and_cache_entries_may_come_in_parts(backend, method):
    from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend

    parent = getattr(FlashInferMLAAttnBackend, method)
    assert accepts(getattr(backend.EtapMLABackend, method), parent)


@pytest.mark.parametrize("method", MULTI_STEP_METHODS)
def test_signatures_are_those_of_flashinfers_multi_step_draft(backend, method):
    from sglang.srt.layers.attention import flashinfer_mla_backend

    theirs = flashinfer_mla_backend.FlashInferMLAMultiStepDraftBackend
    assert accepts(getattr(backend.EtapMultiStepDraftBackend, method), getattr(theirs, method))


def test_no_lengths_on_the_host(backend):
    assert backend.EtapMLABackend.needs_cpu_seq_lens is False
    assert backend.EtapMultiStepDraftBackend.needs_cpu_seq_lens is False


def test_nothing_of_the_contract_is_left_abstract(backend):
    """Methods of the base class that only raise, and that this backend can be asked for."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    for name, function in vars(AttentionBackend).items():
        if inspect.isfunction(function) and "raise NotImplementedError" in inspect.getsource(
            function
        ):
            optional = "breakable" in name or name in (
                "forward_mixed",  # on NPUs only
                "update_verify_buffers_to_fill_after_draft",
            )
            assert optional or getattr(backend.EtapMLABackend, name) is not function, name


# Computation


class Kernel:
    """In place of the compiled modules: computes with the reference, records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.kept: list[torch.Tensor] = []  # memory given to them

    def load(self, variant):
        def run(workspace, kept, *arguments):
            assert kept.dtype == torch.uint8
            assert kept.shape == (48,)
            self.kept.append(kept)
            *inputs, out, lse, causal, sm_scale, _ = arguments[:-3]
            assert lse is None
            assert arguments[-3:] == (1.0, 1.0, 0)  # scales, no fixed split
            queries = out.shape[0]
            self.calls.append((variant.short_name, queries))
            is_fp8 = variant.kv_cache == "fp8"
            assert inputs[2].dtype == inputs[3].dtype == (torch.uint8 if is_fp8 else out.dtype)
            q_nope, q_pe, *others = inputs
            qo_indptr, kv_len_arr = others[2], others[5]
            total = int(qo_indptr[kv_len_arr.numel()])  # rows behind it are not written
            result, _ = reference.mla_paged_attention(
                q_nope[:total],
                q_pe[:total],
                *others,
                causal,
                sm_scale,
                kv_cache_format="fp8_e4m3" if is_fp8 else None,
            )
            out[:total] = result

        return types.SimpleNamespace(
            run=run, workspace_bytes=lambda index: 64, kept_bytes=lambda index: 48
        )


class FlashInferWrapper:
    """In place of FlashInfer's: takes every plan, and must not be run."""

    def __init__(self, *arguments, **named) -> None:
        pass

    def plan(self, *arguments, **named) -> None:
        pass

    def run(self, *arguments, **named) -> None:
        raise AssertionError("FlashInfer was to attend")


@pytest.fixture
def kit(plugin, monkeypatch):
    """SGLang's own fixtures for MLA backends, on the CPU."""
    from sglang.srt.layers.attention import flashinfer_mla_backend
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.test.kits.attention_unittest.attention_methods import mla_attention

    kernel = Kernel()
    monkeypatch.setattr(jit, "get_etap_mla_module", kernel.load)
    for name in ("BatchMLAPagedAttentionWrapper", "BatchPrefillWithRaggedKVCacheWrapper"):
        monkeypatch.setattr(flashinfer_mla_backend, name, FlashInferWrapper, raising=False)
    zeros = torch.zeros
    # The parent pins host memory in newer versions, which needs a GPU.
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **named: zeros(*a, **named))

    def write(self, layer, loc, k_nope, k_rope):  # SGLang's is a Triton kernel for GPUs
        loc = getattr(loc, "loc", loc).long()
        rows = torch.cat([k_nope, k_rope], -1).to(self.dtype)
        self.kv_buffer[layer.layer_id][loc] = rows.view(self.store_dtype)

    monkeypatch.setattr(MLATokenToKVPool, "set_mla_kv_buffer", write)
    mla_attention.kernel = kernel
    return mla_attention


@pytest.fixture
def fp8_kit(kit):
    """The same with an fp8 cache."""
    with fp8_cache(kit):
        yield kit


def make_case(kit, mode, prefixes, new=(), heads=4, page_size=64):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return kit.MLAAttentionCase(
        name=f"{mode}{page_size}{heads}",
        backend="etap",
        forward_mode=ForwardMode[mode],
        num_heads=heads,
        page_size=page_size,
        prefix_lens=tuple(prefixes),
        extend_lens=tuple(new),
    )


class SkipsFail:
    """The kit skips what it can't set up; here that fails."""

    def skipTest(self, reason):  # noqa: N802
        pytest.fail(reason)


def make_fixture(kit, *arguments, **named):
    return kit.build_mla_attention_fixture(
        SkipsFail(), make_case(kit, *arguments, **named), **SHAPE
    )


def prepare_verify(fixture) -> None:
    """A verify batch's lengths do not count the draft's tokens, as SGLang's kit has it."""
    prefixes = torch.tensor(fixture.case.prefix_lens, dtype=torch.int32)
    fixture.forward_batch.seq_lens = prefixes
    fixture.forward_batch.seq_lens_cpu = prefixes
    fixture.forward_batch.seq_lens_sum = int(prefixes.sum())


@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
@pytest.mark.parametrize("layout", ["shuffled_pages", "interleaved_pages"])
def test_decode(kit, page_size, layout):
    case = make_case(kit, "DECODE", (61, 62, 63, 0, 128), page_size=page_size)
    kit.run_mla_attention_case(SkipsFail(), case, loc_layout=layout, **SHAPE)
    loader = "gather" if page_size == 1 else "tma"
    assert kit.kernel.calls == [(f"bf16_n8_{loader}", 5)]


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
@pytest.mark.parametrize(("heads", "row_tile"), [(16, 64), (64, 128)])
@pytest.mark.parametrize("page_size", [1, 64])
def test_several_queries_a_request(kit, mode, heads, row_tile, page_size):
    fixture = make_fixture(kit, mode, (4, 62), (3, 3), heads=heads, page_size=page_size)
    if mode == "TARGET_VERIFY":
        prepare_verify(fixture)
    actual = kit.run_mla_fixture_eager(fixture)
    expected = kit.expected_mla_fixture_output(fixture)
    torch.testing.assert_close(actual, expected, atol=3e-2, rtol=3e-2)
    assert len(kit.kernel.calls) == 1
    assert kit.kernel.calls[0][0].startswith(f"bf16_n{row_tile}_")


@pytest.mark.parametrize("page_size", [1, 64])
def test_decode_of_an_fp8_cache(fp8_kit, page_size):
    case = make_case(fp8_kit, "DECODE", (61, 62, 63, 0, 128), page_size=page_size)
    fp8_kit.run_mla_attention_case(SkipsFail(), case, **SHAPE)
    loader = "gather" if page_size == 1 else "tma"
    assert fp8_kit.kernel.calls == [(f"bf16_fp8_n8_{loader}", 5)]


@pytest.mark.parametrize("heads", [16, 64])
def test_verify_of_an_fp8_cache(fp8_kit, heads):
    """Also with more than 64 rows a request, for which an fp8 cache has no kernel of its own."""
    fixture = make_fixture(fp8_kit, "TARGET_VERIFY", (4, 62), (3, 3), heads=heads)
    prepare_verify(fixture)
    actual = fp8_kit.run_mla_fixture_eager(fixture)
    expected = fp8_kit.expected_mla_fixture_output(fixture)
    torch.testing.assert_close(actual, expected, atol=3e-2, rtol=3e-2)
    assert fp8_kit.kernel.calls == [("bf16_fp8_n64_tma", 6)]


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(
    ("prefixes", "new"), [((63,), (2,)), ((0, 32, 64), (63, 32, 1)), ((0, 0), (63, 65))]
)
def test_prefill_reads_an_fp8_pool_by_the_kernel(fp8_kit, prefixes, new, page_size):
    """The kit's prefill is in the absorbed form: FlashInfer would convert the whole pool."""
    case = make_case(fp8_kit, "EXTEND", prefixes, new, heads=16, page_size=page_size)
    fp8_kit.run_mla_attention_case(SkipsFail(), case, **SHAPE)
    loader = "gather" if page_size == 1 else "tma"
    assert fp8_kit.kernel.calls == [(f"bf16_fp8_n64_{loader}", sum(new))]


def test_rows_that_pad_prefill_are_no_requests(fp8_kit):
    fixture = make_fixture(fp8_kit, "EXTEND", (63, 5), (2, 3))
    plain = fp8_kit.run_mla_fixture_eager(fixture)
    fixture.input_hidden = torch.cat([fixture.input_hidden, fixture.input_hidden[:2]])
    locations = fixture.forward_batch.out_cache_loc
    fixture.forward_batch.out_cache_loc = torch.cat([locations, torch.zeros(2).long()])
    padded = fp8_kit.run_mla_fixture_eager(fixture)
    assert padded.shape[0] == plain.shape[0] + 2
    torch.testing.assert_close(padded[:-2], plain)


def test_prefill_with_a_bf16_cache_stays_with_flashinfer(kit):
    fixture = make_fixture(kit, "EXTEND", (63,), (2,))
    with pytest.raises(AssertionError, match="FlashInfer was to attend"):
        kit.run_mla_fixture_eager(fixture)
    assert kit.kernel.calls == []


def test_prefill_with_keys_per_head_stays_with_flashinfer(fp8_kit, monkeypatch):
    """It reads no more of an fp8 pool than the prefix, which SGLang gathers."""
    from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend

    fixture = make_fixture(fp8_kit, "EXTEND", (63,), (2,))
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    monkeypatch.setattr(FlashInferMLAAttnBackend, "forward_extend", lambda *arguments: "FlashInfer")
    layer = types.SimpleNamespace(v_head_dim=128)
    arguments = (None, None, None, layer, fixture.forward_batch)
    assert fixture.backend.forward_extend(*arguments) == "FlashInfer"


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY"])
def test_graph_buffers_follow_the_batch(kit, mode):
    """What a captured graph reads: the same tensors each time, filled anew, padding included."""
    new = (3, 3) if mode == "TARGET_VERIFY" else ()
    fixture = make_fixture(kit, mode, (4, 62), new)
    if new:
        prepare_verify(fixture)
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=12)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = backend.forward_metadata
    addresses = [captured.kv_indices.data_ptr(), captured.kv_len_arr.data_ptr()]
    # A replay with one request and a padded one: row 0 of the pool, length 1.
    batch.req_pool_indices = torch.tensor([1, 0])
    batch.seq_lens = torch.tensor([66, backend.get_cuda_graph_seq_len_fill_value()])
    backend.init_forward_metadata_out_graph(batch)
    replayed = backend.forward_metadata
    assert [replayed.kv_indices.data_ptr(), replayed.kv_len_arr.data_ptr()] == addresses
    added = 3 if new else 0
    assert captured.kv_len_arr.tolist() == [66 + added, 1 + added]
    table = fixture.runner.req_to_token_pool.req_to_token
    start = int(captured.kv_indptr[0])
    assert captured.kv_indices[start : start + 2].tolist() == (table[1, :128:64] // 64).tolist()


def test_multi_step_draft_sees_one_token_more_each_step(kit, backend):
    fixture = make_fixture(kit, "DECODE", (61, 62))
    draft = backend.EtapMultiStepDraftBackend(fixture.runner, 1, 4)
    draft.init_cuda_graph_state(max_bs=4, max_num_tokens=4)
    for initialize in (draft.init_forward_metadata, draft.init_forward_metadata_out_graph):
        initialize(fixture.forward_batch)
        lengths = [step.forward_metadata.kv_len_arr.tolist() for step in draft.attn_backends]
        # The batch's lengths are 62 and 63; step 0's token is the next one.
        assert lengths == [[63, 64], [64, 65], [65, 66]]
        tables = {step.forward_metadata.kv_indices.data_ptr() for step in draft.attn_backends}
        assert len(tables) == 1


def test_backends_share_the_workspace_but_no_kept_memory(kit, backend):
    fixture = make_fixture(kit, "DECODE", (61, 62))
    draft = backend.EtapMultiStepDraftBackend(fixture.runner, 1, 4)
    buffers = [each._kernels[1].args for each in (fixture.backend, *draft.attn_backends)]
    assert len({workspace.data_ptr() for workspace, _ in buffers}) == 1
    assert len({kept.data_ptr() for _, kept in buffers}) == 4
    assert all((kept == 0xFF).all() for _, kept in buffers)
    for _ in range(2):
        kit.run_mla_fixture_eager(fixture)
    assert len(kit.kernel.kept) == 2
    assert all(given is buffers[0][1] for given in kit.kernel.kept)


def test_trees_of_draft_tokens_are_refused(kit, backend, monkeypatch):
    from sglang_patch import compat

    with pytest.raises(ValueError, match=r"topk is 2.*allowed: 1"):
        backend.EtapMultiStepDraftBackend(None, 2, 3)
    settings = {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}
    monkeypatch.setattr(compat, "speculative_setting", lambda runner, name: settings[name])
    with pytest.raises(ValueError, match=r"topk is 4.*chains"):
        make_fixture(kit, "DECODE", (4,))


def test_wrong_number_of_queries_is_said(kit):
    fixture = make_fixture(kit, "DECODE", (61, 62))
    fixture.input_hidden = torch.cat([fixture.input_hidden] * 2)
    fixture.forward_batch.out_cache_loc = fixture.forward_batch.out_cache_loc.repeat(2)
    with pytest.raises(ValueError, match="got 4 queries; planned: 2 requests of 1"):
        kit.run_mla_fixture_eager(fixture)


def test_more_than_32_bits_of_pages_are_refused():
    from sglang_patch.metadata import IndexBuffers

    table = torch.zeros(1, dtype=torch.int32).expand(1, 2**20)
    with pytest.raises(ValueError, match=r"more than the kernel can index \(2\^31\)"):
        IndexBuffers(4096, table, 1, {1})


def test_batches_larger_than_the_buffers_are_refused():
    from sglang_patch.metadata import IndexBuffers

    index = IndexBuffers(1, torch.zeros(4, 64, dtype=torch.int32), 64, {1})
    with pytest.raises(ValueError, match="got 2 requests; made for 1"):
        index.fill(torch.arange(2), torch.ones(2, dtype=torch.int32))
