"""What a random call looks like. A case is drawn from a seed and its number alone."""

from __future__ import annotations

import dataclasses
import random

from etap_flashinfer import dispatch

DTYPES = ("bf16", "fp16")
FLASHMLA_SHARE = 0.2  # of the cases with FlashMLA's fp8 cache
FP8_SHARE = 0.3  # with e4m3 codes and one scale
HEADS = (1, 2, 3, 6, 8, 9, 12, 16, 16, 16, 24, 32, 33, 64, 96, 127, 128)
PAGE_SIZES = (1, 1, 2, 3, 5, 8, 16, 24, 32, 48, 64, 64, 64, 96, 100, 128, 256)
BATCHES = (1, 1, 2, 2, 3, 4, 5, 7, 9, 16, 17, 33)
LARGE_BATCHES = (64, 133, 200, 400)
TOKEN_TILE = 64
# Of 64 parts, each 2,056 bytes a row, these take 132 MB, and more where row tiles are not full. The
# fuzzer's workspace has 512 MiB.
LARGEST_FIXED_SPLIT_ROWS = 1000
SM_SCALES = (192**-0.5, 192**-0.5, 192**-0.5, 576**-0.5, 1.0, -0.1, 0.0, 30.0, 90.0)

# How pages are given to requests; see tensors.page_table.
PAGES = ("scattered", "scattered", "ordered", "shared_prefix", "repeated")
# What the logits look like; see tensors.shape_logits.
LOGITS = ("normal", "normal", "normal", "zero", "equal", "one_hot", "sunk", "ramp")
# How far special logits stand from the others.
LOGIT_TARGETS = (3.0, 20.0, 300.0, 1e4, 3e4)
# Exponents of two by which ckv is scaled, and q_nope against it: into fp16's subnormals, out of
# fp16's range.
CKV_EXPONENTS = {"bf16": (0, 0, 0, 0, -40, 40), "fp16": (0, 0, 0, 0, -12, 8)}
# Of kpe, with scales; against ckv for queries of bf16. Further apart, queries lose what a row's
# largest value leaves no place for (QUERY_ROUNDOFF in compare.py).
KPE_EXPONENTS = {"bf16": (0, 0, 0, -10, 10), "fp16": (0, 0, 0, -8, 8)}
# A scale over the size of the values: a plain cast; all codes in use; few and most of them
# saturated; few but subnormal ones, and fewer still.
SCALE_FRACTIONS = (1.0, 1.0, 0.01, 2.0**-7, 2.0**-9, 2.0**6, 2.0**9)
# What is done to ckv for codes of all sizes; see tensors.spread_values and tensors.special_codes.
CODE_PATTERNS = ("plain", "plain", "tokens_apart", "columns_apart", "special")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How [first, second, 576] values lie in memory; NaN fills what is between them.

    ``fused`` is one buffer with both parts, pe in front of nope with ``pe_first``; else each part
    has a buffer of its own. Widths in elements, multiples of 8.
    """

    fused: bool
    pe_first: bool
    transposed: bool  # the second dimension outermost
    lead: int  # in front of each row
    tail: int  # behind it
    spare_rows: int  # of the inner dimension

    @staticmethod
    def draw(chosen: random.Random) -> Layout:
        padded = chosen.random() < 0.3
        return Layout(
            fused=chosen.random() < 0.6,
            pe_first=chosen.random() < 0.15,
            transposed=chosen.random() < 0.15,
            lead=8 * chosen.randrange(4) if padded else 0,
            tail=8 * chosen.randrange(12) if padded else 0,
            spare_rows=chosen.randrange(3) if padded else 0,
        )


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Of a cache of e4m3 with one scale for ckv and one for kpe."""

    ckv_scale: float = 1.0
    kpe_scale: float = 1.0
    kpe_exponent: int = 0  # as ckv_exponent
    pattern: str = "plain"  # of CODE_PATTERNS
    as_bytes: bool = False  # uint8 in place of float8_e4m3fn

    @staticmethod
    def draw(chosen: random.Random, dtype: str, ckv_exponent: int) -> Fp8:
        kpe_exponent = chosen.choice(KPE_EXPONENTS[dtype])
        if dtype == "bf16":
            kpe_exponent += ckv_exponent
        scales = [
            2.0**exponent
            * chosen.choice(SCALE_FRACTIONS)
            * (1.0 if chosen.random() < 0.5 else chosen.uniform(1, 2))
            for exponent in (ckv_exponent, kpe_exponent)
        ]
        pattern = chosen.choice(CODE_PATTERNS)
        return Fp8(*scales, kpe_exponent, pattern, chosen.random() < 0.5)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a case may be."""

    heads: int
    batch: int
    longest: int
    tokens: int  # of all requests
    scores: int  # query rows x tokens, of all requests


GPU_LIMITS = Limits(heads=128, batch=400, longest=150_000, tokens=200_000, scores=3 * 10**7)
CPU_LIMITS = Limits(heads=8, batch=5, longest=300, tokens=600, scores=3 * 10**5)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of plan and run."""

    seed: int
    number: int
    dtype: str
    kv_dtype: str  # that of the queries, "flashmla_656" or "fp8_e4m3"
    heads: int
    page_size: int
    causal: bool
    sm_scale: float
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    pages: str
    logits: str
    logit_target: float
    positive_ckv: bool
    ckv_exponent: int
    cache_layout: Layout
    query_layout: Layout
    out_tail: int  # elements between the rows of the output, in steps of 16 bytes
    index_on_host: bool
    graph_buffers: bool  # plan copies into buffers of a CUDA graph
    packed: bool  # query and kv_cache in place of four tensors, where the layouts allow it
    lse_base_e: bool
    validate: bool
    fixed_split_size: int | None  # pages
    fp8: Fp8 = Fp8()  # with kv_dtype "fp8_e4m3"
    counts_as_long: bool = False  # whatever the lengths: more than 64 rows have two kernels

    def describe(self) -> str:
        """The fields that matter most, in one line."""
        lengths = ",".join(map(str, self.kv_lens[:12])) + (",..." if len(self.kv_lens) > 12 else "")
        queries = sorted(set(self.q_lens))
        codes = ""
        if self.kv_dtype == "fp8_e4m3":
            scales = f"{self.fp8.ckv_scale:.4g}, {self.fp8.kpe_scale:.4g}"
            codes = f"codes {self.fp8.pattern} times {scales} "
        return (
            f"{self.dtype}/{self.kv_dtype} heads {self.heads} page {self.page_size} "
            f"q_lens {queries} {'causal ' if self.causal else ''}scale {self.sm_scale:.4g} "
            f"logits {self.logits} {self.logit_target:g} 2^{self.ckv_exponent} {codes}"
            f"pages {self.pages} split {self.fixed_split_size} lengths {lengths}"
        )


