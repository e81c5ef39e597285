"""Batches for the CPU tests of the schedule, drawn by hypothesis."""

from hypothesis import strategies as st


def batches(requests, most, equal_lengths, most_equal):
    """Up to ``most`` ``requests`` of any length, or up to ``most_equal`` of one length.

    A request is a length and a number of queries or row tiles; equal ones have 1 to 3 of those.
    """
    equal = st.tuples(st.integers(1, most_equal), equal_lengths, st.integers(1, 3))
    return st.lists(requests, min_size=1, max_size=most) | equal.map(lambda e: [e[1:]] * e[0])
