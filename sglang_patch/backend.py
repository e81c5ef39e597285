"""SGLang's MLA backend with decode, verify, draft-extend and draft decode on the ETAP kernel."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
from sglang.srt.runtime_context import get_parallel

from etap_flashinfer import dispatch, execution, jit

from . import compat
from .metadata import EtapMetadata, IndexBuffers


@functools.cache
def _workspace(device: torch.device, num_bytes: int) -> torch.Tensor:
    """Room for partial results, shared by the backends of a device: they run one after another."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _is_served(forward_mode: Any) -> bool:
    """Whether a batch goes to the ETAP kernel rather than to the parent."""
    return bool(
        forward_mode.is_decode_or_idle()
        or forward_mode.is_target_verify()
        or forward_mode.is_draft_extend_v2()
    )


class EtapMLABackend(FlashInferMLAAttnBackend):  # type: ignore[misc]
    """MLA on Hopper GPUs: prefill by FlashInfer, everything else by the ETAP kernel.

    Plain decode, EAGLE/MTP target verify, draft-extend and the steps of a multi-step draft read
    the paged cache through the ETAP kernel; ``EXTEND``, ``MIXED`` and every other mode go to
    :class:`FlashInferMLAAttnBackend`. Page table and lengths are written on the GPU by one launch a
    step. That launch stays outside the captured graph: SGLang's scheduler may change
    ``req_to_token`` as soon as a graph replays.

    SGLang fills an fp8 cache by plain casts, so its scales are 1, and the kernel reads it as it is.
    FlashInfer, to attend to a cached prefix in the absorbed form (SGLang's choice for prefixes of
    fewer than 8,192 tokens), would convert the whole pool in every layer; with an fp8 cache the
    kernel attends there too.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's.
    skip_prefill : bool
        Whether this is one step of a multi-step draft, which never prefills.
    kv_indptr_buf, q_indptr_decode_buf : torch.Tensor, optional
        As for the parent.

    Raises
    ------
    ValueError
        If the model, the cache or an option of the server is one that ETAP does not serve; the
        message says what to use instead.
    etap_flashinfer.jit.EtapJitError
        If the GPU is not a Hopper GPU, or the kernel can't be compiled or loaded.
    """

    # Lengths are read on the GPU. Prefill batches carry their copy on the host in any case.
    needs_cpu_seq_lens: bool = False
    forward_metadata: Any  # the parent's for prefill, else EtapMetadata

    def __init__(
        self,
        model_runner: Any,
        skip_prefill: bool = False,
        kv_indptr_buf: torch.Tensor | None = None,
        q_indptr_decode_buf: torch.Tensor | None = None,
    ) -> None:
        super().__init__(model_runner, skip_prefill, kv_indptr_buf, q_indptr_decode_buf)
        config = model_runner.model_config
        self.num_local_heads = config.num_attention_heads // get_parallel().attn_tp_size
        self.num_draft_tokens: int = (
            compat.speculative_setting(model_runner, "speculative_num_draft_tokens") or 0
        )
        refusal = self._refusal(model_runner)
        if refusal is not None:
            raise ValueError(f"--attention-backend etap: {refusal}")
        self.data_type = model_runner.kv_cache_dtype
        self.q_data_type = model_runner.dtype
        self._is_fp8 = self.data_type != self.q_data_type
        self.is_draft_runner = model_runner.is_draft_worker
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self._query_lens = {1, self.num_draft_tokens or 1}
        self._load_kernels()
        self._extend_metadata: EtapMetadata | None = None
        self._graph_index: IndexBuffers | None = None
        self._eager_index: IndexBuffers | None = None
        self._tree_mask: Any = None

    def _refusal(self, model_runner: Any) -> str | None:
        """Say why this server can't be served; None if it can."""
        config = model_runner.model_config
        refusal = compat.cache_dtype_refusal(model_runner.kv_cache_dtype)
        refusal = refusal or dispatch.etap_problem_refusal(
            self.num_local_heads,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            model_runner.dtype,
            model_runner.kv_cache_dtype,
        )
        refusal = refusal or compat.prefill_backend_refusal(model_runner.server_args)
        topk = compat.speculative_setting(model_runner, "speculative_eagle_topk") or 1
        if refusal is None and topk > 1:
            refusal = (
                f"--speculative-eagle-topk is {topk}, and the kernel verifies chains of draft "
                "tokens, not trees; allowed: 1"
            )
        if refusal is None and get_parallel().attn_dcp_size > 1:
            refusal = (
                "decode context parallelism is not supported; use --attention-backend flashmla"
            )
        if refusal is None and compat.translates_pages(self):
            refusal = "the unified memory pool (virtual page indices) is not supported"
        return refusal

    def _load_kernels(self) -> None:
        """Load the variants for all query lengths: compiled, if need be, at start."""
        device = self.req_to_token.device
        kv_cache: dispatch.KvCache = "fp8" if self._is_fp8 else "same"
        row_tiles: dict[int | None, int] = {
            query_len: dispatch.choose_row_tile(self.num_local_heads, query_len, kv_cache)
            for query_len in self._query_lens
        }
        if self._is_fp8 and not self.skip_prefill:
            row_tiles[None] = dispatch.row_tiles(kv_cache)[-1]  # prefill
        modules = {
            row_tile: jit.get_etap_mla_module(
                jit.EtapMlaVariant(
                    self.q_data_type,
                    row_tile,
                    dispatch.choose_kv_loader(self.page_size),
                    kv_cache,
                )
            )
            for row_tile in set(row_tiles.values())
        }
        num_bytes = max(module.workspace_bytes(device.index) for module in modules.values())
        workspace = _workspace(device, num_bytes)
        kernels = {}
        for row_tile, module in modules.items():
            # Not shared: each backend, a step of a draft too, has lengths of its own.
            kept = execution.make_kept_memory(module.kept_bytes(device.index), device)
            kernels[row_tile] = functools.partial(module.run, workspace, kept)
        self._kernels: dict[int | None, Callable[..., None]] = {
            query_len: kernels[row_tile] for query_len, row_tile in row_tiles.items()
        }

    # Metadata

    def _make_index(self, max_requests: int) -> IndexBuffers:
        return IndexBuffers(max_requests, self.req_to_token, self.page_size, self._query_lens)

    def _eager_index_of(self, batch_size: int) -> IndexBuffers:
        """Index tensors for batches without a graph, grown in powers of two: they soon stay."""
        index = self._eager_index
        if index is None or index.max_requests < batch_size:
            index = self._eager_index = self._make_index(1 << max(batch_size - 1, 0).bit_length())
        return index

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Fill the index tensors of a batch that runs without a CUDA graph."""
        forward_mode = forward_batch.forward_mode
        if not _is_served(forward_mode):
            super().init_forward_metadata(forward_batch)
            self._extend_metadata = None
            if self._is_fp8 and not self.forward_metadata.use_ragged:
                self._extend_metadata = self._fill_for_extend(forward_batch)
            return
        index = self._eager_index_of(forward_batch.batch_size)
        seq_lens = forward_batch.seq_lens
        if forward_mode.is_draft_extend_v2():
            # Every window is padded to num_draft_tokens, and counted from where it starts.
            seq_lens = seq_lens - forward_batch.extend_seq_lens
            self._fill(index, forward_batch, seq_lens, self.num_draft_tokens)
        else:
            self._fill(index, forward_batch, seq_lens, self._verified_tokens(forward_mode))

    def _fill_for_extend(self, forward_batch: Any) -> EtapMetadata:
        """Fill the index tensors of a prefill batch; its lengths count the new tokens."""
        batch_size = forward_batch.batch_size
        index = self._eager_index_of(batch_size)
        seq_lens = forward_batch.seq_lens[:batch_size]
        index.fill(forward_batch.req_pool_indices[:batch_size], seq_lens)
        return index.extend_metadata(seq_lens - forward_batch.extend_prefix_lens[:batch_size])

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fill the index tensors that a captured graph reads, before capture and each replay."""
        forward_mode = forward_batch.forward_mode
        if not _is_served(forward_mode):
            super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
            return
        # The lengths of a captured draft-extend contain the padded window already.
        added = self._verified_tokens(forward_mode)
        self._fill(self._graph_index, forward_batch, forward_batch.seq_lens, added)

    def _verified_tokens(self, forward_mode: Any) -> int:
        """Tokens in the cache that a batch's lengths do not count."""
        return self.num_draft_tokens if forward_mode.is_target_verify() else 0

    def _fill(
        self, index: IndexBuffers | None, forward_batch: Any, seq_lens: torch.Tensor, added: int
    ) -> None:
        assert index is not None, "init_cuda_graph_state was not called"
        batch_size, forward_mode = forward_batch.batch_size, forward_batch.forward_mode
        index.fill(forward_batch.req_pool_indices[:batch_size], seq_lens[:batch_size], added)
        query_len = 1 if forward_mode.is_decode_or_idle() else self.num_draft_tokens
        self.forward_metadata = index.metadata(batch_size, query_len)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs read; the parent's own buffers are not needed."""
        self._graph_index = self._make_index(max_bs)
        if self.num_draft_tokens and not self.skip_prefill and not self.is_draft_runner:
            self._tree_mask = compat.make_tree_mask(
                max_bs, max_num_tokens, self.max_context_len, self.num_draft_tokens, self.device
            )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a padded request, which reads one token of the dummy page."""
        return 1

    # The mask that SGLang writes while it drafts. It is never read here, because a chain's mask is
    # the causal one, but without it SGLang asks for the sum of all lengths on the host.

    @property
    def verify_mask(self) -> Any:
        """SGLang 0.5.17 and later."""
        return self._tree_mask

    def get_verify_buffers_to_fill_after_draft(self) -> list[Any]:
        """SGLang 0.5.16."""
        return [self._tree_mask, None]

    # Attention

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new tokens' cache entries and attend, one query a request.

        Parameters
        ----------
        q : torch.Tensor
            Queries, ``[tokens, heads, 512]`` with ``q_rope``, else ``[tokens, heads * 576]``.
        k, v : torch.Tensor, optional
            New cache entries, ``[tokens, 1, 512]`` with ``k_rope``, else ``k`` has all 576 columns.
        layer : RadixAttention
            SGLang's layer.
        forward_batch : ForwardBatch
            SGLang's batch.
        save_kv_cache : bool
            Whether the new entries are written to the cache.
        q_rope, k_rope : torch.Tensor, optional
            The last 64 columns, where the model keeps them apart.

        Returns
        -------
        torch.Tensor
            Shape ``[tokens, heads * 512]``.
        """
        metadata: EtapMetadata = self.forward_metadata
        return self._write_and_attend(
            metadata, q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope
        )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> Any:
        """Verify or extend a draft, several causal queries a request; prefill by the parent.

        With an fp8 cache, prefill that attends to latents in the pool is served here too.
        Parameters and result are those of :meth:`forward_decode`.
        """
        metadata: EtapMetadata | None = None
        if _is_served(forward_batch.forward_mode):
            metadata = self.forward_metadata
        elif layer.v_head_dim == dispatch.HEAD_DIM_CKV:  # else keys and values are given, per head
            metadata = self._extend_metadata
        arguments = (q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope)
        if metadata is None:
            return super().forward_extend(*arguments)
        return self._write_and_attend(metadata, *arguments)

    def _write_and_attend(
        self,
        metadata: EtapMetadata,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        q_rope: torch.Tensor | None,
        k_rope: torch.Tensor | None,
    ) -> torch.Tensor:
        if k is not None and save_kv_cache:
            location = compat.write_location(forward_batch)
            if k_rope is not None:
                self.token_to_kv_pool.set_mla_kv_buffer(layer, location, k, k_rope)
            else:
                self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        heads, columns = layer.tp_q_head_num, layer.v_head_dim
        if q_rope is None:
            query = q.view(-1, heads, layer.head_dim)
            q_nope, q_pe = query[..., :columns], query[..., columns:]
        else:
            q_nope = q.view(-1, heads, columns)
            q_pe = q_rope.view(-1, heads, layer.head_dim - columns)
        return self._attend(metadata, q_nope, q_pe, layer)

    def _attend(
        self, metadata: EtapMetadata, q_nope: torch.Tensor, q_pe: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        batch_size, query_len = metadata.kv_len_arr.shape[0], metadata.query_len
        # Prefill may pad its queries: rows that are no request's are not written.
        if query_len is not None and q_nope.shape[0] != batch_size * query_len:
            raise ValueError(
                f"got {q_nope.shape[0]} queries; planned: {batch_size} requests of {query_len}"
            )
        columns = layer.v_head_dim
        # [slots, 1, 576] as [pages, page_size, 576], a view whatever the strides.
        slots = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        cache = slots.squeeze(1).unflatten(0, (-1, self.page_size))
        if self._is_fp8:
            cache = cache.view(torch.uint8)
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
        if batch_size and q_nope.shape[0]:
            self._kernels[query_len](
                q_nope,
                q_pe,
                cache[..., :columns],
                cache[..., columns:],
                metadata.qo_indptr,
                metadata.kv_indptr,
                metadata.kv_indices,
                metadata.kv_len_arr,
                out,
                None,
                query_len != 1,
                layer.scaling,
                False,
                1.0,  # the cache's scales: SGLang's fp8 cache is a plain cast
                1.0,
                0,  # no fixed split
            )
        return out.view(-1, layer.tp_q_head_num * columns)


class EtapMultiStepDraftBackend:
    """The decode steps of a multi-step draft (EAGLE/MTP with one chain).

    Step ``i`` writes the cache entry of the token it is given and sees ``i + 1`` tokens more than
    the batch's lengths say. All steps share one page table, and one launch fills every length.

    Parameters
    ----------
    model_runner : ModelRunner
        SGLang's runner of the draft model.
    topk : int
        Must be 1.
    speculative_num_steps : int
        Steps of the draft. The last one's token needs no attention of its own.

    Raises
    ------
    ValueError
        If ``topk`` is not 1.
    """

    needs_cpu_seq_lens: bool = False

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        if topk > 1:
            raise ValueError(
                f"--attention-backend etap: --speculative-eagle-topk is {topk}; allowed: 1"
            )
        self.attn_backends = [
            EtapMLABackend(model_runner, skip_prefill=True)
            for _ in range(speculative_num_steps - 1)
        ]
        self._req_to_token = model_runner.req_to_token_pool.req_to_token
        self._page_size = model_runner.page_size
        self._graph_index: IndexBuffers | None = None
        self._eager_index: IndexBuffers | None = None

    def _make_index(self, max_requests: int) -> IndexBuffers:
        steps = len(self.attn_backends)
        return IndexBuffers(max_requests, self._req_to_token, self._page_size, {1}, steps)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Fill the index tensors of all steps of a batch that runs without a CUDA graph."""
        index, batch_size = self._eager_index, forward_batch.batch_size
        if index is None or index.max_requests < batch_size:
            index = self._eager_index = self._make_index(1 << max(batch_size - 1, 0).bit_length())
        self._fill(index, forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Fill the index tensors that the captured steps read."""
        assert self._graph_index is not None, "init_cuda_graph_state was not called"
        self._fill(self._graph_index, forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing: see :class:`EtapMLABackend`."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what the captured steps read."""
        self._graph_index = self._make_index(max_bs)

    def _fill(self, index: IndexBuffers, forward_batch: Any) -> None:
        batch_size = forward_batch.batch_size
        index.fill(
            forward_batch.req_pool_indices[:batch_size],
            forward_batch.seq_lens[:batch_size],
            added_tokens=1,
        )
        for step, backend in enumerate(self.attn_backends):
            backend.forward_metadata = index.metadata(batch_size, query_len=1, step=step)