def draw_length(chosen: random.Random, page_size: int, longest: int) -> int:
    """A length: 0, 1, at the edge of a page or a token tile, or anything."""
    kind = chosen.random()
    if kind < 0.06:
        length = 0
    elif kind < 0.12:
        length = 1
    elif kind < 0.3:
        length = page_size * chosen.randint(1, 5) + chosen.choice((-1, 0, 1))
    elif kind < 0.55:
        length = TOKEN_TILE * chosen.randint(1, 9) + chosen.choice((-1, 0, 1))
    else:
        length = int(2 ** chosen.uniform(0, 11))
    return min(length, longest)


def _draw_lengths(chosen: random.Random, batch: int, page_size: int, limits: Limits) -> list[int]:
    kind = chosen.random()
    longest = 200 if batch in LARGE_BATCHES else 2048
    lengths = [draw_length(chosen, page_size, min(longest, limits.longest)) for _ in range(batch)]
    one = chosen.randrange(batch)
    if kind < 0.01 and limits.longest > 100_000:
        lengths[one] = chosen.randint(100_000, limits.longest)
    elif kind < 0.06:
        lengths[one] = min(int(2 ** chosen.uniform(11, 15)), limits.longest)
    left = limits.tokens
    for index, length in enumerate(lengths):
        lengths[index] = min(length, left)
        left -= lengths[index]
    return lengths


