"""The cells of the decode benchmark and the presets that list them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

HEAD_DIM_CKV = 512
HEAD_DIM_KPE = 64
TOKEN_WIDTH = HEAD_DIM_CKV + HEAD_DIM_KPE
TOKEN_BYTES = 2 * TOKEN_WIDTH  # bf16 and fp16 alike
# Bytes a cached token, by the names of the compiled variants' caches.
CACHE_TOKEN_BYTES = {"same": TOKEN_BYTES, "fp8": TOKEN_WIDTH, "flashmla_656": 656}
LARGEST_CELL_BYTES = 40 * 10**9

LENGTH_DISTRIBUTIONS = ("equal", "uniform", "zipf", "one_long")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape of the benchmark.

    Parameters
    ----------
    batch : int
        Requests.
    context : int
        Cached tokens of each request, its queries among them; of the longest request for
        varied lengths.
    heads : int
        Query heads.
    q_len : int
        Query tokens of each request; causal when it is above 1.
    page_size : int
        Tokens a page.
    dtype : str
        "bf16" or "fp16", of queries and output.
    lengths : str
        "equal": every request has ``context`` tokens. "uniform": from 1 to ``context``. "zipf":
        exponent 1, from 1 to ``context``. "one_long": one request of ``context`` among requests
        of at most 1,024.
    kv_cache : str
        "same": elements of ``dtype``. "fp8": e4m3, a plain cast with scales of 1.
        "flashmla_656": FlashMLA's layout of e4m3, scales and bf16.
    """

    batch: int
    context: int
    heads: int = 16
    q_len: int = 1
    page_size: int = 64
    dtype: str = "bf16"
    lengths: str = "equal"
    kv_cache: str = "same"

    def __post_init__(self) -> None:
        for field in ("batch", "context", "heads", "q_len", "page_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.dtype not in ("bf16", "fp16"):
            raise ValueError(f'dtype must be "bf16" or "fp16", got {self.dtype!r}')
        if self.lengths not in LENGTH_DISTRIBUTIONS:
            raise ValueError(f"lengths must be one of {LENGTH_DISTRIBUTIONS}, got {self.lengths!r}")
        if self.kv_cache not in CACHE_TOKEN_BYTES:
            raise ValueError(
                f"kv_cache must be one of {tuple(CACHE_TOKEN_BYTES)}, got {self.kv_cache!r}"
            )
        if self.context < self.q_len:
            raise ValueError(f"context {self.context} holds fewer tokens than q_len {self.q_len}")

    def request_lengths(self, seed: int) -> list[int]:
        """Cached tokens of each request, drawn from ``seed`` when they vary."""
        if self.lengths == "equal":
            return [self.context] * self.batch
        generator = np.random.default_rng(seed)
        if self.lengths == "uniform":
            drawn = generator.integers(1, self.context + 1, self.batch)
        elif self.lengths == "zipf":
            drawn = np.exp(generator.uniform(0, math.log(self.context), self.batch)).astype(
                np.int64
            )
        else:
            drawn = generator.integers(1, min(1024, self.context) + 1, self.batch)
            drawn[generator.integers(self.batch)] = self.context
        return [max(int(length), self.q_len) for length in drawn]

    @property
    def kv_dtype(self) -> str:
        """Of the cache, as the evidence names it: "bf16", "fp16", "fp8_e4m3" or "flashmla_656"."""
        return {"same": self.dtype, "fp8": "fp8_e4m3"}.get(self.kv_cache, self.kv_cache)

    @property
    def token_bytes(self) -> int:
        """Bytes of a cached token."""
        return CACHE_TOKEN_BYTES[self.kv_cache]

    def nominal_bytes(self) -> int:
        """Bytes of a bf16 cache of ``context`` tokens for each request."""
        return self.batch * self.context * TOKEN_BYTES

    def as_case(self) -> dict[str, int | str]:
        """What a case of the evidence says of its cell."""
        return {
            "batch": self.batch,
            "context": self.context,
            "heads": self.heads,
            "q_len": self.q_len,
            "page_size": self.page_size,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
        }

    def label(self) -> str:
        """A short name for progress lines and messages."""
        text = (
            f"{self.batch} x {self.context}, {self.heads} heads, q {self.q_len}, "
            f"page {self.page_size}, {self.dtype}"
        )
        if self.kv_cache != "same":
            text = f"{text}, {self.kv_cache} cache"
        return text if self.lengths == "equal" else f"{text}, {self.lengths} lengths"


def product(
    batches: Iterable[int],
    contexts: Iterable[int],
    heads: Iterable[int] = (16,),
    q_lens: Iterable[int] = (1,),
    page_sizes: Iterable[int] = (64,),
    dtypes: Iterable[str] = ("bf16",),
    kv_caches: Iterable[str] = ("same",),
) -> list[Cell]:
    """Every combination, without the cells above ``LARGEST_CELL_BYTES``."""
    cells = [
        Cell(*values, kv_cache=kv_cache)
        for *values, kv_cache in itertools.product(
            batches, contexts, heads, q_lens, page_sizes, dtypes, kv_caches
        )
    ]
    return [cell for cell in cells if cell.nominal_bytes() <= LARGEST_CELL_BYTES]


K = 1024
ALL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ALL_CONTEXTS = tuple(K * k // 2 for k in (1, 2, 4, 8, 16, 32, 64, 128, 256))


def _rows_grid() -> list[Cell]:
    batches, contexts = (1, 16, 64), (1 * K, 8 * K, 64 * K)
    return (
        product(batches, contexts, heads=(8, 32, 64, 128))
        + product(batches, contexts, q_lens=(2, 4))
        + product((16,), (64 * K,), heads=(64,), q_lens=(4,))
    )


def _varied_grid() -> list[Cell]:
    return [
        Cell(64, 64 * K, lengths="zipf"),
        Cell(64, 64 * K, lengths="uniform"),
        Cell(128, 64 * K, lengths="one_long"),
    ]


def _issue2_grid() -> list[Cell]:
    return (
        product((16,), ALL_CONTEXTS[:-1])
        + product((1, 4, 64), (1 * K, 8 * K, 64 * K))
        + product((16,), (1 * K, 16 * K), heads=(8, 32, 64, 128))
        + product((16,), (4 * K,), heads=(6, 24))
        + product((16,), (1 * K, 64 * K), dtypes=("fp16",))
        + product((16,), (4 * K, 16 * K), q_lens=(2, 4))
        + product((16,), (8 * K, 16 * K), page_sizes=(1, 16))
    )


def _fp8_grid() -> list[Cell]:
    """The batches and contexts over which the bar for an fp8 cache takes its mean."""
    return product((1, 4, 16, 64, 128), (1 * K, 4 * K, 16 * K, 64 * K), kv_caches=("fp8",))


def _issue5_grid() -> list[Cell]:
    return (
        _fp8_grid()
        + product((16,), (16 * K, 64 * K), heads=(64, 128), kv_caches=("fp8",))
        + product((16,), (16 * K,), page_sizes=(1, 16), kv_caches=("fp8",))
        + product((16,), (64 * K,), dtypes=("fp16",), kv_caches=("fp8",))
        + product((16,), (1 * K, 16 * K, 64 * K), kv_caches=("flashmla_656",))
    )


def _fixed_split_grid() -> list[Cell]:
    """Where batch-invariant calls are timed beside others, and the bar for them takes its mean."""
    return product((1, 4, 16, 64), (1 * K, 8 * K, 64 * K))


PRESETS = {
    "quick": lambda: product((1, 16), (1 * K, 8 * K)) + product((16,), (64 * K,)),
    "issue2": _issue2_grid,
    "batch-context": lambda: product(ALL_BATCHES, ALL_CONTEXTS),
    "rows": _rows_grid,
    "pages": lambda: product((1, 16), (8 * K, 64 * K), page_sizes=(1, 16, 64)),
    "varied": _varied_grid,
    "fixed-split": _fixed_split_grid,
    "issue4": lambda: (
        product(ALL_BATCHES, ALL_CONTEXTS)
        + _varied_grid()
        + _rows_grid()
        + product((1, 16), (8 * K, 64 * K), page_sizes=(1, 16))
        + product((16,), (1 * K, 64 * K), dtypes=("fp16",))
    ),
    "fp8": _fp8_grid,
    "issue5": _issue5_grid,
}


def preset(name: str) -> list[Cell]:
    """The cells of a preset, each once, in the order in which they are to be measured."""
    if name not in PRESETS:
        raise ValueError(f"grid must be one of {sorted(PRESETS)}, got {name!r}")
    return measuring_order(PRESETS[name]())


def measuring_order(cells: Sequence[Cell]) -> list[Cell]:
    """Each cell once: bf16 before fp16 and then "same" before the others, because a change refills
    the pool; small before large within these.

    A run that is cut short then has lost its most expensive cells only.
    """
    kinds = list(CACHE_TOKEN_BYTES)
    return sorted(
        dict.fromkeys(cells),
        key=lambda cell: (cell.dtype, kinds.index(cell.kv_cache), cell.nominal_bytes()),
    )
