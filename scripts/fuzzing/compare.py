"""A result against float64, with a tolerance that follows from the arithmetic of the kernel.

Notation: ``u`` is the unit roundoff of the output's type (2^-8 for bf16, 2^-11 for fp16), S the
logits of a row, p = softmax(S), O = p V.

Where the error comes from, to first order, for one row:

1.  S. Products of two bf16 or fp16 numbers are exact in float32; 576 of them are summed in 36 steps
    of 16, each of which may cut off one unit of the last place of the sum so far. By Cauchy-Schwarz
    no partial sum exceeds |q_nope| |ckv| + |q_pe| |kpe|. So S is known to

        delta = |sm_scale| * SCORE_ROUNDOFF * (|q_nope| |ckv_t| + |q_pe| |kpe_t|)
                + LOGIT_ROUNDOFF * (|S_t| + max |S|) + EXP_ROUNDOFF

    with the second term for the scale, itself rounded to float32, the product with it and the
    subtraction of the maximum, and the third for exp2. At logits of 1e4 delta is about 0.2: the
    weights are then uncertain by a fifth, whoever computes in float32, and where two tokens compete
    so is O. Where one token has all the weight O is not uncertain at all.
    For e4m3 codes with one scale kpe is summed first, in 4 steps, and brought to the scale of ckv:
    what follows has its sum, not its norm, and there are a few roundings more. Queries are then
    fp16 numbers times a power of two, the largest of a row between 2^14 and 2^15: of others half
    the smallest subnormal number may be lost, 2^-39 of the largest.
2.  p. Weights 2^(S - max) are stored as a high and a low part of the type of the cache, hence
    rounded by u^2 of themselves; those of requests longer than two_part_tokens() as the high part
    alone, rounded by u. In fp16 either may lose half the smallest subnormal number. Those below the
    smallest normal float32 number are 0: seen where the row's heaviest token has a value of 0.
    For a cache in FlashMLA's layout, weights times scales are stored in fp16, for results of fp16
    in two parts, whatever the length: csrc/etap_mla_flashmla_scores.cuh says what is lost. For
    e4m3 codes with one scale the weights are e4m3 or fp16, and products may be cut off: codes.py.
3.  Sums over tokens, in float32 and in steps of 16: one unit of the last place a step.
4.  What CTAs that share a row tile have of O, stored in fp16 beside results of bf16: rounded by
    2^-11 of itself, and of small numbers half the smallest subnormal one may be lost, 2^-25, where
    a warp's largest number is at least 2^-8; else they are stored in float32. Summed with the
    parts' weights that is no more than 2^-11 of sum p |V| and, as the sum of a part's weights is
    between 1 and its tokens, 2^-25.
5.  O, rounded once to the output's type: the only error of an exact computation.

Two criteria bound the output. By element, with certainty: 1 to 4 at their worst, put through the
softmax, beside half a unit of the last place. And by RMSE over the rows whose weight rests on many
tokens (1 / sum p^2 of them): RMSE_BOUND times that of rounding alone, beside 1 and 3 as independent
errors of the tokens, which average out over them, and what is usually cut off of codes. The first
catches whatever is wrong by more than rounding anywhere, the second whatever is a little wrong
everywhere.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .cases import TOKEN_TILE
from .codes import Codes
from .tensors import HEAD_DIM_CKV, Group, Tensors

# RMSE over that of rounding O alone, and the tokens on which the weight of a row must rest to be
# held to it: for weights in two parts, and in one. One part is a second rounding of the size of the
# first where values average out, 1.41 together; below some hundred tokens the sample varies more
# than the bound leaves.
RMSE_BOUND = 1.15
MIN_PARTICIPATION = 16
RMSE_BOUND_ONE_PART = 1.5
MIN_PARTICIPATION_ONE_PART = 256
# kLongestSplitPRequest in csrc/etap_mla_traits.cuh (row tiles 8 and 16, then 32) and
# etap_mla_rows_traits.cuh (64).
TWO_PART_TOKENS = 1024
TWO_PART_TOKENS_MANY_ROWS = 512

SCORE_ROUNDOFF = 36 * 2.0**-23  # the tensor cores cut off: a whole unit of the last place a step
LOGIT_ROUNDOFF = 2.0**-23
EXP_ROUNDOFF = 2.0**-21
SUM_ROUNDOFF = 2.0**-24
PARTIAL_ROUNDOFF = 2.0**-11  # of O of a part, of requests of more than one token tile
PARTIAL_LOST = 2.0**-25  # at most, where the largest number may be as large as this:
PARTIAL_LEAST = 2.0**-8
FIXED_SUM_STEPS = 64  # over warps, parts of a split row tile and the normalisation
LSE_ROUNDOFF = 2.0**-22

# Of weights times scales with FlashMLA's layout, by the type of the output, and what may be lost of
# a token, over the largest value of its columns and the row's largest weight: half the smallest
# subnormal number over the least that the largest weight is stored as, 2^8, and the scales'
# reference may be twice the largest scale.
FLASHMLA_ROUNDOFF = {torch.bfloat16: 2.0**-11, torch.float16: 2.0**-22}
FLASHMLA_SMALLEST = 2.0**-32
SCALE_COLUMNS = 128

RMSE_BOUND_CODES = 1.15  # of codes with one scale, weights in parts
CODES_SCORE_ROUNDOFF = 40 * 2.0**-23
CODES_KPE_ROUNDOFF = 6 * 2.0**-23
CODES_LOGIT_ROUNDOFF = 3 * 2.0**-23  # the scale of ckv, too, is rounded and multiplied
QUERY_ROUNDOFF = 2.0**-39
CODES_TOKENS_PER_STEP = 8  # each tile may be brought to another reference, by a rounded factor

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The smallest subnormal number of a type.
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
# What may be lost of a weight, over the row's largest: all below float32's smallest normal number,
# or half the smallest subnormal one of fp16.
LOST_WEIGHT = {torch.bfloat16: 2.0**-126, torch.float16: SMALLEST[torch.float16] / 2}
# And of a sum of weights times codes, where each tile's is multiplied with a factor of its own; and
# of that sum times the scale of the codes.
LOST_SUM = 2.0**-126


@dataclasses.dataclass
class Exact:
    """A group's float64 result, ``[requests, rows, ..]`` with rows = queries x heads."""

    out: torch.Tensor
    lse: torch.Tensor  # natural
    out_bound: torch.Tensor  # elementwise: how far float32 and the rounding of p may lead
    arithmetic_bound: torch.Tensor  # the same without the rounding of p and of their products
    cut_square: torch.Tensor  # mean over columns of what is usually cut off of products, squared
    lse_bound: torch.Tensor
    participation: torch.Tensor  # 1 / sum p^2: tokens on which the weight rests
    uncertainty: torch.Tensor  # relative, of the sum of weights; the bounds mean little near 1


