"""The MLA wrapper: FlashInfer's interface over the ETAP kernel, stock FlashInfer or PyTorch."""

import functools
import logging
from typing import Any, Literal

import torch

from . import cache_format, dispatch, index_values, planning, stock, validation
from .cache_format import KvCacheFormat
from .execution import Executor
from .planning import IndexTensors, Plan

logger = logging.getLogger("etap_flashinfer")

BACKENDS = ("auto", "etap", *stock.BACKENDS, "reference")


@functools.cache
def _log_choice(backend: str, device: torch.device, reason: str) -> None:
    """Log what ``backend="auto"`` chose, once for each device and reason."""
    logger.info("backend='auto' on %s takes %s: %s", device, backend, reason)


class BatchMLAPagedAttentionWrapper:
    r"""Multi-head latent attention over a paged cache, as FlashInfer's wrapper of the same name.

    For each request, with all heads sharing one latent cache (the absorbed form of MLA):

    .. math::
        S = \mathrm{sm\_scale} \cdot [q_{nope} | q_{pe}] [ckv | kpe]^T, \quad
        O = \mathrm{softmax}(S)\, ckv

    On Hopper GPUs this is computed transposed, :math:`S^T = K Q^T` and :math:`O^T = V^T P^T`, so
    that tokens and not the few query rows fill the 64 rows of the tensor core instruction (ETAP,
    arXiv 2506.01969).

    A wrapper shares no mutable state with another, but for the workspace that it is given; calls on
    one wrapper, or on wrappers with one workspace, must not overlap.

    Parameters
    ----------
    float_workspace_buffer : torch.Tensor
        Contiguous workspace for partial results that are not kept in memory of the wrapper's own,
        128 MiB recommended. Its device is the wrapper's.
    use_cuda_graph : bool
        Whether ``plan`` copies the index tensors into the four buffers below, so that a captured
        graph finds them at fixed addresses. The batch size is then that of ``kv_len_arr``.
    qo_indptr, kv_indptr : torch.Tensor, optional
        Buffers, int32, shape ``[batch + 1]`` or longer, on the device.
    kv_indices : torch.Tensor, optional
        Buffer, int32, as long as the most pages ever planned.
    kv_len_arr : torch.Tensor, optional
        Buffer, int32, shape ``[batch]``.
    backend : str
        ``"auto"`` takes ETAP where it serves (Hopper; bf16 or fp16 queries with a cache of the same
        type or of fp8; head dimensions 512 and 64; 1 to 128 heads), stock FlashInfer elsewhere, and
        the reference on the CPU. ``"etap"``, ``"fa2"``, ``"fa3"`` and ``"cutlass"`` force a kernel,
        ``"reference"`` is plain PyTorch on any device.

    Attributes
    ----------
    backend : str
        The backend in use. With ``backend="auto"`` on a GPU it may be ``"auto"`` until ``plan`` has
        chosen.
    device : torch.device
        The workspace's device.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, or the device can't run the backend.

    Examples
    --------
    >>> import torch
    >>> from etap_flashinfer import BatchMLAPagedAttentionWrapper
    >>> batch_size, num_heads, page_size, num_pages = 2, 16, 64, 8
    >>> wrapper = BatchMLAPagedAttentionWrapper(torch.empty(1024, dtype=torch.uint8))
    >>> wrapper.backend
    'reference'
    >>> wrapper.plan(
    ...     torch.tensor([0, 1, 2], dtype=torch.int32),  # qo_indptr
    ...     torch.tensor([0, 2, 5], dtype=torch.int32),  # kv_indptr
    ...     torch.tensor([7, 0, 3, 2, 5], dtype=torch.int32),  # kv_indices
    ...     torch.tensor([100, 150], dtype=torch.int32),  # kv_len_arr
    ...     num_heads, 512, 64, page_size, False, 192**-0.5, torch.bfloat16, torch.bfloat16,
    ... )
    >>> query = torch.randn(batch_size, num_heads, 576, dtype=torch.bfloat16)
    >>> cache = torch.randn(num_pages, page_size, 576, dtype=torch.bfloat16)
    >>> out = wrapper.run(query[..., :512], query[..., 512:], cache[..., :512], cache[..., 512:])
    >>> out.shape
    torch.Size([2, 16, 512])
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
        validation.check_workspace(float_workspace_buffer)
        self.device = float_workspace_buffer.device
        self.backend = backend
        self._requested_backend = backend
        self._float_workspace_buffer = float_workspace_buffer
        self._workspace = float_workspace_buffer.reshape(-1).view(torch.uint8)
        self._use_cuda_graph = use_cuda_graph
        self._buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        self._graph_buffers: IndexTensors | None = None
        if use_cuda_graph and backend != "cutlass":
            self._graph_buffers = validation.checked_graph_buffers(*self._buffers, self.device)
        self._is_planned = False
        self._plan: Plan | None = None  # of ETAP or the reference
        self._checked_index: index_values.CheckedIndex | None = None  # of a plan with validate
        # Stock wrappers made so far, by backend, and the one that serves the current plan.
        self._stock_wrappers: dict[str, Any] = {}
        self._stock: Any = None
        self._executor = Executor(self._workspace)

        self._device_refusal = dispatch.etap_device_refusal(self.device)
        self._is_always_stock = backend in stock.BACKENDS
        if backend == "etap" and self._device_refusal:
            raise ValueError(
                f"backend 'etap': {self._device_refusal}; use backend='auto' or 'reference' here"
            )
        if self._is_always_stock and self.device.type == "cpu":
            raise ValueError(
                f"backend {backend!r} runs on GPUs, and the workspace is on the CPU; use "
                "backend='auto' or 'reference' here"
            )
        if backend == "auto" and self.device.type == "cpu":
            self.backend = "reference"
            _log_choice("reference", self.device, "the workspace is on the CPU")
        elif self._is_always_stock:
            self._use_stock(backend)
        elif backend == "auto" and self._device_refusal:
            self._is_always_stock = True
            self._use_stock("auto")

    def plan(
        self,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        num_heads: int | None = None,
        head_dim_ckv: int | None = None,
        head_dim_kpe: int | None = None,
        page_size: int | None = None,
        causal: bool | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        use_profiler: bool = False,
        *,
        metadata: Any = None,
        cum_seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        max_q_len: int | None = None,
        query_layout: Literal["packed", "split"] | None = None,
        kv_cache_layout: Literal["packed", "split"] | None = None,
        lse_mode: Literal["none", "base2", "basee"] = "none",
        output_dtype: torch.dtype | None = None,
        output_scale: Literal["none", "per-tensor"] = "none",
        scale_mode: Literal["default", "kv-per-tensor", "bmm-scalar", "bmm-tensor"] = "default",
        skip_softmax: bool = False,
        enable_pdl: bool | None = None,
        use_sinks: bool = False,
        validate: bool | None = None,
        kv_cache_format: KvCacheFormat | None = None,
        fixed_split_size: int | None = None,
    ) -> None:
        """Take the index tensors and the shape of the problem for the calls of ``run`` that follow.

        For ETAP nothing is copied from the GPU and no stream is synchronised (but once for each row
        tile of a wrapper, which then gets memory of its own): the kernel makes its schedule on the
        GPU from the index tensors as they are when it runs. It keeps the schedule, and takes it
        again in calls that find the same numbers in them. Index tensors on the wrapper's device are
        referenced, not copied (copied into the caller's buffers with ``use_cuda_graph``): their
        elements may change, their memory may not (``resize_``). Those on the CPU are copied to the
        device, and their values checked. As with FlashInfer, a pinned CPU tensor is copied
        asynchronously.

        Parameters
        ----------
        qo_indptr : torch.Tensor
            Offsets of each request's queries, int32, shape ``[batch + 1]`` or longer.
        kv_indptr : torch.Tensor
            Offsets of each request's pages in ``kv_indices``, int32, shape ``[batch + 1]`` or
            longer.
        kv_indices : torch.Tensor
            Page indices, int32, ``kv_indptr[batch]`` or more. With more than 64 rows (query x head)
            a request, its length decides between two kernels, one of which is faster if requests
            are short (:func:`~etap_flashinfer.dispatch.counts_as_long`); both serve any.
        kv_len_arr : torch.Tensor
            Cached tokens of each request, int32, shape ``[batch]``; its length is the batch size.
        num_heads, head_dim_ckv, head_dim_kpe, page_size : int
            Query heads, widths of the two parts of query and cache, tokens of a page.
        causal : bool
            Whether query ``i`` of a request sees only the tokens below
            ``kv_len - query_len + i + 1``.
        sm_scale : float
            Factor of the scores before the softmax: 1/sqrt(192) for DeepSeek, the head dimension
            before absorption.
        q_data_type, kv_data_type : torch.dtype
            Types of queries (and output) and of the cache: alike, or ``torch.float8_e4m3fn`` for an
            fp8 cache. The fp8 cache is read as it is; queries are not quantised.
        metadata : flashinfer.mla.MLAPlanMetadata, optional
            The four index tensors in one object, in their place.
        query_layout, kv_cache_layout : str, optional
            Accepted: ``run`` takes ``"packed"`` and ``"split"`` tensors with any plan.
        lse_mode : str
            With ``"base2"`` or ``"basee"``, ``run`` refuses the other base.
        output_dtype : torch.dtype, optional
            Accepted if it is ``q_data_type``.
        enable_pdl : bool, optional
            Accepted unless True: the kernel has its own way of launching.
        scale_mode : str
            ``"kv-per-tensor"`` is accepted with ``kv_cache_format="fp8_e4m3"``, which is the same.
        kv_cache_format : str, optional
            Not in FlashInfer's signature. How an fp8 cache is laid out: ``"fp8_e4m3"``, the default
            for ``kv_data_type=torch.float8_e4m3fn``, e4m3 codes with one scale for ckv and one for
            kpe, given to ``run``; or ``"flashmla_656"``, FlashMLA's 656 bytes a token (512 e4m3
            codes of ckv, four fp32 scales for 128 columns each, 64 bf16 of kpe), which ETAP and
            the reference read. :mod:`etap_flashinfer.quantization` makes both.
        fixed_split_size : int, optional
            Not in FlashInfer's signature of this wrapper; named and counted, in pages, as in its
            others. Makes calls batch-invariant: the bits of a request's output and LSE depend on
            the request alone, not on the rest of the batch or on the GPU's number of SMs. Requests
            are cut into parts of so many pages, which must make a multiple of 64 tokens, or of
            a multiple of that where there would be more than 64 parts; with a bf16 or fp16 cache
            and up to 16 heads 128, and a CTA joins those that it has, so that small ones do for
            every batch. Else small parts are faster for few requests and need more workspace.
            ``plan``, or ``run`` where ``qo_indptr`` is on the GPU, says how much if it is too
            little. Stock backends refuse it; ``"reference"`` is batch-invariant with and without.
        use_profiler, cum_seq_lens_q, block_tables, seq_lens, max_q_len, output_scale, \
