"""Inputs of a benchmark cell: one pool of random pages, cut into cache sets that calls use in turn.

Successive calls read different sets, as the layers of a model do: each layer has its own pages and
all share one page table. The sets together are several times the L2 cache, so every call finds its
cache cold.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from etap_flashinfer import quantization

from .grid import HEAD_DIM_CKV, TOKEN_BYTES, TOKEN_WIDTH, Cell

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# DeepSeek's head dimension before absorption is 128 + 64.
SM_SCALE = 192**-0.5
ROTATED_BYTES = 240 * 10**6  # more than four times the L2 of an H200
POOL_BYTES = 9_800 * 10**6  # sets of a cell, unless one set alone is larger
FEWEST_CALLS = 16  # below this the launch of the graph would show
MOST_CALLS = 512
REFERENCE_TOKENS = 300_000
REFERENCE_REQUESTS = 4


@dataclasses.dataclass
class Inputs:
    """Tensors of one cell.

    Attributes
    ----------
    caches : list of Tensor
        For each call ``[pages, page_size, 576]`` of ``dtype`` or float8_e4m3fn, or
        ``[pages, page_size, 656]`` of FlashMLA's layout.
    wide_caches : list of Tensor
        Caches of ``dtype`` with the same values, for peers that read no fp8.
    queries : Tensor
        ``[calls, batch * q_len, heads, 576]``.
    qo_indptr, kv_indptr : Tensor
        int32 ``[batch + 1]``.
    kv_indices : Tensor
        int32, the pages of all requests in random order.
    kv_lens : Tensor
        int32 ``[batch]``.
    block_table : Tensor
        int32 ``[batch, most pages of a request]``: the same pages for peers that take a table.
    lengths : list of int
        ``kv_lens`` on the host.
    """

    cell: Cell
    caches: list[torch.Tensor]
    wide_caches: list[torch.Tensor]
    queries: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_lens: torch.Tensor
    block_table: torch.Tensor
    lengths: list[int]

    @property
    def calls(self) -> int:
        """Calls in one timed graph."""
        return len(self.caches)

    @property
    def causal(self) -> bool:
        return self.cell.q_len > 1

    @property
    def bytes_read(self) -> int:
        """Bytes of cache that one call has to read."""
        return sum(self.lengths) * self.cell.token_bytes

    def latents(self, request: int) -> torch.Tensor:
        """Tokens of a request as the last call's cache holds them, ``[length, 576]`` float64."""
        length = self.lengths[request]
        pages = self.block_table[request, : -(-length // self.cell.page_size)].long()
        cache = self.caches[-1]
        if self.cell.kv_cache == "fp8":
            codes = cache.view(torch.uint8)[pages].flatten(0, 1)[:length]
            return quantization.dequantize_fp8_e4m3(codes, dtype=torch.float64)
        if self.cell.kv_cache == "flashmla_656":
            packed = cache.view(torch.uint8)[pages].flatten(0, 1)[:length]
            return quantization.dequantize_flashmla_656(packed, dtype=torch.float64)
        return cache[pages].flatten(0, 1)[:length].double()


def pages_of(lengths: list[int], page_size: int) -> list[int]:
    """Pages that each request needs."""
    return [-(-length // page_size) for length in lengths]


def set_bytes(cell: Cell, seed: int) -> int:
    """Bytes of pool that one call of ``cell`` needs: the cache in ``dtype``, with fp8 as well."""
    return sum(pages_of(cell.request_lengths(seed), cell.page_size)) * cell.page_size * TOKEN_BYTES


def calls_of(cell: Cell, seed: int) -> int:
    """How many calls, each on its own cache, one timed graph holds."""
    bytes_of_set = set_bytes(cell, seed)
    bytes_of_cache = bytes_of_set // TOKEN_BYTES * cell.token_bytes
    wanted = max(FEWEST_CALLS, -(-ROTATED_BYTES // bytes_of_cache))
    return max(1, min(wanted, MOST_CALLS, POOL_BYTES // bytes_of_set))


class Pool:
    """Device memory for the caches of every cell, filled with normal random data for each dtype.

    The caches of an fp8 cell lie in memory of their own, made when there is one: they are what its
    part of the pool quantises to, and that part then holds what they are worth.
    """

    def __init__(self, size_in_bytes: int, seed: int, device: str = "cuda"):
        self._storage = torch.empty(size_in_bytes, dtype=torch.uint8, device=device)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._device = device
        self._filled_as: str | None = None
        self._holds_quantized = False
        self._fp8_storage = torch.empty(0, dtype=torch.uint8, device=device)

    def elements(self, dtype: str, for_fp8: bool = False) -> torch.Tensor:
        """The whole pool as one row of random elements of ``dtype``.

        ``for_fp8``: parts of it may hold, and after this will hold, values that went through fp8.
        """
        elements = self._storage.view(DTYPES[dtype])
        if self._filled_as != dtype or (self._holds_quantized and not for_fp8):
            for chunk in elements.split(1 << 28):
                chunk.normal_(generator=self._generator)
            self._filled_as = dtype
        self._holds_quantized = for_fp8
        return elements

    def _quantized(self, cell: Cell, wide: list[torch.Tensor]) -> list[torch.Tensor]:
        """fp8 caches of the same values as ``wide``, which is rounded to them."""
        shape = (*wide[0].shape[:2], cell.token_bytes)
        size = math.prod(shape)
        if self._fp8_storage.numel() < len(wide) * size:
            self._fp8_storage = self._fp8_storage.new_empty(0)  # give the old back first
            self._fp8_storage = self._fp8_storage.new_empty(len(wide) * size)
        caches = [
            self._fp8_storage[call * size : (call + 1) * size].view(shape)
            for call in range(len(wide))
        ]
        caches = [cache.view(quantization.FP8_DTYPE) for cache in caches]
        for cache, values in zip(caches, wide, strict=True):
            if cell.kv_cache == "flashmla_656":
                packed = quantization.quantize_flashmla_656(values).cache
                cache.view(torch.uint8).copy_(packed)
                values.copy_(quantization.dequantize_flashmla_656(packed, values.dtype))
            else:
                cache.copy_(values)  # a plain cast: normal values stay far below 448
                values.copy_(cache)
        return caches

    def inputs(self, cell: Cell, seed: int, calls: int | None = None) -> Inputs:
        """Inputs of a cell for ``calls`` calls, by default as many as a timed graph needs.

        Lengths come from ``seed``, the rest from the pool's generator.
        """
        lengths = cell.request_lengths(seed)
        pages = pages_of(lengths, cell.page_size)
        total_pages = sum(pages)
        calls = calls_of(cell, seed) if calls is None else calls
        set_elements = total_pages * cell.page_size * TOKEN_WIDTH
        elements = self.elements(cell.dtype, for_fp8=cell.kv_cache != "same")
        wide = [
            elements[call * set_elements : (call + 1) * set_elements].view(
                total_pages, cell.page_size, TOKEN_WIDTH
            )
            for call in range(calls)
        ]
        caches = wide if cell.kv_cache == "same" else self._quantized(cell, wide)
        kv_indices = torch.randperm(
            total_pages, generator=self._generator, device=self._device
        ).int()
        block_table = torch.zeros(cell.batch, max(pages), dtype=torch.int32, device=self._device)
        for request, own in enumerate(kv_indices.split(pages)):
            block_table[request, : own.numel()] = own
        queries = torch.empty(
            calls,
            cell.batch * cell.q_len,
            cell.heads,
            TOKEN_WIDTH,
            dtype=DTYPES[cell.dtype],
            device=self._device,
        ).normal_(generator=self._generator)
        page_ends = torch.tensor([0, *pages]).cumsum(0)
        return Inputs(
            cell=cell,
            caches=caches,
            wide_caches=wide,
            queries=queries,
            qo_indptr=(torch.arange(cell.batch + 1) * cell.q_len).int().to(self._device),
            kv_indptr=page_ends.int().to(self._device),
            kv_indices=kv_indices,
            kv_lens=torch.tensor(lengths, dtype=torch.int32, device=self._device),
            block_table=block_table,
            lengths=lengths,
        )


def split_token(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent part (512) and the rope part (64) of a ``[..., 576]`` tensor, as views."""
    return tensor[..., :HEAD_DIM_CKV], tensor[..., HEAD_DIM_CKV:]


def reference_requests(lengths: list[int]) -> list[int]:
    """Requests to compare with float64: the longest, then spread over the batch while cheap."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    spread = [step * len(lengths) // REFERENCE_REQUESTS for step in range(REFERENCE_REQUESTS)]
    chosen: list[int] = []
    for request in dict.fromkeys([longest, *spread, len(lengths) - 1]):
        if not chosen or sum(lengths[r] for r in [*chosen, request]) <= REFERENCE_TOKENS:
            chosen.append(request)
    return chosen


def exact_output(inputs: Inputs, request: int) -> torch.Tensor:
    """Softmax attention of one request of the last call, ``[q_len, heads, 512]``, in float64."""
    cell = inputs.cell
    length = inputs.lengths[request]
    tokens = inputs.latents(request)
    first = request * cell.q_len
    queries = inputs.queries[-1, first : first + cell.q_len].double()
    scores = torch.einsum("qhd,td->qht", queries, tokens) * SM_SCALE
    if inputs.causal:
        last_visible = torch.arange(length - cell.q_len, length, device=tokens.device)
        hidden = torch.arange(length, device=tokens.device)[None, :] > last_visible[:, None]
        scores.masked_fill_(hidden[:, None, :], -torch.inf)
    return torch.einsum("qht,td->qhd", scores.softmax(-1), tokens[:, :HEAD_DIM_CKV])
