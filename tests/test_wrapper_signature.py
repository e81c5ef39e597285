"""The wrapper's signatures are FlashInfer's: change the import, nothing else."""

import inspect

import pytest

from etap_flashinfer import BatchMLAPagedAttentionWrapper

# FlashInfer 0.6.14's, in order; the last of run's may only be given by name.
CONSTRUCTOR = (
    "float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend"
)
PLAN = (
    "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size "
    "causal sm_scale q_data_type kv_data_type use_profiler"
)
RUN = (
    "q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table "
    "return_lse_base_on_e o_scale"
)
RUN_BY_NAME = {"ckv_scale", "kpe_scale"}


def parameters(owner: type, method: str) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(getattr(owner, method)).parameters.items())[1:])


@pytest.mark.parametrize(
    ("method", "names"), [("__init__", CONSTRUCTOR), ("plan", PLAN), ("run", RUN)]
)
def test_positional_arguments_of_0_6_14(method: str, names: str) -> None:
    ours = parameters(BatchMLAPagedAttentionWrapper, method)
    positional = [name for name, each in ours.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert positional == names.split()


def test_keyword_arguments_of_0_6_14() -> None:
    assert parameters(BatchMLAPagedAttentionWrapper, "run").keys() >= RUN_BY_NAME


@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_signature_of_the_installed_flashinfer(method: str) -> None:
    stock = pytest.importorskip("flashinfer.mla", exc_type=Exception).BatchMLAPagedAttentionWrapper
    ours, theirs = (parameters(each, method) for each in (BatchMLAPagedAttentionWrapper, stock))
    assert ours.keys() >= theirs.keys()
    for name, each in theirs.items():
        assert ours[name].kind == each.kind, name
        if each.default is not inspect.Parameter.empty:
            assert ours[name].default == each.default, name
    by_position = [name for name, each in theirs.items() if each.kind != each.KEYWORD_ONLY]
    assert list(ours)[: len(by_position)] == by_position


def test_public_methods_of_the_installed_flashinfer() -> None:
    stock = pytest.importorskip("flashinfer.mla", exc_type=Exception).BatchMLAPagedAttentionWrapper
    public = {name for name in vars(stock) if not name.startswith("_")}
    assert public <= set(dir(BatchMLAPagedAttentionWrapper))
