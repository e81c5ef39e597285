"""The kernel's index tensors, filled on the GPU by one launch a step."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PAGES_PER_PROGRAM = 1024


@dataclass
class EtapMetadata:
    """What one step's attention calls need: the kernel's index tensors, and the query length.

    ``kv_len_arr`` has one entry a request, and so says how many there are; the others may be
    longer. ``query_len`` is the number of queries of every request, None where they differ in it.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor
    query_len: int | None


@triton.jit(do_not_specialize=["added_tokens"])  # type: ignore[untyped-decorator]
def _fill_kernel(  # type: ignore[no-untyped-def]
    req_to_token,
    req_pool_indices,
    seq_lens,
    kv_indices,
    kv_len_arr,
    added_tokens,
    req_to_token_stride,
    pages_per_request,
    kv_len_arr_stride,
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    STEPS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    request = tl.program_id(0)
    length = tl.load(seq_lens + request).to(tl.int32) + added_tokens
    if tl.program_id(1) == 0:
        for step in tl.static_range(STEPS):
            tl.store(kv_len_arr + step * kv_len_arr_stride + request, length + step)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_pages = tl.minimum(tl.cdiv(length + (STEPS - 1), PAGE_SIZE), pages_per_request)
    mask = page < num_pages
    # The pool's rows may lie more than 2^31 elements apart.
    row = tl.load(req_pool_indices + request).to(tl.int64) * req_to_token_stride
    token = tl.load(req_to_token + row + page.to(tl.int64) * PAGE_SIZE, mask=mask, other=0)
    target = request.to(tl.int64) * pages_per_request + page
    tl.store(kv_indices + target, token // PAGE_SIZE, mask=mask)


class IndexBuffers:
    """Index tensors of fixed size and address, as a CUDA graph needs them.

    Each request has a row of ``kv_indices`` as long as the longest request may need, so that
    ``kv_indptr`` and ``qo_indptr`` never change. Entries behind a request's pages are left as they
    are: the kernel does not read them.

    Parameters
    ----------
    max_requests : int
        Rows.
    req_to_token : torch.Tensor
        SGLang's table of cache slots, int32, shape ``[requests of the pool, tokens]``.
    page_size : int
        Tokens of a page.
    query_lens : set of int
        Query lengths that will be asked for.
    steps : int
        Lengths of each request: one for every step of a multi-step draft, else 1.
    """

    def __init__(
        self,
        max_requests: int,
        req_to_token: torch.Tensor,
        page_size: int,
        query_lens: set[int],
        steps: int = 1,
    ) -> None:
        self.max_requests = max_requests
        self._req_to_token = req_to_token
        self._page_size = page_size
        self._steps = steps
        self._pages_per_request = -(-req_to_token.shape[1] // page_size)
        # Made by arange and full, never by a product of int32: rows x pages may pass 2^31, which
        # must be an error here and not a negative offset in the kernel.
        total_pages = max_requests * self._pages_per_request
        if total_pages >= 2**31:
            raise ValueError(
                f"{max_requests} requests of {self._pages_per_request} pages of {page_size} tokens "
                "are more than the kernel can index (2^31); use a larger page size, fewer running "
                "requests or a shorter context"
            )
        device = req_to_token.device
        # Page 0, the dummy page, until a fill: there is no index that must not be read.
        self._kv_indices = torch.zeros(total_pages, dtype=torch.int32, device=device)
        self._kv_indptr = torch.arange(
            0, total_pages + 1, self._pages_per_request, dtype=torch.int32, device=device
        )
        self._kv_len_arr = torch.ones((steps, max_requests), dtype=torch.int32, device=device)
        self._qo_indptr = {
            query_len: torch.arange(
                0, max_requests * query_len + 1, query_len, dtype=torch.int32, device=device
            )
            for query_len in query_lens
        }

    def fill(
        self, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, added_tokens: int = 0
    ) -> None:
        """Write pages and lengths of a batch: one launch, nothing is read by the host.

        Parameters
        ----------
        req_pool_indices, seq_lens : torch.Tensor
            Row of ``req_to_token`` and length of each request, int32 or int64, shape ``[batch]``.
        added_tokens : int
            Added to every length; step ``i`` adds ``i`` more.
        """
        batch_size = seq_lens.shape[0]
        if batch_size == 0:
            return
        if batch_size > self.max_requests:
            raise ValueError(f"got {batch_size} requests; made for {self.max_requests}")
        grid = (batch_size, triton.cdiv(self._pages_per_request, _PAGES_PER_PROGRAM))
        _fill_kernel[grid](
            self._req_to_token,
            req_pool_indices,
            seq_lens,
            self._kv_indices,
            self._kv_len_arr,
            added_tokens,
            self._req_to_token.stride(0),
            self._pages_per_request,
            self._kv_len_arr.stride(0),
            PAGE_SIZE=self._page_size,
            STEPS=self._steps,
            BLOCK=_PAGES_PER_PROGRAM,
        )

    def metadata(self, batch_size: int, query_len: int, step: int = 0) -> EtapMetadata:
        """The tensors of the first ``batch_size`` requests, as views."""
        return EtapMetadata(
            self._qo_indptr[query_len],
            self._kv_indptr,
            self._kv_indices,
            self._kv_len_arr[step, :batch_size],
            query_len,
        )

    def extend_metadata(self, query_lens: torch.Tensor) -> EtapMetadata:
        """The tensors of as many requests as there are query lengths, which may differ."""
        batch_size = query_lens.shape[0]
        qo_indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=query_lens.device)
        torch.cumsum(query_lens, 0, dtype=torch.int32, out=qo_indptr[1:])
        kv_len_arr = self._kv_len_arr[0, :batch_size]
        return EtapMetadata(qo_indptr, self._kv_indptr, self._kv_indices, kv_len_arr, None)
