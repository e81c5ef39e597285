"""The kernels that the benchmark runs side by side, each behind the same small interface.

A peer turns a cell's inputs into a function ``run(call)`` that launches call number ``call`` on the
current stream and returns its output. Everything that serving does once a batch and not once a
layer (planning, scheduler metadata) happens before, outside the timed graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from etap_flashinfer.quantization import FP8_DTYPE

from .grid import CACHE_TOKEN_BYTES, HEAD_DIM_CKV, HEAD_DIM_KPE, Cell
from .inputs import DTYPES, SM_SCALE, Inputs, split_token

WORKSPACE_BYTES = 128 * 1024 * 1024
RunCall = Callable[[int], torch.Tensor]


class Peer(Protocol):
    """One kernel under test; ``kv_caches`` are the caches, as cells name them, it is timed on."""

    name: str
    kv_caches: tuple[str, ...]

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
        dtype if cell.kv_cache == "same" else FP8_DTYPE,
    )


def plan_options(inputs: Inputs) -> dict[str, str]:
    """Arguments of ``plan`` by name: of ours alone, where FlashInfer reads no such cache."""
    kv_cache = inputs.cell.kv_cache
    return {"kv_cache_format": kv_cache} if kv_cache == "flashmla_656" else {}


def run_arguments(inputs: Inputs, call: int) -> tuple[tuple, dict[str, float]]:
    """Arguments of the wrappers' ``run`` for one call, by position and by name."""
    queries, cache = split_token(inputs.queries[call]), inputs.caches[call]
    if inputs.cell.kv_cache == "flashmla_656":
        return (*queries, cache, None), {}
    scales = {} if inputs.cell.kv_cache == "same" else {"ckv_scale": 1.0, "kpe_scale": 1.0}
    return (*queries, *split_token(cache)), scales


class WrapperPeer:
    """A ``BatchMLAPagedAttentionWrapper``: ours with "etap", FlashInfer's with "fa2" or "fa3"."""

    def __init__(
        self,
        name: str,
        wrapper_class: type,
        backend: str,
        kv_caches: tuple[str, ...] = ("same",),
        workspace_bytes: int = WORKSPACE_BYTES,
    ):
        self.name = name
        self.kv_caches = kv_caches
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device="cuda")
        self.wrapper = wrapper_class(workspace, backend=backend)

    def refuses(self, cell: Cell) -> str | None:
        if self.name == "flashinfer_fp8" and cell.dtype != "bf16":
            return f"FlashInfer reads an fp8 cache with bf16 queries only, not {cell.dtype}"
        return None

    def plan(self, inputs: Inputs) -> None:
        self.wrapper.plan(*plan_arguments(inputs), **plan_options(inputs))

    def prepare(self, inputs: Inputs) -> RunCall:
        self.plan(inputs)
        wrapper = self.wrapper
        q_nope, _ = split_token(inputs.queries[0])
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device="cuda")
        given = [run_arguments(inputs, call) for call in range(inputs.calls)]
        return lambda call: wrapper.run(*given[call][0], out=out, **given[call][1])


class FixedSplitPeer(WrapperPeer):
    """Ours, batch-invariant, with parts of ``tokens``; for the cells of "fixed-split"."""

    def __init__(self, wrapper_class: type, tokens: int):
        # 64 parts of 2,056 bytes for each row of 64 queries x 64 heads, and more.
        name = f"etap_fixed_split_{tokens}"
        super().__init__(name, wrapper_class, "etap", ("same", "fp8"), workspace_bytes=1 << 30)
        self.tokens = tokens

    def plan(self, inputs: Inputs) -> None:
        pages = self.tokens // inputs.cell.page_size
        self.wrapper.plan(*plan_arguments(inputs), fixed_split_size=pages)


