"""Properties of the schedule: how work is cut into CTAs, in the very code that the kernel uses.

csrc/etap_mla_partition.h is plain C++; it is compiled with the system's compiler and called through
ctypes. The walk from positions on the line of tiles to requests is modelled here.
"""

import ctypes

import compiled_header
import numpy as np
import pytest
import schedule_batches
from hypothesis import example, given, settings
from hypothesis import strategies as st

TOKEN_TILE = 64
MAX_TILES = 2**31 - 1

WRAPPER = """
#include "etap_mla_partition.h"
extern "C" void cut(int32_t total, int32_t row_tiles, int32_t longest, int32_t num_ctas,
                    int32_t rows, int32_t empty_places, int32_t* begins, int32_t* ends) {
  auto const partition =
      etap::make_partition(total, row_tiles, longest, num_ctas, rows, empty_places);
  for (int32_t cta = 0; cta < num_ctas; ++cta) {
    auto const range = partition.range(cta);
    begins[cta] = range.begin;
    ends[cta] = range.end;
  }
}
extern "C" int32_t cta_of(int32_t total, int32_t row_tiles, int32_t longest, int32_t num_ctas,
                          int32_t rows, int32_t empty_places, int32_t place) {
  return etap::make_partition(total, row_tiles, longest, num_ctas, rows, empty_places)
      .cta_of(place);
}
// Of a row tile of so many tiles.
extern "C" int32_t places(int32_t total, int32_t row_tiles, int32_t longest, int32_t num_ctas,
                          int32_t rows, int32_t empty_places, int32_t tiles) {
  return etap::make_partition(total, row_tiles, longest, num_ctas, rows, empty_places)
      .places_of_row_tile(tiles);
}
// Of `some` row tiles with `some_tiles` in all.
extern "C" int32_t places_of_some(int32_t total, int32_t row_tiles, int32_t longest,
                                  int32_t num_ctas, int32_t rows, int32_t empty_places,
                                  int32_t some, int32_t some_tiles) {
  return etap::make_partition(total, row_tiles, longest, num_ctas, rows, empty_places)
      .places_of_row_tiles(some, some_tiles);
}
static etap::FixedSplit cut_into_parts(int32_t tiles, int32_t split_tiles) {
  return etap::make_fixed_split(tiles, split_tiles, etap::kMostFixedParts);
}
extern "C" int32_t part_tiles(int32_t tiles, int32_t split_tiles) {
  return cut_into_parts(tiles, split_tiles).part_tiles;
}
extern "C" int32_t num_parts(int32_t tiles, int32_t split_tiles) {
  return cut_into_parts(tiles, split_tiles).num_parts();
}
extern "C" int32_t first_part_from(int32_t tiles, int32_t split_tiles, int32_t tile) {
  return cut_into_parts(tiles, split_tiles).first_part_from(tile);
}
extern "C" int32_t part_begin(int32_t tiles, int32_t split_tiles, int32_t part) {
  return cut_into_parts(tiles, split_tiles).begin(part);
}
extern "C" int32_t log_merge_shares(int32_t num_parts) { return etap::log_merge_shares(num_parts); }
extern "C" int32_t bound(int32_t queries, int32_t batch, int32_t heads, int32_t row_tile,
                         int32_t longest, int32_t split_tiles, int64_t* row_tiles, int64_t* slots) {
  auto const bound =
      etap::bound_fixed_split(queries, batch, heads, row_tile, etap::kMostFixedParts, longest,
                              split_tiles);
  *row_tiles = bound.row_tiles;
  *slots = bound.slots();
  return bound.parts;
}
extern "C" int32_t add(int32_t a, int32_t b) { return etap::saturating_add(a, b); }
extern "C" int32_t multiply(int32_t a, int32_t b) { return etap::saturating_multiply(a, b); }
extern "C" int32_t divide_up(int32_t a, int32_t b) { return etap::divide_up(a, b); }
"""


@pytest.fixture(scope="module")
def partition(tmp_path_factory):
    return compiled_header.load(tmp_path_factory.mktemp("partition"), WRAPPER)


def cut(partition, total, row_tiles, longest, num_ctas, rows=16, empty_places=1):
    """Ranges of all CTAs, for row tiles of so many rows, in places of the line."""
    begins, ends = (np.zeros(num_ctas, dtype=np.int32) for _ in range(2))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (begins, ends)]
    partition.cut(total, row_tiles, longest, num_ctas, rows, empty_places, *pointers)
    return begins.tolist(), ends.tolist()


