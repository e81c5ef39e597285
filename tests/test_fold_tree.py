"""In which order batch-invariant calls join partial results, in the very code that the kernel uses.

csrc/etap_mla_fold_tree.h is plain C++; it is compiled with the system's compiler and called through
ctypes. What the math warpgroups and the merge do with it is modelled here, on expressions.
"""

import compiled_header
import pytest
import schedule_batches
from hypothesis import example, given, settings
from hypothesis import strategies as st

QUAD_LEAVES, BLOCK_LEAVES, MOST_LEAVES, SLOTS_OF_BEGINNING = 4, 16, 128, 3

WRAPPER = """
#include "etap_mla_fold_tree.h"
using namespace etap;
static_assert(kQuadLeaves == 4 && kBlockLeaves == 16 && kMostLeaves == 128);
static_assert(kFoldSlotsOfBeginning == 3);
static FoldPartition kept;
extern "C" int32_t cut(int32_t total, int32_t row_tiles, int32_t longest, int32_t num_ctas,
                       int32_t rows, int32_t split) {
  kept = make_fold_partition(total, row_tiles, longest, num_ctas, rows, split);
  return kept.granule_leaves;
}
extern "C" int32_t range_begin(int32_t cta) { return kept.partition.range(cta).begin; }
extern "C" int32_t range_end(int32_t cta) { return kept.partition.range(cta).end; }
extern "C" int32_t cta_of(int32_t place) { return kept.partition.cta_of(place); }
extern "C" int32_t leaf_tiles(int32_t tiles, int32_t split) {
  return make_leaf_split(tiles, split).part_tiles;
}
extern "C" int32_t before_cut(int32_t tiles, int32_t split, int32_t offset, int32_t granule) {
  return leaves_before_cut(make_leaf_split(tiles, split), offset, granule);
}
extern "C" int32_t leading_blocks(int32_t begin, int32_t end, int32_t num_leaves) {
  return FoldPieces{begin, end, num_leaves}.leading_blocks();
}
extern "C" int32_t first_leaf(int32_t begin, int32_t end, int32_t num_leaves) {
  return FoldPieces{begin, end, num_leaves}.first_leaf();
}
extern "C" int32_t end_of_piece(int32_t begin, int32_t end, int32_t num_leaves, int32_t leaf) {
  return FoldPieces{begin, end, num_leaves}.end_of_piece(leaf);
}
extern "C" int32_t count_slots(int32_t most_leaves) { return count_fold_slots(most_leaves); }
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return compiled_header.load(tmp_path_factory.mktemp("tree"), WRAPPER)


def leaves_of(tree, tiles, split):
    size = tree.leaf_tiles(tiles, split)
    return [(tile, min(tile + size, tiles)) for tile in range(0, tiles, size)]


def joined(values):
    """One after another."""
    result = values[0]
    for value in values[1:]:
        result = (result, value)
    return result


def parts(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def canonical(leaves):
    """What a row tile's result is, whoever makes it."""
    quads = [
        [joined(quad) for quad in parts(block, QUAD_LEAVES)]
        for block in parts(leaves, BLOCK_LEAVES)
    ]
    return joined([joined(block) for block in quads])


def fold(state, value):
    return value if state is None else (state, value)


def run_segment(leaves, begin, end):
    """As MathWarpgroup does it: the whole result, or the pieces in the order of their slots.

    The first slot of a beginning is that of the leading blocks.
    """
    if end - begin == 1 < len(leaves):
        return None, [None, leaves[begin]] if begin == 0 else [leaves[begin]]
    quad = block = row_tile = None
    pieces = [None] if begin == 0 else []
    for leaf in range(begin, end):
        quad = fold(quad, leaves[leaf])
        ends_segment, ends_row_tile = leaf + 1 == end, leaf + 1 == len(leaves)
        ends_quad = ends_row_tile or (leaf + 1) % QUAD_LEAVES == 0
        ends_block = ends_row_tile or (leaf + 1) % BLOCK_LEAVES == 0
        quad_began_here = leaf - leaf % QUAD_LEAVES >= begin
        block_began_here = leaf - leaf % BLOCK_LEAVES >= begin
        block_joins = block_began_here and ends_block and begin == 0
        leaves_quad = not quad_began_here or (not block_began_here if ends_quad else ends_segment)
        if block_began_here and ends_quad:
            block, quad = fold(block, quad), None
        if block_joins:
            row_tile, block = fold(row_tile, block), None
        elif block_began_here and block is not None and (ends_block or ends_segment):
            pieces.append(block)
            block = None
        if leaves_quad:
            pieces.append(quad)
            quad = None
    assert quad is None
    assert block is None
    if begin == 0 and end == len(leaves):
        return row_tile, []
    if begin == 0:
        pieces[0] = row_tile
    return None, pieces