class FlashMla:
    """FlashMLA's dense decode as SGLang calls it: ``sgl_kernel.flash_mla``.

    Beside an fp8 cache it reads one of ``dtype`` with the same values (for FlashMLA's own layout
    rounded to it: that of sgl_kernel reads it with sparse attention only).
    """

    name = "flashmla"
    kv_caches: tuple[str, ...] = ("same", "fp8", "flashmla_656")
    _is_fp8 = False

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
            inputs.kv_lens, cell.q_len * cell.heads, 1, is_fp8_kvcache=self._is_fp8
        )
        queries, caches, options = self._tensors(inputs)
        queries = queries.unflatten(1, (cell.batch, cell.q_len))

        def run(call: int) -> torch.Tensor:
            out, _ = self._decode(
                q=queries[call],
                k_cache=caches[call].unsqueeze(2),
                block_table=inputs.block_table,
                cache_seqlens=inputs.kv_lens,
                head_dim_v=HEAD_DIM_CKV,
                tile_scheduler_metadata=schedule,
                num_splits=num_splits,
                softmax_scale=SM_SCALE,
                causal=inputs.causal,
                **options,
            )
            return out

        return run

    def _tensors(
        self, inputs: Inputs
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        """Queries and caches of all calls, and further arguments."""
        return inputs.queries, inputs.wide_caches, {}


class FlashMlaFp8(FlashMla):
    """FlashMLA's dense decode on an fp8 cache, as SGLang calls it.

    It wants the queries in e4m3 as well. SGLang casts them, with scale 1, before every call; here
    that is done before the timed graph, which is to this peer's advantage.
    """

    name = "flashmla_fp8"
    kv_caches = ("fp8",)
    _is_fp8 = True

    def refuses(self, cell: Cell) -> str | None:
        if cell.dtype != "bf16":
            return f"FlashMLA's fp8 kernel writes bf16 only, not {cell.dtype}"
        return super().refuses(cell)

    def _tensors(
        self, inputs: Inputs
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        scale = torch.ones(1, dtype=torch.float32, device=inputs.queries.device)
        descale = {"descale_q": scale, "descale_k": scale}
        return inputs.queries.to(FP8_DTYPE), inputs.caches, descale


class FlashAttention3:
    """FlashAttention-3 with ``qv``, as SGLang calls it for MLA: ``sgl_kernel.flash_attn``."""

    name = "fa3"
    kv_caches = ("same",)

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

    wrapper_class = etap_flashinfer.BatchMLAPagedAttentionWrapper
    return WrapperPeer("etap", wrapper_class, "etap", tuple(CACHE_TOKEN_BYTES))


def _flashinfer(name: str, backend: str, kv_cache: str = "same") -> Peer:
    import flashinfer.mla

    wrapper_class = flashinfer.mla.BatchMLAPagedAttentionWrapper
    return WrapperPeer(name, wrapper_class, backend, (kv_cache,))


PEER_MAKERS: dict[str, Callable[[], Peer]] = {
    "etap": _etap,
    "flashinfer_fa2": lambda: _flashinfer("flashinfer_fa2", "fa2"),
    "flashinfer_fa3": lambda: _flashinfer("flashinfer_fa3", "fa3"),
    "flashmla": FlashMla,
    "fa3": FlashAttention3,
    "flashmla_fp8": FlashMlaFp8,
    "flashinfer_fp8": lambda: _flashinfer("flashinfer_fp8", "fa3", "fp8"),
}


def make_fixed_split_peers(sizes: Sequence[int]) -> list[Peer]:
    """ETAP, batch-invariant, with parts of each of ``sizes`` tokens."""
    import etap_flashinfer

    wrapper_class = etap_flashinfer.BatchMLAPagedAttentionWrapper
    return [FixedSplitPeer(wrapper_class, tokens) for tokens in sizes]


def make_peers(names: Sequence[str], report: Callable[[str], None]) -> list[Peer]:
    """Make each named peer; one that is not installed or fails is reported and left out."""
    peers: list[Peer] = []
    for name in names:
        try:
            peers.append(PEER_MAKERS[name]())
        except Exception as error:
            report(f"{name}: {type(error).__name__}: {error}")
    return peers


def build_modules(
    names: Sequence[str], cells: Sequence[Cell], report: Callable[[str], None]
) -> None:
    """Compile what the named peers will load for the cells, all of it in one parallel build.

    Left to themselves, the modules would be compiled one after the other at their first use; that
    still happens, and fails for itself, where this build fails.
    """
    from flashinfer.jit import build_jit_specs
    from flashinfer.jit.attention import gen_batch_mla_module

    from etap_flashinfer import jit

    kinds = {(DTYPES[cell.dtype], cell.kv_cache) for cell in cells}
    # FlashInfer's modules by peer: backend, cache and the dtypes of queries, cache and output.
    modules = [
        (f"flashinfer_{backend}", "same", (backend, dtype, dtype, dtype))
        for backend in ("fa2", "fa3")
        for dtype in DTYPES.values()
    ]
    bf16 = torch.bfloat16
    modules.append(("flashinfer_fp8", "fp8", ("fa3", bf16, FP8_DTYPE, bf16)))
    specs = [
        gen_batch_mla_module(*types, torch.int32, HEAD_DIM_CKV, HEAD_DIM_KPE, False)
        for name, kv_cache, types in modules
        if name in names and (types[1], kv_cache) in kinds
    ]
    if "etap" in names and not os.environ.get("ETAP_FLASHINFER_AOT_DIR"):
        variants = [v for v in jit.ALL_VARIANTS if (v.dtype, v.kv_cache) in kinds]
        specs += [jit.gen_etap_mla_module(variant) for variant in variants]
    try:
        build_jit_specs(specs)
    except RuntimeError as error:
        report(f"the build of all modules failed: {error}")
