"""The arithmetic of the kernels over a cache of e4m3 with one scale, on the CPU, and ways to get it
wrong: what the fuzzer's tolerance is held against."""

import math

import torch
from fuzzing import codes, tensors

TOKEN_TILE = 64
E4M3 = torch.float8_e4m3fn
REFERENCE_BELOW_MAX = 8.0
LARGEST_PROBABILITY_LOG2 = 15.0


def _exponent(values: torch.Tensor, least: int) -> torch.Tensor:
    """Exponent of the leading bit of float32 numbers, or ``least``, as an integer."""
    return ((values.view(torch.int32) >> 23 & 0xFF) - 127).clamp_(min=least)


def _cut(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Values without what lies more than 13 bits to the right of 2^exponent."""
    unit = (exponent - codes.CUT_BITS + 127 << 23).view(torch.float32)
    return (values / unit).trunc_().mul_(unit)


def multiply_codes(accumulator: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One WGMMA of e4m3.

    Parameters
    ----------
    accumulator : torch.Tensor
        ``[rows, columns]`` float32.
    p, v : torch.Tensor
        ``[rows, 32]`` and ``[32, columns]`` float32, values of e4m3.
    """
    products = p[:, :, None] * v
    # Those of operands are at least -6, even where these are subnormal or 0.
    exponent = (_exponent(p, -6)[:, :, None] + _exponent(v, -6)).amax(1)
    exponent = torch.maximum(exponent, _exponent(accumulator, -60))
    total = _cut(products, exponent[:, None]).sum(1) + _cut(accumulator, exponent)
    return _cut(total, _exponent(total, -60))


def parts_of(p: torch.Tensor, count: int) -> list[torch.Tensor]:
    """P as e4m3 numbers, each of what the one before left, times 2^4."""
    parts = []
    for _ in range(count):
        parts.append(p.to(E4M3).float())
        p = (p - parts[-1]) * 2.0**codes.PART_SHIFT
    return parts


def _scores(
    q: torch.Tensor, k: torch.Tensor, given: tensors.Tensors, query_type: torch.dtype, ratio: float
) -> torch.Tensor:
    """In units of log2, float32."""
    case = given.case
    largest = q.float().abs().amax(-1, keepdim=True)
    top = 14 if query_type == torch.float16 else 7
    scale = torch.exp2((top - _exponent(largest, -127)).clamp(-126, 126).float())
    operand = (q.float() * scale).to(query_type).float()
    kpe_over_ckv = torch.tensor(ratio * case.fp8.kpe_scale / case.fp8.ckv_scale)
    scores = operand[:, :512] @ k[:, :512].T + kpe_over_ckv * (operand[:, 512:] @ k[:, 512:].T)
    factor = torch.tensor([case.sm_scale / math.log(2), case.fp8.ckv_scale]).prod()
    return scores * (factor / scale)


def _power(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.exp2(values - torch.where(reference == -math.inf, 0.0, reference))


def attend(
    scores: torch.Tensor, v: torch.Tensor, parts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference, sum of weights and O over all tokens; with P in so many parts of e4m3, or fp16
    for none."""
    rows = scores.shape[0]
    reference = torch.full((rows, 1), -math.inf)
    running_max = reference.clone()
    total, output = torch.zeros(rows, 1), torch.zeros(rows, v.shape[1])
    for first in range(0, scores.shape[1], TOKEN_TILE):
        tile, values = scores[:, first : first + TOKEN_TILE], v[first : first + TOKEN_TILE]
        if parts:
            own = tile.amax(1, keepdim=True) - REFERENCE_BELOW_MAX
            raised = torch.maximum(reference, own)
        else:
            running_max = torch.maximum(running_max, tile.amax(1, keepdim=True))
            is_too_low = running_max - reference > LARGEST_PROBABILITY_LOG2
            raised = own = torch.where(is_too_low, running_max - REFERENCE_BELOW_MAX, reference)
        p = _power(tile, own)
        if parts:
            product = torch.zeros_like(output)
            for number, part in enumerate(parts_of(p, parts)):
                sums = torch.zeros_like(output)
                for begin in range(0, TOKEN_TILE, codes.INSTRUCTION_TOKENS):
                    some = slice(begin, begin + codes.INSTRUCTION_TOKENS)
                    sums = multiply_codes(sums, part[:, some], values[some])
                product += sums * 2.0 ** (-codes.PART_SHIFT * number)
        else:
            product = p.half().float() @ values
        factor, weight = _power(reference, raised), _power(own, raised)
        total = total * factor + weight * p.sum(1, keepdim=True)
        output = output * factor + weight * product
        reference = raised
    return reference, total, output


def run(
    given: tensors.Tensors,
    row_tile: int,
    parts: int | None = None,
    query_type: torch.dtype = torch.float16,
    kpe_ratio: float = 1.0,
) -> None:
    """Fill ``given.out`` and ``given.lse`` as the kernel of ``row_tile`` rows would.

    ``parts``, ``query_type`` (e4m3) and ``kpe_ratio`` other than the defaults make it a wrong one.
    """
    case = given.case
    scales = torch.tensor(
        [case.fp8.ckv_scale] * 512 + [case.fp8.kpe_scale] * 64, dtype=torch.float64
    )
    if parts is None:
        is_coded = row_tile <= codes.LARGEST_CODED_ROW_TILE
        parts = codes.PARTS[given.out.dtype] if is_coded else 0
    for group in given.groups:
        facts = zip(group.rows, group.slots, group.q_lens.tolist(), group.kv_lens, strict=True)
        for rows, slots, q_len, kv_len in facts:
            rows = rows[:q_len]
            q = given.queries[rows].flatten(0, 1)
            tokens = torch.zeros(-(-max(int(kv_len), 1) // TOKEN_TILE) * TOKEN_TILE, 576)
            tokens[:kv_len] = (given.pool[slots[:kv_len]] / scales).float()
            visible = kv_len.expand(q_len)
            if case.causal:
                visible = kv_len - q_len + 1 + torch.arange(q_len)
            hidden = torch.arange(tokens.shape[0]) >= visible.repeat_interleave(case.heads)[:, None]
            scores = _scores(q, tokens, given, query_type, kpe_ratio).masked_fill(hidden, -math.inf)
            reference, total, output = attend(scores, tokens[:, :512], parts)
            factor = torch.where(total == 0, 0.0, 1 / total) * case.fp8.ckv_scale
            given.out[rows] = (output * factor).to(given.out.dtype).unflatten(0, (q_len, -1))
            lse = torch.where(total == 0, -math.inf, reference + total.log2())
            unit = math.log(2) if case.lse_base_e else 1.0
            given.lse[rows] = (lse * unit).view(q_len, -1)
