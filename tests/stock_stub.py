"""A stand-in for stock FlashInfer's wrapper, to test what is handed to it."""

import pytest

from etap_flashinfer import stock


class FakeStockWrapper:
    """Records what it is made and called with; its signatures are FlashInfer 0.6.14's."""

    def __init__(
        self,
        float_workspace_buffer,
        use_cuda_graph=False,
        qo_indptr=None,
        kv_indptr=None,
        kv_indices=None,
        kv_len_arr=None,
        backend="auto",
    ) -> None:
        self._backend = "fa3" if backend == "auto" else backend
        self.made_with = (float_workspace_buffer, use_cuda_graph, qo_indptr, backend)

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
        use_profiler=False,
    ) -> None:
        self.planned = dict(locals())

    def run(
        self,
        q_nope,
        q_pe,
        ckv_cache,
        kpe_cache,
        out=None,
        lse=None,
        return_lse=False,
        profiler_buffer=None,
        kv_len=None,
        page_table=None,
        return_lse_base_on_e=False,
        o_scale=None,
        *,
        ckv_scale=None,
        kpe_scale=None,
    ) -> str:
        self.ran = dict(locals())
        return "stock result"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts it in the place of FlashInfer's."""

    class Module:
        BatchMLAPagedAttentionWrapper = FakeStockWrapper

    monkeypatch.setattr(stock, "import_flashinfer_mla", lambda: Module)
