"""What a result over a cache of e4m3 with one scale may be off by, beside float32: see compare.py.

Up to 16 packed rows (csrc/etap_mla_fp8_tile_math.cuh) both operands of O^T = V^T P^T are e4m3. In a
tile of 64 tokens P = 2^8 p / (largest p of the tile), stored as a sum of parts, each of which takes
what the one before left, times 2^4. With 2^e <= P < 2^(e+1) the first leaves 2^(e-4) at most, times
2^4 no more than 2^e; the second 2^(e-5) of that, so 2^(e-9) of P; the third, of 2^(e-1) at most,
2^(e-6), so 2^(e-14) of P. Below its normal numbers a part leaves half of 2^-9, the smallest there
is: the second 2^-14 and the third 2^-18 of P, over 2^8.

A product of e4m3 is exact. The tensor cores add 32 of them and the accumulator with 13 bits behind
the largest and cut off what is further right of each, then of the sum. The largest is taken from
the operands' exponents, of which 2^-6 is the smallest even where the operand is less or 0. A tile
is two such instructions a part. Nothing is cut off of a single product, which has 8 bits.

With more rows operands are fp16, which e4m3 is a subset of, P with a reference that leaves the
largest of a row at 2^8 or more.
"""

from __future__ import annotations

import dataclasses

import torch

from etap_flashinfer import dispatch

from .cases import TOKEN_TILE, Case

LARGEST_CODED_ROW_TILE = 16  # kMultipliesCodes in csrc/etap_mla_fp8_traits.cuh
PARTS = {torch.bfloat16: 2, torch.float16: 3}  # Fp8TileTraits::kParts
PART_SHIFT = 4
# Of a weight, relative to itself, and to the largest of its tile.
PART_ROUNDOFF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-14}
PART_SMALLEST = {torch.bfloat16: 2.0**-22, torch.float16: 2.0**-26}
# The same of weights in fp16, relative to the largest of the row.
FP16_ROUNDOFF = 2.0**-11
FP16_SMALLEST = 2.0**-33

INSTRUCTION_TOKENS = 32
CUT_BITS = 13
SMALLEST_NORMAL = 2.0**-6  # of e4m3
LARGEST_CODED_WEIGHT = 2.0**8
# A part is no more than this times P, or the smallest normal number.
PART_GROWTH = 1 + 2.0**-4
# RMS of what is cut off where products have all signs, over their norm: a few units, of which the
# norm is 2^13. Always towards 0, it adds up where they are of one sign: this of what it may be.
USUAL_ROUNDOFF = 2.0**-12
ONE_SIGN_SHARE = 1 / 4
_ELEMENTS_AT_ONCE = 2**25  # of a tensor [requests, rows, tiles, 512]


