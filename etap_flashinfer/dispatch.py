"""What the ETAP kernel serves, and which of its compiled variants serves a call best."""

import math
from typing import Literal

import torch

HEAD_DIM_CKV = 512
HEAD_DIM_KPE = 64
MAX_NUM_HEADS = 128
DTYPES = (torch.bfloat16, torch.float16)
# Of packed rows (query x head). 128: more than 64, in row tiles of 64 by a kernel of their own.
ROW_TILES = (8, 16, 32, 64, 128)
ROWS_ON_M = 64  # that fill WGMMA's M
# Token tiles, counted for each ROWS_ON_M rows, from which that kernel is the faster one: 31 for
# each of an H200's CTAs (scripts/TUNING.md). With fewer, its longer beginning and end show.
MIN_LONG_TILES = 4096
KvLoader = Literal["tma", "gather"]
# Of a compiled variant: a cache of the queries' type, of e4m3 codes, or in FlashMLA's layout.
KvCache = Literal["same", "fp8", "flashmla_656"]
KV_CACHE_OF_FORMAT: dict[str | None, KvCache] = {
    None: "same",
    "fp8_e4m3": "fp8",
    "flashmla_656": "flashmla_656",
}
HOPPER = (9, 0)

# The kernel's token tile, and the fewest rows of one page that a TMA copy box may hold.
TOKEN_TILE = 64
MIN_ROWS_PER_COPY = 8


def row_tiles(kv_cache: KvCache) -> tuple[int, ...]:
    """The row tiles that are compiled for a cache, ascending.

    An fp8 cache has no kernel of its own for more than 64 rows. With FlashMLA's layout, products of
    128 columns wait in registers for the scales of their tokens before they can be added; with 64
    rows these don't fit.
    """
    largest = {"same": 128, "fp8": 64, "flashmla_656": 32}[kv_cache]
    return tuple(row_tile for row_tile in ROW_TILES if row_tile <= largest)


def counts_as_long(num_tokens: int, num_rows: int) -> bool:
    """Whether a batch keeps the kernel busy for long.

    Parameters
    ----------
    num_tokens : int
        Cached tokens of all requests.
    num_rows : int
        Packed rows (query x head) of a request.
    """
    return num_tokens // TOKEN_TILE * -(-num_rows // ROWS_ON_M) >= MIN_LONG_TILES


def choose_row_tile(
    num_heads: int, query_len: int, kv_cache: KvCache = "same", is_long: bool = True
) -> int:
    """Choose the row tile, WGMMA's N, for requests of ``query_len`` queries.

    Any row tile gives a right result for any input; the smallest that holds the packed rows
    (query x head) of a request wastes the least, and several of the largest tile cover more. From
    64 on rows fill WGMMA's M, always 64 of them: 128 stands for the kernel of requests that have
    more (csrc/etap_mla_seesaw_math.cuh), which pays if they are long.

    Parameters
    ----------
    num_heads : int
        Query heads.
    query_len : int
        Longest query of the batch, or an estimate of it.
    kv_cache : str
        Of the variant.
    is_long : bool
        As :func:`counts_as_long` has it; True where nobody can know, as in CUDA graphs of a server.

    Returns
    -------
    int
        One of :func:`row_tiles`.
    """
    rows, tiles = num_heads * query_len, row_tiles(kv_cache)
    if not is_long:
        tiles = tuple(row_tile for row_tile in tiles if row_tile <= ROWS_ON_M)
    return next((row_tile for row_tile in tiles if rows <= row_tile), tiles[-1])


def choose_kv_loader(page_size: int) -> KvLoader:
    """Choose how the kernel reads the cache.

    TMA copies boxes of ``gcd(page_size, 64)`` tokens of one page, of at least 8 tokens each; every
    other page size is read token by token.
    """
    return "tma" if math.gcd(page_size, TOKEN_TILE) >= MIN_ROWS_PER_COPY else "gather"


def pages_of_smallest_part(page_size: int) -> int:
    """Pages that parts of batch-invariant calls have a multiple of: whole token tiles."""
    return TOKEN_TILE // math.gcd(page_size, TOKEN_TILE)


def etap_device_refusal(device: torch.device) -> str | None:
    """Say why the ETAP kernel can't run on ``device``; None if it can."""
    needed = "it runs on Hopper GPUs (compute capability 9.0)"
    if device.type != "cuda":
        return f"{needed}, not on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER:
        major, minor = capability
        return f"{needed}, and {device} has compute capability {major}.{minor}"
    return None


def etap_problem_refusal(
    num_heads: int,
    head_dim_ckv: int,
    head_dim_kpe: int,
    q_data_type: torch.dtype,
    kv_data_type: torch.dtype,
) -> str | None:
    """Say why the ETAP kernel can't serve such a problem on any device; None if it can."""
    if q_data_type not in DTYPES or kv_data_type not in (q_data_type, torch.float8_e4m3fn):
        return (
            f"got q_data_type {q_data_type} and kv_data_type {kv_data_type}; allowed: "
            "torch.bfloat16 or torch.float16, and a cache of the same or of torch.float8_e4m3fn"
        )
    if (head_dim_ckv, head_dim_kpe) != (HEAD_DIM_CKV, HEAD_DIM_KPE):
        return (
            f"got head_dim_ckv {head_dim_ckv} and head_dim_kpe {head_dim_kpe}; allowed: "
            f"{HEAD_DIM_CKV} and {HEAD_DIM_KPE}"
        )
    if not 1 <= num_heads <= MAX_NUM_HEADS:
        return f"got num_heads {num_heads}; allowed: 1 to {MAX_NUM_HEADS}"
    return None
