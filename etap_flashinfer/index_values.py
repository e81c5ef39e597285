"""The values of index tensors, checked where they are: what ``plan(validate=True)`` does.

The kernel clamps whatever these tensors hold, so that nothing outside the buffers is read or
written, but it cannot report. Here the values are compared on their device with plain PyTorch, and
one small tensor is copied to the host.
"""

import os
from dataclasses import dataclass

import torch

from . import validation

VALIDATE_ENV = "ETAP_FLASHINFER_VALIDATE"


def is_wanted(validate: bool | None) -> bool:
    """Whether to check: the argument of ``plan`` if given, else the environment variable.

    Raises
    ------
    ValueError
        If the environment variable is neither empty, 0 nor 1.
    """
    if validate is not None:
        return validate
    value = os.environ.get(VALIDATE_ENV, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VALIDATE_ENV} is {value!r}; allowed: 0, 1")
    return value == "1"


@dataclass(frozen=True)
class CheckedIndex:
    """What ``run`` compares with its tensors: the index tensors as they were in ``plan``."""

    num_queries: int  # the end of qo_indptr
    highest_page: int  # of those that the lengths reach; -1 if there are none
    highest_page_request: int

    def check_run(self, num_queries: int | None, num_pages: int | None) -> None:
        """Compare with the number of queries and the pool's number of pages, where known.

        Raises
        ------
        ValueError
            If a request's queries or pages lie beyond them.
        """
        if num_queries is not None and self.num_queries > num_queries:
            raise ValueError(
                f"qo_indptr ends at {self.num_queries}; q_nope holds only {num_queries} queries"
            )
        if num_pages is not None and self.highest_page >= num_pages:
            raise ValueError(
                f"kv_indices gives request {self.highest_page_request} page {self.highest_page}; "
                f"the cache has pages 0 to {num_pages - 1}"
            )


def check(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len_arr: torch.Tensor,
    page_size: int | None,
    device: torch.device,
) -> CheckedIndex:
    """Check the values of the index tensors, which may lie on the CPU or on ``device``.

    Offsets must not decrease; those of the queries must start at 0, and those of the pages must end
    within ``kv_indices``. A length must be at least 0 and at most what the request's pages hold,
    and the pages that it reaches must not be negative. Copies once from the device to the host, and
    waits for that.

    Raises
    ------
    ValueError
        If the values are not so. The message names the first request for which they are not.
    RuntimeError
        If PyTorch's current stream is being captured: that allows no copy to the host.
    """
    index = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
    validation.check_index_tensors(*index, device)
    if not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size is {page_size!r}; it must be an int of at least 1")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "plan() can't validate while a CUDA graph is captured, because it copies to the host: "
            f"plan before the capture, or give validate=False ({VALIDATE_ENV} is for the others)"
        )
    if kv_len_arr.numel() == 0:
        return CheckedIndex(0, -1, 0)
    on_device = [tensor.to(device) for tensor in index]
    found = _compare(on_device[0], on_device[1], on_device[2], on_device[3], page_size).tolist()
    request, kind, *numbers = found[:-3]
    if request >= 0:
        raise ValueError(_message(request, kind, numbers, kv_indices.numel(), page_size))
    return CheckedIndex(*found[-3:])


def _compare(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len_arr: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """Eleven numbers: the first offending request or -1, what is wrong with it, its six numbers in
    the order of ``_message``, and the three of ``CheckedIndex``."""
    batch_size, num_entries = kv_len_arr.numel(), kv_indices.numel()
    queries, pages = qo_indptr[: batch_size + 1].long(), kv_indptr[: batch_size + 1].long()
    lengths = kv_len_arr.long()
    requests = torch.arange(batch_size, device=lengths.device)
    # Of each entry of kv_indices: whose it is, and whether that request's length reaches it.
    listed = kv_indices if num_entries else kv_indices.new_zeros(1)
    entries = torch.arange(listed.numel(), device=lengths.device)
    owner = torch.searchsorted(pages[1:], entries, right=True).clamp_(max=batch_size - 1)
    reached = pages[:-1] + (lengths + page_size - 1) // page_size
    is_used = entries >= pages[owner]
    is_used &= entries < torch.minimum(reached, pages[1:])[owner]
    is_negative = is_used & (listed < 0)

    offends = torch.stack(
        [
            (requests == 0) & (queries[:-1] != 0),
            queries[1:] < queries[:-1],
            (requests == 0) & (pages[:-1] < 0),
            pages[1:] < pages[:-1],
            pages[1:] > num_entries,
            lengths < 0,
            lengths > (pages[1:] - pages[:-1]) * page_size,
            torch.zeros_like(lengths).scatter_add_(0, owner, is_negative.long()) > 0,
        ],
        dim=1,
    )
    kinds = offends.shape[1]
    places = torch.arange(offends.numel(), device=lengths.device).view_as(offends)
    first = torch.where(offends, places, offends.numel()).min()
    request = (first // kinds).clamp(max=batch_size - 1)
    negative_entry = torch.where(is_negative & (owner == request), entries, entries[-1]).min()
    highest_page, highest_entry = torch.where(is_used, listed, -1).max(0)
    return torch.stack(
        [
            torch.where(first < offends.numel(), request, -1),
            first % kinds,
            queries[request],
            queries[request + 1],
            pages[request],
            pages[request + 1],
            lengths[request],
            listed[negative_entry].long(),
            queries[-1],
            highest_page.long(),
            owner[highest_entry],
        ]
    )


def _message(request: int, kind: int, numbers: list[int], num_entries: int, page_size: int) -> str:
    """What is wrong with a request; ``kind`` counts in the order of ``_compare``."""
    query_begin, query_end, page_begin, page_end, length, page = numbers
    num_pages = page_end - page_begin
    return (
        f"qo_indptr starts at {query_begin}; it must start at 0",
        f"qo_indptr falls from {query_begin} to {query_end} at request {request}; it must not "
        "decrease",
        f"kv_indptr starts at {page_begin}; it must start at 0 or above",
        f"kv_indptr falls from {page_begin} to {page_end} at request {request}; it must not "
        "decrease",
        f"kv_indptr is {page_end} behind request {request}; kv_indices has only {num_entries} "
        "elements",
        f"kv_len_arr is {length} for request {request}; it must be at least 0",
        f"kv_len_arr is {length} for request {request}, whose {num_pages} pages of {page_size} "
        f"tokens hold {num_pages * page_size}",
        f"kv_indices gives request {request} page {page}; pages count from 0",
    )[kind]