@dataclasses.dataclass
class Worst:
    """The largest errors of a case, over what is allowed; 0-dimensional tensors until read."""

    element: torch.Tensor | float = 0.0
    rmse: torch.Tensor | float = 0.0
    lse: torch.Tensor | float = 0.0
    rmse_over_rounding: torch.Tensor | float = 0.0  # not judged
    uncertainty: torch.Tensor | float = 0.0  # not judged

    def stacked(self) -> torch.Tensor:
        """All five as one tensor on the device, to read many cases with one copy."""
        return torch.stack([getattr(self, field.name) for field in dataclasses.fields(self)])

    def on_host(self) -> Worst:
        """The same as numbers; waits for the device."""
        return Worst(*self.stacked().tolist())

    def is_mismatch(self) -> bool:
        return not max(self.element, self.rmse, self.lse) <= 1.0


def two_part_tokens(heads: int, longest_query: int) -> int:
    """Longest request whose weights are sure to be stored in two parts.

    The wrapper takes the row tile for the longest query or for fewer queries, if it only knows
    their number.
    """
    is_small = heads * longest_query <= 16
    return TWO_PART_TOKENS if is_small else TWO_PART_TOKENS_MANY_ROWS


def _norms(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values[..., :HEAD_DIM_CKV].norm(dim=-1), values[..., HEAD_DIM_CKV:].norm(dim=-1)


def _visible(group: Group, causal: bool, heads: int) -> torch.Tensor:
    """Tokens that each row sees, ``[requests, rows, 1]``; 0 or less for none."""
    query = torch.arange(group.rows.shape[1], device=group.rows.device)
    count = group.kv_lens[:, None].expand(group.rows.shape)
    if causal:
        count = torch.minimum(count, (group.kv_lens - group.q_lens)[:, None] + query + 1)
    return count.repeat_interleave(heads, 1)[..., None]


def exact(
    queries: torch.Tensor,
    pool: torch.Tensor,
    group: Group,
    causal: bool,
    sm_scale: float,
    two_parts_up_to: int,
    is_flashmla: bool = False,
    codes: Codes | None = None,
) -> Exact:
    """Attend in float64 from dense ``queries`` to dense rows of ``pool``, and bound the error."""
    heads, device = queries.shape[1], queries.device
    visible = _visible(group, causal, heads)
    token = torch.arange(group.slots.shape[1], device=device)
    q = queries[group.rows].double().flatten(1, 2)
    k = pool[group.slots].double()
    # Rows of padding may be poison.
    k = torch.where((token < group.kv_lens[:, None])[..., None], k, 0.0)
    hidden = token >= visible

    scores = (q @ k.mT).mul_(sm_scale).masked_fill_(hidden, -math.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    divisor = total.masked_fill(total == 0, 1.0)

    delta = _score_error(q, k, codes is not None).mul_(abs(sm_scale))
    roundoff = LOGIT_ROUNDOFF if codes is None else CODES_LOGIT_ROUNDOFF
    delta += roundoff * (scores.abs().masked_fill_(hidden, 0.0) + top.abs()) + EXP_ROUNDOFF
    # By how much each weight may be larger (it can't be smaller by more), relative to their sum.
    growth = torch.exp(scores + delta - top).sub_(weights).div_(divisor)
    uncertainty = growth.sum(-1, keepdim=True)
    p = weights / divisor
    # |p'_t - p_t| for p' = (p + e) / (1 + sum e) and |e_t| <= growth_t.
    change = growth * (1 - p) + p * (uncertainty - growth)
    change /= (1 - uncertainty).clamp(min=0.05)
    tokens_per_step = 16 if codes is None else CODES_TOKENS_PER_STEP
    steps = visible.clamp(min=0) / tokens_per_step + FIXED_SUM_STEPS
    change += p * steps * SUM_ROUNDOFF
    dtype = queries.dtype
    lost_weight = LOST_WEIGHT[dtype if codes is None else torch.bfloat16]
    change += weights.clamp(max=lost_weight) / divisor
    v = k[..., :HEAD_DIM_CKV].abs()
    weighed = p @ v
    arithmetic_bound = change @ v
    out = p @ k[..., :HEAD_DIM_CKV]
    cut_square = torch.zeros_like(out[..., 0])
    if codes is not None:
        arithmetic_bound += LOST_SUM * (steps * codes.ckv_scale + 1)
        most = p + change
        storing_bound = codes.storing_error(most, dtype) @ v
        if codes.may_multiply_codes:
            cut_off = codes.cut_off(most, v, dtype)
            cut_square = codes.usually_cut_off(p, v, out, cut_off).square().mean(-1)
            storing_bound += cut_off
    elif is_flashmla:
        largest = v.amax(1).unflatten(-1, (-1, SCALE_COLUMNS)).amax(-1)
        lost = FLASHMLA_SMALLEST * largest.repeat_interleave(SCALE_COLUMNS, -1)[:, None]
        storing_bound = FLASHMLA_ROUNDOFF[dtype] * weighed + visible.clamp(min=0) * lost
    else:
        unit = UNIT_ROUNDOFF[dtype]
        of_weights = torch.where(group.kv_lens <= two_parts_up_to, unit**2, unit)
        storing_bound = of_weights[:, None, None] * weighed
    if dtype == torch.bfloat16:
        largest = v.amax((1, 2), keepdim=True)
        storing_bound += _error_of_parts(group.kv_lens[:, None, None], weighed, largest)
    log_total = torch.where(total > 0, divisor.log() + top, -math.inf).squeeze(-1)
    lse_bound = uncertainty / (1 - uncertainty).clamp(min=0.05) + steps * SUM_ROUNDOFF
    return Exact(
        out=out,
        lse=log_total,
        out_bound=arithmetic_bound + storing_bound,
        arithmetic_bound=arithmetic_bound,
        cut_square=cut_square,
        lse_bound=lse_bound.squeeze(-1),
        participation=1 / p.square().sum(-1).clamp(min=1e-300),
        uncertainty=uncertainty.squeeze(-1),
    )


def _score_error(q: torch.Tensor, k: torch.Tensor, is_codes: bool) -> torch.Tensor:
    """How far products of queries and keys may be off, ``[requests, rows, tokens]``."""
    (q_nope, q_pe), (k_nope, k_pe) = _norms(q), _norms(k)
    of_nope = q_nope[..., None] * k_nope[:, None]
    of_pe = q_pe[..., None] * k_pe[:, None]
    if not is_codes:
        return (of_nope + of_pe) * SCORE_ROUNDOFF
    sums_of_pe = (q[..., HEAD_DIM_CKV:] @ k[..., HEAD_DIM_CKV:].mT).abs()
    lost = (q.abs().amax(-1) * QUERY_ROUNDOFF)[..., None] * k.abs().sum(-1)[:, None]
    return (of_nope + sums_of_pe) * CODES_SCORE_ROUNDOFF + of_pe * CODES_KPE_ROUNDOFF + lost


def _error_of_parts(
    kv_lens: torch.Tensor, weighed: torch.Tensor, largest_value: torch.Tensor
) -> torch.Tensor:
    """How far O may be off because its parts are stored in fp16, ``[requests, rows, columns]``.

    ``weighed`` is sum p |V|; the others are of each request.
    """
    largest = kv_lens * largest_value
    lost = torch.where(largest >= PARTIAL_LEAST, PARTIAL_LOST, 0.0)
    return torch.where(kv_lens > TOKEN_TILE, PARTIAL_ROUNDOFF * weighed + lost, 0.0)


def _rmse_criterion(
    dtype: torch.dtype, has_two_parts: torch.Tensor, codes: Codes | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSE over rounding and the least participation, as ``has_two_parts`` of requests."""
    bound = torch.where(has_two_parts, RMSE_BOUND, RMSE_BOUND_ONE_PART)
    enough = torch.where(has_two_parts, MIN_PARTICIPATION, MIN_PARTICIPATION_ONE_PART)
    if codes is not None and (dtype == torch.bfloat16 or not codes.may_multiply_fp16):
        return torch.full_like(bound, RMSE_BOUND_CODES), torch.full_like(enough, MIN_PARTICIPATION)
    return bound, enough


def compare(
    queries: torch.Tensor,
    pool: torch.Tensor,
    groups: list[Group],
    causal: bool,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    lse_base_e: bool = False,
    two_parts_up_to: int = 0,
    is_flashmla: bool = False,
    codes: Codes | None = None,
) -> Worst:
    """Compare a result with float64; waits for nothing on a GPU.

    Parameters
    ----------
    queries : torch.Tensor
        ``[total queries, heads, 576]``.
    pool : torch.Tensor
        ``[slots, 576]``, poison where no request looks.
    groups : list of Group
        All requests that have queries.
    causal, sm_scale, lse_base_e
        As given to plan and run.
    out, lse : torch.Tensor
        The result.
    two_parts_up_to : int
        Length of requests up to which weights are in two parts; see :func:`two_part_tokens`.
    is_flashmla : bool
        Whether the cache is in FlashMLA's layout, whose weights add next to nothing to the rounding
        of the output at any length.
    codes : Codes, optional
        If the cache is of e4m3 with one scale.
    """
    zero = torch.zeros((), dtype=torch.float64, device=queries.device)
    worst = Worst(zero, zero, zero, zero, zero)
    shares, rows, squares, roundings = zero, zero, zero, zero
    smallest = SMALLEST[out.dtype] / 2
    for group in groups:
        answer = exact(queries, pool, group, causal, sm_scale, two_parts_up_to, is_flashmla, codes)
        heads = queries.shape[1]
        is_row = group.is_row.repeat_interleave(heads, 1)
        given = out[group.rows].double().flatten(1, 2)
        error = (given - answer.out).abs()
        allowed = answer.out_bound + UNIT_ROUNDOFF[out.dtype] * (
            answer.out.abs() + answer.out_bound
        )
        ratio = _largest(error / (allowed + smallest), is_row[..., None])
        worst.element = torch.maximum(worst.element, ratio)
        given_lse = lse[group.rows].double().flatten(1, 2)
        worst.lse = torch.maximum(worst.lse, _lse_ratio(given_lse, answer, is_row, lse_base_e))
        worst.uncertainty = torch.maximum(worst.uncertainty, _largest(answer.uncertainty, is_row))

        has_two_parts = (group.kv_lens <= two_parts_up_to)[:, None] & (codes is None)
        has_two_parts |= is_flashmla
        bound, enough = _rmse_criterion(out.dtype, has_two_parts, codes)
        judged = is_row & (answer.participation >= enough) & (answer.lse > -math.inf)
        square = error.square().mean(-1)
        rounding = (answer.out.to(out.dtype).double() - answer.out).square().mean(-1)
        averaged = answer.arithmetic_bound.square().mean(-1) / answer.participation
        averaged = averaged + answer.cut_square
        share = square / (bound.square() * rounding + averaged + 1e-300)
        shares = shares + torch.where(judged, share, 0.0).sum()
        rows = rows + judged.sum()
        squares = squares + torch.where(judged, square, 0.0).sum()
        roundings = roundings + torch.where(judged, rounding, 0.0).sum()
    worst.rmse = (shares / rows.clamp(min=1)).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)
    worst.rmse_over_rounding = torch.where(roundings > 0, squares / roundings, 0.0).sqrt()
    return worst


def compare_case(
    given: Tensors, groups: list[Group] | None = None, two_parts_up_to: int | None = None
) -> Worst:
    """Compare a case's result with float64, as :func:`compare` does.

    Parameters
    ----------
    given : Tensors
        After :func:`tensors.run`.
    groups : list of Group, optional
        Of its requests; all by default.
    two_parts_up_to : int, optional
        What :func:`two_part_tokens` says by default.
    """
    case = given.case
    if two_parts_up_to is None:
        two_parts_up_to = two_part_tokens(case.heads, max(case.q_lens))
    return compare(
        given.queries,
        given.pool,
        given.groups if groups is None else groups,
        case.causal,
        case.sm_scale,
        given.out,
        given.lse,
        case.lse_base_e,
        two_parts_up_to,
        is_flashmla=case.kv_dtype == "flashmla_656",
        codes=Codes.of_case(case),
    )


def _largest(ratio: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The largest ratio where it counts; NaN counts as infinite."""
    return torch.where(where, ratio.nan_to_num(nan=math.inf, posinf=math.inf), 0.0).amax()


def _lse_ratio(
    given: torch.Tensor, answer: Exact, is_row: torch.Tensor, base_e: bool
) -> torch.Tensor:
    unit = 1.0 if base_e else 1 / math.log(2.0)
    expected = answer.lse * unit
    is_blind = expected == -math.inf
    finite = torch.where(is_blind, 0.0, expected)
    allowed = answer.lse_bound * unit + LSE_ROUNDOFF * (finite.abs() + 16)
    ratio = (given - finite).abs() / allowed
    right = torch.where(given == -math.inf, 0.0, math.inf)  # of rows that see no token
    return _largest(torch.where(is_blind, right, ratio), is_row)