def token_tiles(length):
    return max(-(-length // TOKEN_TILE), 1)  # an empty request is one empty tile


batches = schedule_batches.batches(
    st.tuples(st.integers(0, 5000), st.integers(0, 5)), 40, st.integers(0, 20000), 300
)


@settings(max_examples=300, deadline=None)
@given(
    batch=batches,
    num_ctas=st.sampled_from([1, 2, 78, 114, 132, 144]),
    rows=st.sampled_from([8, 16, 32, 64]),
    empty_places=st.sampled_from([0, 1, 2, 4]),
)
@example(batch=[(65536, 1)] * 16, num_ctas=132, rows=16, empty_places=1)
@example(batch=[(512, 1)] * 128, num_ctas=132, rows=16, empty_places=1)
@example(batch=[(0, 1)] * 300, num_ctas=132, rows=16, empty_places=1)
@example(batch=[(2048, 1)] * 100, num_ctas=132, rows=64, empty_places=4)
def test_every_tile_is_done_once_and_loads_are_even(partition, batch, num_ctas, rows, empty_places):
    tiles = [token_tiles(length) for length, row_tiles in batch for _ in range(row_tiles)]
    total, longest = sum(tiles), max(tiles, default=0)
    problem = (total, max(len(tiles), 1), longest, num_ctas, rows, empty_places)
    begins, ends = cut(partition, *problem)

    is_uniform = total == len(tiles) * longest
    all_places = [partition.places(*problem, own) for own in tiles]
    are_alike = all_places == [longest] * len(tiles)  # or made so, by padding
    if is_uniform:
        assert are_alike
    elif are_alike:
        assert empty_places > 0
    else:
        assert all_places == [own + empty_places for own in tiles]
    places = sum(all_places)
    assert partition.places_of_some(*problem, len(tiles), total) == places
    busy = [(b, e) for b, e in zip(begins, ends, strict=True) if b < e]
    assert begins[0] == 0
    assert ends[-1] == places
    assert all(b == e for b, e in zip(begins[1:], ends[:-1], strict=True))  # no gap, no overlap
    loads = [e - b for b, e in busy]
    even = -(-(total + (0 if is_uniform else empty_places * len(tiles))) // num_ctas)
    if loads and not (are_alike and len(tiles) > num_ctas):
        assert max(loads) - min(loads) <= 1
    # Whole row tiles for a CTA: the last one may have fewer of them. They may take as much longer
    # as the merge that they spare, and equal ranges 1/16.
    assert not loads or max(loads) <= even + even // 16 + 2 + rows // 16
    if not are_alike:
        assert len(busy) == min(num_ctas, places)

    for cta, (begin, end) in enumerate(busy):
        for place in {begin, (begin + end) // 2, end - 1}:
            assert partition.cta_of(*problem, place) == cta


@pytest.mark.parametrize(
    ("row_tiles", "longest", "rows", "parts"),
    [
        (16, 1024, 16, 8),
        (128, 8, 16, 1),
        (128, 64, 16, 1),
        (64, 64, 16, 2),
        (1, 128, 16, 128),
        (16, 8, 16, 8),
        # One tile more than with an even cut, and nothing to merge.
        (100, 8, 16, 1),
        # A merge of 64 row tiles of 64 rows takes as long as two tiles, of 16 rows less.
        (64, 4, 64, 1),
        (64, 4, 16, 2),
        (64, 8, 64, 2),
        (16, 4, 64, 4),
    ],
)
def test_equal_requests_are_cut_alike(partition, row_tiles, longest, rows, parts):
    begins, ends = cut(partition, row_tiles * longest, row_tiles, longest, 132, rows)
    starts = {begin for begin, end in zip(begins, ends, strict=True) if begin < end}
    assert len(starts) == row_tiles * parts
    assert all(row_tile * longest in starts for row_tile in range(row_tiles))


@pytest.mark.parametrize(
    ("tiles", "rows", "empty_places", "is_whole"),
    [
        ([1 + i % 16 for i in range(128)], 64, 4, True),
        # The longest of 64 row tiles takes longer than two halves and their merge.
        ([1 + i % 64 for i in range(64)], 64, 4, False),
        ([1] * 127 + [1024], 16, 1, False),
        # A merge of 16 rows is cheaper.
        ([1 + i % 8 for i in range(128)], 64, 4, True),
        ([1 + i % 8 for i in range(128)], 16, 1, False),
    ],
)
def test_short_row_tiles_stay_whole(partition, tiles, rows, empty_places, is_whole):
    problem = (sum(tiles), len(tiles), max(tiles), 132, rows, empty_places)
    begins, _ = cut(partition, *problem)
    places = [partition.places(*problem, own) for own in tiles]
    row_tile_begins = [sum(places[:i]) for i in range(len(places))]
    assert (sorted(set(begins))[: len(tiles)] == row_tile_begins) == is_whole


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1500), min_size=1, max_size=8),
    num_ctas=st.sampled_from([1, 3, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merging_the_parts_is_exact(partition, lengths, num_ctas, seed):
    """Parts with their own maxima, merged as the kernel does, give softmax over all tokens."""
    random = np.random.default_rng(seed)
    tiles = [token_tiles(length) for length in lengths]
    problem = (sum(tiles), len(tiles), max(tiles), num_ctas, 16, 1)
    begins, ends = cut(partition, *problem)
    row_tile_begin = 0
    for length, row_tile_tiles in zip(lengths, tiles, strict=True):
        row_tile_begin += partition.places(*problem, row_tile_tiles) - row_tile_tiles
        scores = random.normal(scale=20, size=length)
        values = random.normal(size=(length, 3))
        parts = []
        for begin, end in zip(begins, ends, strict=True):
            first = max(begin, row_tile_begin) - row_tile_begin
            last = min(end, row_tile_begin + row_tile_tiles) - row_tile_begin
            if first < last:
                own = slice(first * TOKEN_TILE, min(last * TOKEN_TILE, length))
                own_max = scores[own].max(initial=-np.inf)
                weights = np.exp2(scores[own] - (0 if np.isneginf(own_max) else own_max))
                parts.append((own_max, weights.sum(), weights @ values[own]))
        row_tile_begin += row_tile_tiles

        merged_max = max(part_max for part_max, _, _ in parts)
        safe_max = 0 if np.isneginf(merged_max) else merged_max
        factors = [np.exp2(part_max - safe_max) for part_max, _, _ in parts]
        total = sum(f * part_sum for f, (_, part_sum, _) in zip(factors, parts, strict=True))
        out = sum(f * part_out for f, (_, _, part_out) in zip(factors, parts, strict=True))
        if length == 0:
            assert total == 0
            assert not out.any()
            continue
        expected = np.exp2(scores - scores.max())
        exact = expected @ values / expected.sum()
        np.testing.assert_allclose(out / total, exact, rtol=1e-12, atol=1e-14)  # values cancel
        np.testing.assert_allclose(
            safe_max + np.log2(total), scores.max() + np.log2(expected.sum()), rtol=1e-12
        )


def fixed_walk(partition, requests, split, begin, end):
    """Parts that a CTA does: row tile number, part, first tile, end; as SegmentWalk does it.

    ``requests`` are (token tiles, row tiles).
    """
    parts, line, number, position = [], 0, 0, begin
    for tiles, row_tiles in requests:
        for row_tile in range(row_tiles):
            row_tile_begin = line + row_tile * tiles
            tile = position - row_tile_begin
            if not parts and 0 <= tile < tiles:  # a part that begins before is another CTA's
                tile = partition.part_begin(
                    tiles, split, partition.first_part_from(tiles, split, tile)
                )
            while 0 <= tile < tiles and row_tile_begin + tile < end:
                part_end = min(tile + partition.part_tiles(tiles, split), tiles)
                part = partition.first_part_from(tiles, split, tile)
                parts.append((number + row_tile, part, tile, part_end))
                tile = part_end
            position = max(position, min(row_tile_begin + tile, line + row_tiles * tiles))
        line += tiles * row_tiles
        number += row_tiles
    return parts


fixed_batches = schedule_batches.batches(
    st.tuples(st.integers(0, 30_000), st.integers(0, 9)), 40, st.integers(0, 20_000), 300
)


@settings(max_examples=300, deadline=None)
@given(
    batch=fixed_batches,
    split=st.sampled_from([1, 2, 3, 4, 8, 32, 1000]),
    heads=st.sampled_from([1, 6, 8, 16, 24, 33, 64, 100, 128]),
    num_ctas=st.sampled_from([1, 2, 78, 132]),
)
@example(batch=[(65536, 1)] * 16, split=32, heads=16, num_ctas=132)
@example(batch=[(10_000, 2)], split=1, heads=128, num_ctas=132)
def test_fixed_parts_are_done_once_and_cut_alike(partition, batch, split, heads, num_ctas):
    """Lengths and query lengths of requests: every part once, whole, in a slot of its own."""
    row_tile = next((n for n in (8, 16, 32) if heads <= n), 64)
    requests = [(token_tiles(length), -(-queries * heads // row_tile)) for length, queries in batch]
    tiles = [each for each, row_tiles in requests for _ in range(row_tiles)]
    total, longest = sum(tiles), max(tiles, default=0)
    begins, ends = cut(partition, total, max(len(tiles), 1), longest, num_ctas, row_tile, 0)
    done = [
        fixed_walk(partition, requests, split, begin, end)
        for begin, end in zip(begins, ends, strict=True)
    ]
    parts = [part for of_cta in done for part in of_cta]

    row_tiles, slots = ctypes.c_int64(), ctypes.c_int64()
    queries, pages_tiles = sum(each for _, each in batch), sum(each for each, _ in requests)
    outputs = (ctypes.byref(row_tiles), ctypes.byref(slots))
    most_parts = partition.bound(queries, len(batch), heads, row_tile, pages_tiles, split, *outputs)
    assert len(tiles) <= row_tiles.value
    expected = []
    for number, own in enumerate(tiles):
        part_tiles = partition.part_tiles(own, split)
        assert part_tiles % split == 0
        count = partition.num_parts(own, split)
        assert count == -(-own // part_tiles) <= most_parts <= 64
        assert count == 1 or number * most_parts + count <= slots.value
        if -(-own // split) <= 64:
            assert part_tiles == split
        expected += [
            (number, part, part * part_tiles, min((part + 1) * part_tiles, own))
            for part in range(count)
        ]
    assert parts == expected
    longest_part = max((end - tile for _, _, tile, end in parts), default=0)
    for of_cta, begin, end in zip(done, begins, ends, strict=True):
        load = sum(part_end - tile for _, _, tile, part_end in of_cta)
        assert load < end - begin + max(longest_part, 1)


@pytest.mark.parametrize(
    ("queries", "heads", "row_tile", "expected"),
    [
        (7, 16, 16, 7),
        (7, 128, 64, 14),
        (7, 24, 32, 7),
        (4, 96, 64, 8),
        (64, 6, 8, 51),
    ],
)
def test_bound_of_row_tiles(partition, queries, heads, row_tile, expected):
    row_tiles, slots = ctypes.c_int64(), ctypes.c_int64()
    outputs = (ctypes.byref(row_tiles), ctypes.byref(slots))
    partition.bound(queries, 3, heads, row_tile, 1000, 10, *outputs)
    assert row_tiles.value == expected
    assert slots.value == expected * 64
    assert partition.bound(queries, 3, heads, row_tile, 1000, 1000, *outputs) == 1
    assert slots.value == 0  # nothing is split


def test_one_load_of_each_warp_reaches_all_parts(partition):
    for parts in range(1, 65):
        shares = 2 ** partition.log_merge_shares(parts)
        assert parts <= 8 * shares
        assert shares == 1 or parts > 4 * shares


@given(tiles=st.integers(1, 2**25), split=st.integers(1, 2**25))
def test_fixed_parts_of_any_length(partition, tiles, split):
    part_tiles, parts = partition.part_tiles(tiles, split), partition.num_parts(tiles, split)
    assert part_tiles % split == 0
    assert 1 <= parts <= 64
    assert (parts - 1) * part_tiles < tiles <= parts * part_tiles


@given(a=st.integers(0, MAX_TILES), b=st.integers(0, MAX_TILES))
def test_counts_saturate_instead_of_wrapping(partition, a, b):
    assert partition.add(a, b) == min(a + b, MAX_TILES)
    assert partition.multiply(a, b) == min(a * b, MAX_TILES)


@given(a=st.integers(0, MAX_TILES), b=st.integers(1, MAX_TILES))
@example(a=MAX_TILES, b=MAX_TILES)
@example(a=MAX_TILES, b=1)
@example(a=0, b=MAX_TILES)
def test_division_rounds_up_without_wrapping(partition, a, b):
    assert partition.divide_up(a, b) == -(-a // b)