@dataclasses.dataclass(frozen=True)
class Codes:
    """The kernel that reads codes, as far as the tolerance depends on it."""

    ckv_scale: float
    row_tiles: frozenset[int]  # that it may have

    @staticmethod
    def of_case(case: Case) -> Codes | None:
        """None if the case's cache is of another format.

        The wrapper takes the row tile for the longest query or, if it only knows the number of
        queries, for their mean; of batch-invariant calls for a single one.
        """
        if case.kv_dtype != "fp8_e4m3":
            return None
        mean = -(-sum(case.q_lens) // len(case.q_lens))
        counts = {max(case.q_lens), mean} if case.fixed_split_size is None else {1}
        tiles = {dispatch.choose_row_tile(case.heads, count, "fp8") for count in counts}
        return Codes(case.fp8.ckv_scale, frozenset(tiles))

    @property
    def may_multiply_codes(self) -> bool:
        return min(self.row_tiles) <= LARGEST_CODED_ROW_TILE

    @property
    def may_multiply_fp16(self) -> bool:
        return max(self.row_tiles) > LARGEST_CODED_ROW_TILE

    def storing_error(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How much of each weight may be lost where it is stored.

        Parameters
        ----------
        p : torch.Tensor
            ``[requests, rows, tokens]``, not less than the weights over their sum.
        dtype : torch.dtype
            Of the output.

        Returns
        -------
        torch.Tensor
            The shape of ``p``.
        """
        error = torch.zeros_like(p)
        if self.may_multiply_codes:
            tiles = _padded(p, 2).unflatten(-1, (-1, TOKEN_TILE))
            top = tiles.amax(-1, keepdim=True).expand(tiles.shape).flatten(-2)[..., : p.shape[-1]]
            error = torch.maximum(PART_ROUNDOFF[dtype] * p, PART_SMALLEST[dtype] * top)
        if self.may_multiply_fp16:
            lost = FP16_SMALLEST * p.amax(-1, keepdim=True)
            error = torch.maximum(error, torch.maximum(FP16_ROUNDOFF * p, lost))
        return torch.minimum(error, p)

    def cut_off(self, p: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How much the sums of products may lose if they are of codes.

        Parameters
        ----------
        p : torch.Tensor
            As above.
        v : torch.Tensor
            ``[requests, tokens, 512]``: values of ckv without their signs, 0 beyond lengths.
        dtype : torch.dtype
            Of the output.

        Returns
        -------
        torch.Tensor
            ``[requests, rows, 512]``.
        """
        requests, rows, _ = p.shape
        lost = p.new_zeros(requests, rows, v.shape[-1])
        shape = (-1, 2, INSTRUCTION_TOKENS)
        weights = _padded(p, 2).unflatten(2, shape).transpose(1, 2)  # [.., tiles, rows, 2, 32]
        values = _padded(v, 1).unflatten(1, shape)  # [.., tiles, 2, 32, 512]
        at_once = max(1, _ELEMENTS_AT_ONCE // lost.numel())
        for some_weights, some_values in zip(
            weights.split(at_once, 1), values.split(at_once, 1), strict=True
        ):
            lost += self._cut_off_of_tiles(some_weights, some_values, dtype).sum(1)
        shares = sum(2.0 ** (-PART_SHIFT * part) for part in range(PARTS[dtype]))
        return lost * (shares * 2.0**-CUT_BITS)

    def usually_cut_off(
        self, p: torch.Tensor, v: torch.Tensor, out: torch.Tensor, most: torch.Tensor
    ) -> torch.Tensor:
        """RMS of what the sums of products of codes lose.

        Parameters
        ----------
        p, v : torch.Tensor
            As above.
        out : torch.Tensor
            ``[requests, rows, 512]``: p V.
        most : torch.Tensor
            What :meth:`cut_off` gives.

        Returns
        -------
        torch.Tensor
            The shape of ``out``.
        """
        norms = (p.square() @ v.clamp(min=SMALLEST_NORMAL * self.ckv_scale).square()).sqrt()
        one_sign = (out / (p @ v).clamp(min=1e-300)).square()
        return torch.hypot(USUAL_ROUNDOFF * norms, ONE_SIGN_SHARE * one_sign * most)

    def _cut_off_of_tiles(
        self, weights: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """In units of the last bit that is kept, ``[requests, tiles, rows, 512]``."""
        top = weights.amax((-1, -2), keepdim=True)
        smallest = top * (SMALLEST_NORMAL / LARGEST_CODED_WEIGHT)
        # Half as much as sure to become 0 in all parts, for weights are not known exactly.
        is_product = weights > top * (PART_SMALLEST[dtype] / 2)
        parts = torch.maximum(PART_GROWTH * weights, smallest)
        count = is_product.sum(-1)[..., None]  # [.., tiles, rows, 2, 1]
        largest_value = values.amax(-2).clamp(min=SMALLEST_NORMAL * self.ckv_scale)
        largest = parts.amax(-1)[..., None] * largest_value[:, :, None]  # [.., rows, 2, 512]
        sums = (torch.where(is_product, parts, 0.0).transpose(-2, -3) @ values).transpose(-2, -3)
        first, second = sums.unbind(-2)
        cut = count[..., 0, :] * largest[..., 0, :] + first
        cut += (count[..., 1, :] + (count[..., 0, :] > 0)) * torch.maximum(
            largest[..., 1, :], first
        )
        cut += first + second
        return torch.where(count.sum(-2) > 1, cut, 0.0)


def _padded(values: torch.Tensor, dim: int) -> torch.Tensor:
    """With zeros up to whole token tiles."""
    missing = -values.shape[dim] % TOKEN_TILE
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim)
