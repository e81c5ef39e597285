"""Problems for the tests of the wrapper, and their answer computed densely in float64.

Nothing here calls the package: the answer is independent of what it is compared with.
"""

import math
from dataclasses import dataclass, field

import torch

ATTENDS_TO_NOTHING = -math.inf


@dataclass
class PagedProblem:
    """A batch of requests with queries, a shuffled paged cache and its page table.

    Everything that no request may read is NaN: unused pages and the rest of each last page. What is
    listed beyond a request's last page is no page of the pool.
    """

    query_lens: list[int]
    kv_lens: list[int]
    num_heads: int = 4
    head_dim_ckv: int = 16
    head_dim_kpe: int = 8
    page_size: int = 4
    causal: bool = False
    sm_scale: float = 0.2
    dtype: torch.dtype = torch.bfloat16
    spare_pages: int = 1  # listed for each request beyond its last page
    indptr_tail: int = 0  # elements of both indptr beyond batch + 1
    seed: int = 0
    query: torch.Tensor = field(init=False)
    cache: torch.Tensor = field(init=False)
    qo_indptr: torch.Tensor = field(init=False)
    kv_indptr: torch.Tensor = field(init=False)
    kv_indices: torch.Tensor = field(init=False)
    kv_len_arr: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        used = [-(-length // self.page_size) for length in self.kv_lens]
        listed = [count + self.spare_pages for count in used]
        num_pages = sum(listed) + 3
        pages = torch.randperm(num_pages, generator=random)
        width = self.head_dim_ckv + self.head_dim_kpe
        shape = (sum(self.query_lens), self.num_heads, width)
        self.query = torch.randn(shape, generator=random).to(self.dtype)
        self.cache = torch.full((num_pages, self.page_size, width), math.nan, dtype=self.dtype)
        self.qo_indptr = self._offsets(self.query_lens)
        self.kv_indptr = self._offsets(listed)
        self.kv_indices = pages[: sum(listed)].int()
        self.kv_len_arr = torch.tensor(self.kv_lens, dtype=torch.int32)
        for request, length in enumerate(self.kv_lens):
            end = int(self.kv_indptr[request + 1])
            self.kv_indices[end - self.spare_pages : end] = 2**30
            for token in range(length):
                page, slot = self._place(request, token)
                self.cache[page, slot] = torch.randn(width, generator=random).to(self.dtype)

    def _offsets(self, lengths: list[int]) -> torch.Tensor:
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        return torch.tensor(offsets + [-7] * self.indptr_tail, dtype=torch.int32)

    def _place(self, request: int, token: int) -> tuple[int, int]:
        entry = int(self.kv_indptr[request]) + token // self.page_size
        return int(self.kv_indices[entry]), token % self.page_size

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four index tensors, in plan's order."""
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_len_arr

    @property
    def plan_arguments(self) -> dict[str, object]:
        """Arguments of plan, by name."""
        return {
            "qo_indptr": self.qo_indptr,
            "kv_indptr": self.kv_indptr,
            "kv_indices": self.kv_indices,
            "kv_len_arr": self.kv_len_arr,
            "num_heads": self.num_heads,
            "head_dim_ckv": self.head_dim_ckv,
            "head_dim_kpe": self.head_dim_kpe,
            "page_size": self.page_size,
            "causal": self.causal,
            "sm_scale": self.sm_scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q_nope, q_pe, ckv_cache, kpe_cache: strided views of two packed tensors."""
        split = self.head_dim_ckv
        return (
            self.query[..., :split],
            self.query[..., split:],
            self.cache[..., :split],
            self.cache[..., split:],
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and natural log-sum-exp in float64, one query and head at a time."""
        out = torch.zeros(*self.query.shape[:2], self.head_dim_ckv, dtype=torch.float64)
        lse = torch.full(self.query.shape[:2], ATTENDS_TO_NOTHING, dtype=torch.float64)
        row = 0
        for request, query_len in enumerate(self.query_lens):
            length = self.kv_lens[request]
            places = [self._place(request, token) for token in range(length)]
            for position in range(query_len):
                visible = length
                if self.causal:
                    visible = max(0, length - query_len + position + 1)
                if visible > 0:
                    keys = torch.stack([self.cache[place] for place in places[:visible]]).double()
                    for head in range(self.num_heads):
                        scores = self.sm_scale * (keys @ self.query[row, head].double())
                        out[row, head] = torch.softmax(scores, 0) @ keys[:, : self.head_dim_ckv]
                        lse[row, head] = torch.logsumexp(scores, 0)
                row += 1
        return out, lse
