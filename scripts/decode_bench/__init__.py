"""Parts of ``scripts/bench_decode.py``: grid, inputs, peers, timing and reports."""
