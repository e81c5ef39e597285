"""Registration: what SGLang knows once its plugins are loaded, and how failures are said."""

from __future__ import annotations

import argparse
import types

import pytest
import torch


def test_backend_is_a_choice_once(plugin):
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    plugin.register()
    assert server_args.ATTENTION_BACKEND_CHOICES.count("etap") == 1
    assert ATTENTION_BACKENDS["etap"] is plugin.create


def test_hooks_are_applied(plugin):
    assert plugin.missing_hooks() == []


def test_prefix_cache_in_chunks_is_kept(resolve):
    assert resolve("--attention-backend", "etap").disable_chunked_prefix_cache is False


@pytest.mark.parametrize("flag", ["--attention-backend", "--decode-attention-backend"])
def test_page_size_is_64_by_default(resolve, flag):
    assert resolve(flag, "etap").page_size == 64


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_page_size_given_is_kept(resolve, page_size):
    view = resolve("--attention-backend", "etap", "--page-size", str(page_size))
    assert view.page_size == page_size


def test_other_backends_keep_their_page_size(resolve):
    assert resolve("--attention-backend", "triton").page_size == 1
    assert resolve("--attention-backend", "flashmla").page_size == 64


def test_decode_alone(resolve):
    view = resolve("--decode-attention-backend", "etap", "--prefill-attention-backend", "triton")
    assert view.decode_attention_backend == "etap"
    assert view.prefill_attention_backend == "triton"