def _draw_query_lengths(chosen: random.Random, batch: int) -> list[int]:
    kind = chosen.random()
    if kind < 0.55:
        return [1] * batch
    if kind < 0.7:
        return [chosen.randint(2, 9)] * batch
    return [chosen.choice((0, 1, 1, 1, 2, 3, 4, 7, 9)) for _ in range(batch)]


def _draw_fixed_split(
    chosen: random.Random, page_size: int, heads: int, queries: int
) -> int | None:
    """A few parts' size, in pages; None mostly, and where 64 parts of each row take too much."""
    pages = dispatch.pages_of_smallest_part(page_size) * chosen.choice((1, 1, 2, 3, 8, 32))
    rows = queries * (next(n for n in (8, 16, 32, 64, 128) if heads <= n))
    return pages if chosen.random() < 0.2 and rows <= LARGEST_FIXED_SPLIT_ROWS else None


def draw_case(seed: int, number: int, limits: Limits) -> Case:
    """Draw case ``number`` of ``seed``; the same arguments give the same case."""
    chosen = random.Random(f"{seed}/{number}")
    dtype, heads = chosen.choice(DTYPES), min(chosen.choice(HEADS), limits.heads)
    page_size = chosen.choice(PAGE_SIZES)
    batch = chosen.choice(LARGE_BATCHES if chosen.random() < 0.03 else BATCHES)
    batch = min(batch, limits.batch)
    kv_lens = _draw_lengths(chosen, batch, page_size, limits)
    q_lens, scores = _draw_query_lengths(chosen, batch), 0
    for index, length in enumerate(kv_lens):
        if scores + q_lens[index] * heads * length > limits.scores:
            q_lens[index] = min(q_lens[index], 1)
        scores += q_lens[index] * heads * length
    if sum(q_lens) == 0:
        q_lens[0] = 1
    case = Case(
        seed=seed,
        number=number,
        dtype=dtype,
        kv_dtype=dtype,
        heads=heads,
        page_size=page_size,
        causal=chosen.random() < 0.5,
        sm_scale=chosen.choice(SM_SCALES),
        q_lens=tuple(q_lens),
        kv_lens=tuple(kv_lens),
        pages=chosen.choice(PAGES),
        logits=chosen.choice(LOGITS),
        logit_target=chosen.choice(LOGIT_TARGETS),
        positive_ckv=chosen.random() < 0.25,
        ckv_exponent=chosen.choice(CKV_EXPONENTS[dtype]),
        cache_layout=Layout.draw(chosen),
        query_layout=Layout.draw(chosen),
        out_tail=8 * chosen.randrange(5) if chosen.random() < 0.2 else 0,
        index_on_host=chosen.random() < 0.2,
        graph_buffers=chosen.random() < 0.2,
        packed=chosen.random() < 0.2,
        lse_base_e=chosen.random() < 0.3,
        validate=chosen.random() < 0.05,
        fixed_split_size=_draw_fixed_split(chosen, page_size, heads, sum(q_lens)),
    )
    # Drawn last, so that the rest of a case does not depend on the format.
    kind = chosen.random()
    case = dataclasses.replace(case, counts_as_long=int(kind * 1e6) % 2 == 0)
    if kind < FLASHMLA_SHARE:
        return dataclasses.replace(case, kv_dtype="flashmla_656")
    if kind < FLASHMLA_SHARE + FP8_SHARE:
        fp8 = Fp8.draw(chosen, dtype, case.ckv_exponent)
        return dataclasses.replace(case, kv_dtype="fp8_e4m3", fp8=fp8)
    return case
