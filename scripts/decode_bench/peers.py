"""The kernels that the benchmark runs side by side, each behind the same small interface.

A peer turns a cell's inputs into a function ``run(call)`` that launches call number ``call`` on the
current stream and returns its output. Everything that serving does once a batch and not once a
layer (planning, scheduler metadata) happens before, outside the timed graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

from .grid import HEAD_DIM_CKV, HEAD_DIM_KPE, Cell
from .inputs import DTYPES, SM_SCALE, Inputs, split_token

WORKSPACE_BYTES = 128 * 1024 * 1024
RunCall = Callable[[int], torch.Tensor]


class Peer(Protocol):
    """One kernel under test."""

    name: str

    def refuses(self, cell: Cell) -> str | None:
        """Why the peer cannot serve the cell, or None."""

    def prepare(self, inputs: Inputs) -> RunCall:
        """Plan for the inputs and return the function that launches one call."""


def plan_arguments(inputs: Inputs) -> tuple:
    """Positional arguments of FlashInfer's ``plan``, which ours shares."""
    cell = inputs.cell
    dtype = DTYPES[cell.dtype]
    return (
        inputs.qo_indptr,
        inputs.kv_indptr,
        inputs.kv_indices,
        inputs.kv_lens,
        cell.heads,
        HEAD_DIM_CKV,
        HEAD_DIM_KPE,
        cell.page_size,
        inputs.causal,
        SM_SCALE,
        dtype,
        dtype,
    )


class WrapperPeer:
    """A ``BatchMLAPagedAttentionWrapper``: ours with "etap", FlashInfer's with "fa2" or "fa3"."""

    def __init__(self, name: str, wrapper_class: type, backend: str):
        self.name = name
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self.wrapper = wrapper_class(workspace, backend=backend)

    def refuses(self, cell: Cell) -> str | None:
        return None

    def plan(self, inputs: Inputs) -> None:
        self.wrapper.plan(*plan_arguments(inputs))

    def prepare(self, inputs: Inputs) -> RunCall:
        self.plan(inputs)
        wrapper = self.wrapper
        q_nope, _ = split_token(inputs.queries[0])
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device="cuda")
        arguments = [
            (*split_token(queries), *split_token(cache))
            for queries, cache in zip(inputs.queries, inputs.caches, strict=True)
        ]
        return lambda call: wrapper.run(*arguments[call], out=out)


class FlashMla:
    """FlashMLA's dense decode as SGLang calls it: ``sgl_kernel.flash_mla``."""

    name = "flashmla"

    def __init__(self) -> None:
        from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

        self._decode = flash_mla_with_kvcache
        self._metadata = get_mla_metadata

    def refuses(self, cell: Cell) -> str | None:
        if cell.page_size != 64:
            return f"FlashMLA takes pages of 64 tokens only, not {cell.page_size}"
        return None

    def prepare(self, inputs: Inputs) -> RunCall:
        cell = inputs.cell
        schedule, num_splits = self._metadata(
            inputs.kv_lens, cell.q_len * cell.heads, 1, is_fp8_kvcache=False
        )
        queries = inputs.queries.unflatten(1, (cell.batch, cell.q_len))

        def run(call: int) -> torch.Tensor:
            out, _ = self._decode(
                q=queries[call],
                k_cache=inputs.caches[call].unsqueeze(2),
                block_table=inputs.block_table,
                cache_seqlens=inputs.kv_lens,
                head_dim_v=HEAD_DIM_CKV,
                tile_scheduler_metadata=schedule,
                num_splits=num_splits,
                softmax_scale=SM_SCALE,
                causal=inputs.causal,
            )
            return out

        return run


class FlashAttention3:
    """FlashAttention-3 with ``qv``, as SGLang calls it for MLA: ``sgl_kernel.flash_attn``."""

    name = "fa3"

    def __init__(self) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._decode = flash_attn_with_kvcache

    def refuses(self, cell: Cell) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> RunCall:
        def run(call: int) -> torch.Tensor:
            q_nope, q_pe = split_token(inputs.queries[call])
            ckv, kpe = split_token(inputs.caches[call].unsqueeze(2))
            return self._decode(
                q=q_pe,
                k_cache=kpe,
                v_cache=ckv,
                qv=q_nope,
                page_table=inputs.block_table,
                cache_seqlens=inputs.kv_lens,
                cu_seqlens_q=inputs.qo_indptr,
                max_seqlen_q=inputs.cell.q_len,
                softmax_scale=SM_SCALE,
                causal=inputs.causal,
            )

        return run


def _etap() -> Peer:
    import etap_flashinfer

    return WrapperPeer("etap", etap_flashinfer.BatchMLAPagedAttentionWrapper, "etap")


def _flashinfer(backend: str) -> Peer:
    import flashinfer.mla

    return WrapperPeer(
        f"flashinfer_{backend}", flashinfer.mla.BatchMLAPagedAttentionWrapper, backend
    )


PEER_MAKERS: dict[str, Callable[[], Peer]] = {
    "etap": _etap,
    "flashinfer_fa2": lambda: _flashinfer("fa2"),
    "flashinfer_fa3": lambda: _flashinfer("fa3"),
    "flashmla": FlashMla,
    "fa3": FlashAttention3,
}


def make_peers(names: list[str], report: Callable[[str], None]) -> list[Peer]:
    """Make each named peer; one that is not installed or fails is reported and left out."""
    peers: list[Peer] = []
    for name in names:
        try:
            peers.append(PEER_MAKERS[name]())
        except Exception as error:
            report(f"{name}: {type(error).__name__}: {error}")
    return peers


def build_modules(names: list[str], dtypes: list[str], report: Callable[[str], None]) -> None:
    """Compile what the named peers will load, all of it in one parallel build.

    Left to themselves, the modules would be compiled one after the other at their first use; that
    still happens, and fails for itself, where this build fails.
    """
    from flashinfer.jit import build_jit_specs
    from flashinfer.jit.attention import gen_batch_mla_module

    from etap_flashinfer import jit

    torch_dtypes = [DTYPES[dtype] for dtype in dtypes]
    specs = []
    for backend in ("fa2", "fa3"):
        if f"flashinfer_{backend}" in names:
            specs += [
                gen_batch_mla_module(
                    backend, d, d, d, torch.int32, HEAD_DIM_CKV, HEAD_DIM_KPE, False
                )
                for d in torch_dtypes
            ]
    if "etap" in names and not os.environ.get("ETAP_FLASHINFER_AOT_DIR"):
        variants = [v for v in jit.ALL_VARIANTS if v.dtype in torch_dtypes]
        specs += [jit.gen_etap_mla_module(variant) for variant in variants]
    try:
        build_jit_specs(specs)
    except RuntimeError as error:
        report(f"the build of all modules failed: {error}")