@pytest.mark.parametrize("flag", ["--attention-backend", "--decode-attention-backend"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8_e4m3"])
def test_types_of_the_cache_that_are_served(resolve, flag, dtype):
    assert resolve(flag, "etap", "--kv-cache-dtype", dtype).kv_cache_dtype == dtype


@pytest.mark.parametrize("flag", ["--attention-backend", "--decode-attention-backend"])
def test_other_fp8_caches_are_refused_with_advice(resolve, flag):
    with pytest.raises(ValueError, match=r"etap.*fp8_e5m2; allowed:.*auto, bf16 or fp8_e4m3"):
        resolve(flag, "etap", "--kv-cache-dtype", "fp8_e5m2")


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_types_of_the_cache_that_are_refused(dtype):
    from sglang_patch import compat

    assert "allowed:" in compat.cache_dtype_refusal(dtype)


def test_models_call_it_with_parts_and_flashmlas_choice_of_prefill(plugin):
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    plugin._prepare_models()
    plugin._prepare_models.cache_clear()
    plugin._prepare_models()
    handler = attention_backend_handler.AttentionBackendRegistry.get_handler("etap")
    assert handler is attention_backend_handler.handle_attention_flashmla
    assert utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.count("etap") == 1


@pytest.mark.parametrize(
    ("prefill", "decode", "works"),
    [
        ("flashinfer", "etap", False),
        ("etap", "flashmla", False),
        ("fa3", "etap", True),
        (None, None, True),
        (None, "etap", True),
    ],
)
def test_prefill_that_is_not_told_of_prefixes_is_refused(prefill, decode, works, monkeypatch):
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    from sglang_patch import compat

    arguments = argparse.Namespace(
        attention_backend="etap", prefill_attention_backend=prefill, decode_attention_backend=decode
    )
    is_told = hasattr(HybridAttnBackend, "init_mha_chunk_metadata")  # since 0.5.17 or later
    refusal = compat.prefill_backend_refusal(arguments)
    assert (refusal is None) == (works or is_told)
    monkeypatch.delattr(HybridAttnBackend, "init_mha_chunk_metadata", raising=False)
    assert (compat.prefill_backend_refusal(arguments) is None) == works
    arguments.disable_chunked_prefix_cache = True
    assert compat.prefill_backend_refusal(arguments) is None


def test_models_without_latent_attention_are_refused(plugin):
    with pytest.raises(ValueError, match="latent attention"):
        plugin.create(types.SimpleNamespace(use_mla_backend=False))


def test_half_a_registration_is_an_error(plugin, monkeypatch):
    unhooked = "sglang.srt.arg_groups.overrides.run_post_process_pass"
    monkeypatch.setattr(plugin, "PAGE_SIZE_PASS", unhooked)
    with pytest.raises(RuntimeError, match=f"only in part.*{unhooked}"):
        plugin.create(types.SimpleNamespace(use_mla_backend=True))


def test_a_failing_registration_is_logged_with_what_it_means(plugin, monkeypatch, caplog):
    def fail(version):
        raise ImportError("no such thing")

    monkeypatch.setattr(plugin, "_register", fail)
    plugin.register()
    assert "will not accept --attention-backend etap" in caplog.text
    assert "no such thing" in caplog.text


def test_old_versions_are_refused(plugin, monkeypatch, caplog):
    from sglang_patch import compat

    monkeypatch.setattr(compat, "sglang_version", lambda: "0.5.15.post1")
    with pytest.raises(RuntimeError, match=r"0\.5\.15\.post1 is too old"):
        plugin.create(types.SimpleNamespace(use_mla_backend=True))
    plugin._register.__wrapped__("0.5.15.post1")
    assert "too old" in caplog.text


def test_installed_version_is_served_without_a_word(plugin):
    from sglang_patch import compat

    version = compat.sglang_version()
    assert version is not None
    assert compat.version_refusal(version) is None
    assert compat.version_warning(version) is None
    assert compat.version_warning("0.5.24") is not None
    assert compat.version_warning("0.6.0rc1") is not None


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_draft_factory_makes_our_backends(plugin, monkeypatch, kind):
    """The hook adds ``etap`` to the factory's map, in the form this version wants."""
    import inspect

    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    from sglang_patch import backend

    monkeypatch.setattr(backend, "EtapMLABackend", lambda *a, **k: "single")
    monkeypatch.setattr(backend, "EtapMultiStepDraftBackend", lambda *a, **k: "multi-step")
    monkeypatch.setattr(plugin, "_allow_draft_extend_graph", lambda: None)
    factory = DraftBackendFactory.__new__(DraftBackendFactory)
    factory.draft_model_runner = None
    factory.topk, factory.speculative_num_steps = 1, 3
    maps = []

    def original(self, backend_name, backend_map, error_template, stamps_children=False):
        maps.append(backend_map)

    unhooked = inspect.unwrap(DraftBackendFactory._create_backend)
    is_stamped = "stamps_children" in inspect.signature(unhooked).parameters
    original.__signature__ = inspect.signature(unhooked)
    theirs = {"flashmla": getattr(factory, f"_create_flashmla_{kind}_backend")}
    plugin._create_draft_backend(original, factory, "decode_attention_backend", theirs, "error")
    made = maps[0]["etap"]()
    expected = "multi-step" if kind == "decode" else "single"
    assert made == (("etap", expected) if is_stamped else expected)
    assert "etap" not in theirs


def test_draft_extend_may_be_captured(plugin, monkeypatch):
    """SGLang asks for the class of a few backends; the check must be there, and find ours."""
    import inspect
    import sys
    import unittest.mock

    from sglang.srt.speculative import eagle_worker_v2

    source = inspect.getsource(eagle_worker_v2)
    assert "graph_supported_backend_types.append(FlashMLABackend)" in source
    # FlashMLA's kernels, which its module imports, need a GPU.
    for name in (
        "sgl_kernel",
        "sgl_kernel.flash_mla",
        "flash_mla",
        "flash_mla.flash_mla_interface",
    ):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, unittest.mock.MagicMock())
    plugin._allow_draft_extend_graph()
    from sglang.srt.layers.attention.flashmla_backend import FlashMLABackend

    from sglang_patch.backend import EtapMLABackend

    assert issubclass(EtapMLABackend, FlashMLABackend)
    assert FlashMLABackend not in EtapMLABackend.__mro__