def merge(tree, num_leaves, cuts, slots):
    """As FoldMerge does it. ``cuts``: leaves at which CTAs begin; ``slots``: of each CTA."""
    leading = tree.leading_blocks(0, cuts[1], num_leaves)
    blocks = [[[slots[0][0]]]] if leading else []
    for part, own in enumerate(slots):
        arguments = (cuts[part], cuts[part + 1], num_leaves)
        slot = 1 if part == 0 else 0
        leaf = tree.first_leaf(*arguments)
        while leaf < cuts[part + 1]:
            if leaf % BLOCK_LEAVES == 0:
                assert leaf // BLOCK_LEAVES == leading + len(blocks) - bool(leading)
                blocks.append([])
            if leaf % QUAD_LEAVES == 0:
                blocks[-1].append([])
            blocks[-1][-1].append(own[slot])
            assert len(blocks[-1]) <= BLOCK_LEAVES // QUAD_LEAVES
            assert len(blocks[-1][-1]) <= QUAD_LEAVES
            slot += 1
            leaf = tree.end_of_piece(*arguments, leaf)
        assert slot == len(own)
    return joined([joined([joined(group) for group in block]) for block in blocks])


batches = schedule_batches.batches(
    st.tuples(st.integers(1, 2000), st.integers(0, 4)), 30, st.integers(1, 1500), 200
)


@settings(max_examples=300, deadline=None)
@given(
    batch=batches,
    split=st.sampled_from([1, 2, 3, 4, 8, 32, 1000]),
    num_ctas=st.sampled_from([1, 2, 78, 132, 144]),
)
@example(batch=[(1024, 1)] * 16, split=1, num_ctas=132)
@example(batch=[(1024, 1)], split=1, num_ctas=132)
@example(batch=[(128, 1)] * 4, split=1, num_ctas=132)
@example(batch=[(16, 1)] * 64, split=1, num_ctas=132)
@example(batch=[(65, 1), (1, 1), (130, 2), (2000, 1)], split=1, num_ctas=132)
def test_every_cut_gives_the_same_expression(tree, batch, split, num_ctas):
    """``batch``: token tiles and row tiles of requests."""
    row_tiles = [tiles for tiles, count in batch for _ in range(count)]
    total, longest = sum(row_tiles), max(row_tiles, default=0)
    granule = tree.cut(total, max(len(row_tiles), 1), longest, num_ctas, 16, split)
    assert granule in (1, QUAD_LEAVES, BLOCK_LEAVES)
    ranges = [(tree.range_begin(cta), tree.range_end(cta)) for cta in range(num_ctas)]
    most_leaves = min(max(-(-longest // split), 1), MOST_LEAVES)
    loads = [0] * num_ctas
    line = 0
    for tiles in row_tiles:
        leaves = leaves_of(tree, tiles, split)
        assert len(leaves) <= most_leaves
        expected = canonical(leaves)

        def cut_at(place, begin=line, own=tiles):
            return tree.before_cut(own, split, place - begin, granule)

        # The CTAs that have some of it, as describe_split() counts them.
        last_cut = len(leaves) - 1 - (len(leaves) - 1) % granule
        first = tree.cta_of(line)
        last = tree.cta_of(line + leaves[last_cut][0])
        begins = [0, *(cut_at(ranges[cta][0]) for cta in range(first + 1, last + 1)), len(leaves)]
        slots = []
        for part, cta in enumerate(range(first, last + 1)):
            # As SegmentWalk finds it.
            begin = max(line, ranges[cta][0])
            begin = 0 if begin == line else cut_at(begin)
            end = cut_at(ranges[cta][1]) if ranges[cta][1] < line + tiles else len(leaves)
            assert (begin, end) == (begins[part], begins[part + 1])
            assert begin < end, "nobody has nothing"
            loads[cta] += leaves[end - 1][1] - leaves[begin][0]
            whole, pieces = run_segment(leaves, begin, end)
            if whole is not None:
                assert whole == expected
            most = tree.count_slots(most_leaves)
            room = SLOTS_OF_BEGINNING if begin == 0 else most - SLOTS_OF_BEGINNING
            assert len(pieces) <= room
            slots.append(pieces)
        if len(slots) > 1:
            assert merge(tree, len(leaves), begins, slots) == expected
        line += tiles
    assert sum(loads) == total
    granule_tiles = granule * tree.leaf_tiles(max(longest, 1), split)
    for load, (begin, end) in zip(loads, ranges, strict=True):
        assert load < end - begin + granule_tiles


@settings(max_examples=300, deadline=None)
@given(tiles=st.integers(1, 1 << 20), split=st.integers(1, 5000))
def test_leaves(tree, tiles, split):
    size = tree.leaf_tiles(tiles, split)
    assert size % split == 0
    assert -(-tiles // size) <= MOST_LEAVES
    if tiles <= 64 * split or (split > 1 and tiles <= MOST_LEAVES * split):
        assert size == split
    assert tree.leaf_tiles(tiles + 1, split) >= size


@pytest.mark.parametrize(
    ("batch", "tiles", "granule"),
    [
        (1, 16, 1),
        (16, 16, 1),
        (64, 16, 4),
        (4, 128, 1),
        (16, 128, 4),
        (64, 128, 16),
        (1, 1024, 1),
        (4, 1024, 4),
        (16, 1024, 16),
    ],
)
def test_equal_requests_are_cut_between_quads_or_blocks(tree, batch, tiles, granule):
    """Where that leaves no CTA with much more to do than another."""
    assert tree.cut(batch * tiles, batch, tiles, 132, 16, 1) == granule