skip_softmax, use_sinks
            Served by stock FlashInfer only: ``backend="auto"`` turns to it, ``"etap"`` and
            ``"reference"`` refuse.
        validate : bool, optional
            Whether to check the values of index tensors on the GPU too, with every backend: that
            offsets do not decrease and lengths and pages are possible. ``run`` then holds its
            queries and cache against them as they were here. This copies to the host and waits.
            The environment variable ``ETAP_FLASHINFER_VALIDATE=1`` turns it on where this is not
            given. Without it the kernel clamps what is out of range.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message says what was given and what is allowed.
        etap_flashinfer.jit.EtapJitError
            If the kernel can't be compiled or loaded.
        """
        index = {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_len_arr": kv_len_arr,
        }
        problem = {
            "num_heads": num_heads,
            "head_dim_ckv": head_dim_ckv,
            "head_dim_kpe": head_dim_kpe,
            "page_size": page_size,
            "causal": causal,
            "sm_scale": sm_scale,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }
        options = planning.given_options(
            {
                "use_profiler": use_profiler,
                "cum_seq_lens_q": cum_seq_lens_q,
                "block_tables": block_tables,
                "seq_lens": seq_lens,
                "max_q_len": max_q_len,
                "query_layout": query_layout,
                "kv_cache_layout": kv_cache_layout,
                "lse_mode": lse_mode,
                "output_dtype": output_dtype,
                "output_scale": output_scale,
                "scale_mode": scale_mode,
                "skip_softmax": skip_softmax,
                "enable_pdl": enable_pdl,
                "use_sinks": use_sinks,
            }
        )
        self._is_planned = False  # a plan that fails leaves none behind
        self._checked_index = None
        if self._is_always_stock:
            self._refuse_stock(kv_data_type, kv_cache_format, self._device_refusal)
            planning.refuse_fixed_split(fixed_split_size, self.backend, self._device_refusal)
        has_index = metadata is not None or any(tensor is not None for tensor in index.values())
        if index_values.is_wanted(validate) and (validate or has_index):
            self._checked_index = index_values.check(
                *planning.csr_tensors(index, metadata), page_size, self.device
            )
        if self._is_always_stock:
            self._plan_stock(index, metadata, problem, options)
            if self._requested_backend == "auto":
                self._log_stock(self._device_refusal)
            self._is_planned = True
            return
        # Most plans differ from the one before in their index tensors alone.
        key = None
        if metadata is None and not options:
            key = planning.problem_key(problem, kv_cache_format, fixed_split_size)
        alike = self._plan if key and self._plan and self._plan.problem_key == key else None
        refusal: str | None = None
        if alike is not None:
            checked = alike.problem
        else:
            checked = planning.checked_problem(problem, kv_cache_format, fixed_split_size)
            refusal = planning.refusal_of(
                checked, metadata, options, for_etap=self.backend != "reference"
            )
        if refusal is None:
            self._stock = None
            if self.backend != "reference":
                self.backend = "etap"
            given = planning.csr_tensors(index, metadata)
            plan = planning.make_plan(checked, lse_mode, given, self.device, self._graph_buffers)
            plan.problem_key = key
            if alike is not None:
                plan.take_over(alike)
            if self.backend == "etap":
                # Compiled, if need be, now and not in the first run, perhaps under graph capture.
                self._executor.kernel(plan, 1 if plan.max_query_len is None else plan.max_query_len)
                planning.check_fixed_split_workspace(plan, self._workspace)
            self._plan = plan
            if self._requested_backend == "auto" and self.backend == "etap":
                _log_choice("etap", self.device, "a Hopper GPU and a problem it serves")
        elif self._requested_backend == "auto" and self.backend != "reference":
            planning.refuse_fixed_split(fixed_split_size, "auto", refusal)
            self._refuse_stock(kv_data_type, kv_cache_format, refusal)
            self._use_stock("fa3" if kv_data_type == torch.float8_e4m3fn else "auto")
            self._plan_stock(index, metadata, problem, options)
            self._log_stock(refusal)
        else:
            raise ValueError(f"backend {self.backend!r}: {refusal}")
        self._is_planned = True

    def run(
        self,
        q_nope: torch.Tensor | None = None,
        q_pe: torch.Tensor | None = None,
        ckv_cache: torch.Tensor | None = None,
        kpe_cache: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        query: Any = None,
        kv_cache: Any = None,
        ckv_scale: float | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | None = None,
        sinks: torch.Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        bmm1_scale: float | torch.Tensor | None = None,
        bmm2_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend from the queries to the planned requests' tokens.

        The ETAP kernel runs on PyTorch's current stream of the wrapper's device and can be captured
        in a CUDA graph, which the wrapper must outlive. A query that sees no token gets output 0
        and LSE -inf.

        Parameters
        ----------
        q_nope, q_pe : torch.Tensor
            Queries, shapes ``[total queries, num_heads, head_dim_ckv]`` and
            ``[total queries, num_heads, head_dim_kpe]``. For ETAP these and the caches may be
            views: the last dimension contiguous, other strides multiples of 16 bytes, 16-byte
            aligned.
        ckv_cache, kpe_cache : torch.Tensor
            Cache, shapes ``[pages, page_size, head_dim_ckv]`` and
            ``[pages, page_size, head_dim_kpe]``. Of an fp8 cache, float8_e4m3fn or its bytes as
            uint8. With ``kv_cache_format="flashmla_656"`` ckv_cache is all of it,
            ``[pages, page_size, 656]`` or ``[pages, page_size, 1, 656]``, and kpe_cache None.
        out : torch.Tensor, optional
            Receives the output: shape of ``q_nope``, ``q_data_type``; a view as the queries may be.
            Made here if not given.
        lse : torch.Tensor, optional
            Receives the log-sum-exp: contiguous, float32, shape ``[total queries, num_heads]``.
        return_lse : bool
            Whether the log-sum-exp is returned too.
        return_lse_base_on_e : bool
            Whether it is the natural one; base 2 otherwise.
        query, kv_cache : torch.Tensor or pair of torch.Tensor
            In place of the first four: packed tensors ``[.., head_dim_ckv + head_dim_kpe]``, or
            the pairs; with ``kv_cache_format="flashmla_656"``, kv_cache is what ckv_cache is.
        ckv_scale, kpe_scale : float, optional
            Scales of an fp8 cache in the format ``"fp8_e4m3"``: a value is its code times the
            scale. 1.0 if not given (stock FlashInfer wants both). A captured graph keeps them.
        profiler_buffer, kv_len, page_table, o_scale, ckv_scale_arr, sinks, \
skip_softmax_threshold_scale_factor, bmm1_scale, bmm2_scale
            For stock FlashInfer's backends only; refused with others.

        Returns
        -------
        torch.Tensor or (torch.Tensor, torch.Tensor)
            The output, or output and log-sum-exp.

        Raises
        ------
        RuntimeError
            If ``plan`` has not been called, or has failed since.
        ValueError, TypeError
            If an argument is not as planned or as above; nothing has been launched then.
        """
        # Stock FlashInfer's cutlass backend alone runs without a plan.
        if not self._is_planned and self._requested_backend != "cutlass":
            raise RuntimeError("run() was called before plan(), or after a plan() that failed")
        if self._checked_index is not None:
            self._checked_index.check_run(_leading(q_nope, query), _leading(ckv_cache, kv_cache))
        options = (  # in the order of STOCK_RUN_OPTIONS
            *(profiler_buffer, kv_len, page_table, o_scale, ckv_scale_arr, sinks),
            *(skip_softmax_threshold_scale_factor, bmm1_scale, bmm2_scale),
        )
        if self._stock is not None:
            inputs = {
                "q_nope": q_nope,
                "q_pe": q_pe,
                "ckv_cache": ckv_cache,
                "kpe_cache": kpe_cache,
                "query": query,
                "kv_cache": kv_cache,
                "out": out,
                "lse": lse,
                "return_lse": return_lse,
                "return_lse_base_on_e": return_lse_base_on_e,
                "ckv_scale": ckv_scale,
                "kpe_scale": kpe_scale,
            }
            return self._run_stock(
                inputs | dict(zip(validation.STOCK_RUN_OPTIONS, options, strict=True))
            )
        plan = self._plan
        assert plan is not None
        problem = plan.problem
        validation.check_run_options(self.backend, options)
        scales = cache_format.checked_scales(problem, ckv_scale, kpe_scale)
        if query is not None:
            _check_not_both("query", q_nope, q_pe)
            q_nope, q_pe = validation.split_packed(
                "query", query, problem.head_dim_ckv, problem.head_dim_kpe
            )
        if kv_cache is not None:
            _check_not_both("kv_cache", ckv_cache, kpe_cache)
            ckv_cache, kpe_cache = cache_format.split_packed(problem, kv_cache)
        tensors = (q_nope, q_pe, ckv_cache, kpe_cache)
        return self._executor.run(
            plan,
            tensors,
            scales,
            out,
            lse,
            return_lse,
            return_lse_base_on_e,
            is_etap=self.backend == "etap",
        )

    def _refuse_stock(self, kv_data_type: Any, kv_cache_format: Any, refusal: str | None) -> None:
        """Refuse what stock FlashInfer would misread; ``refusal`` is why ETAP does not serve."""
        etap_refusal = refusal if self._requested_backend == "auto" else None
        cache_format.refuse_stock(
            kv_data_type, kv_cache_format, self._requested_backend, etap_refusal
        )

    def _use_stock(self, backend: str) -> None:
        """Take a stock wrapper, made where there is none yet, for the calls that follow."""
        if backend not in self._stock_wrappers:
            self._stock_wrappers[backend] = stock.make_wrapper(
                self._float_workspace_buffer, self._use_cuda_graph, self._buffers, backend
            )
        self._stock = self._stock_wrappers[backend]
        self.backend = getattr(self._stock, "_backend", backend)

    def _plan_stock(
        self,
        index: dict[str, Any],
        metadata: Any,
        problem: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        given = index | {"metadata": metadata} | problem
        arguments = {name: value for name, value in given.items() if value is not None}
        stock.call(self._stock.plan, arguments | options)
        self.backend = getattr(self._stock, "_backend", self.backend)  # "auto" has chosen by now

    def _log_stock(self, refusal: str | None) -> None:
        _log_choice(self.backend, self.device, f"stock FlashInfer, for ETAP: {refusal}")

    def _run_stock(self, given: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        arguments = {name: value for name, value in given.items() if value is not None}
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
        result = stock.call(self._stock.run, arguments)
        return result


def _leading(part: Any, packed: Any) -> int | None:
    """First dimension of the queries or the cache, in whichever way they were given."""
    value = packed if part is None else part
    tensor = value[0] if isinstance(value, tuple) and value else value
    return tensor.shape[0] if isinstance(tensor, torch.Tensor) and tensor.ndim else None


def _check_not_both(name: str, first: Any, second: Any) -> None:
    if first is not None or second is not None:
        raise TypeError(f"run() got both {name} and its two parts; give one of them")
