"""A control: breaks the ``etap`` backend a little, to see whether a comparison notices.

Loaded as an SGLang plugin of its own, only in the server that is to be wrong.
"""

from __future__ import annotations

import pathlib
from typing import Any

ENTRY_POINTS = "[sglang.srt.plugins]\netap_broken = sglang_eval.broken:register\n"
METADATA = "Metadata-Version: 2.1\nName: etap-broken-control\nVersion: 0\n"


def write_distribution(directory: pathlib.Path) -> pathlib.Path:
    """Write metadata by which SGLang finds this plugin on ``PYTHONPATH``."""
    metadata = directory / "etap_broken_control-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return directory


def register() -> None:
    """Let every request lose the newest token of its cache."""
    from sglang_patch.metadata import IndexBuffers

    fill = IndexBuffers.fill

    def fill_without_the_newest(
        self: IndexBuffers, req_pool_indices: Any, seq_lens: Any, added_tokens: int = 0
    ) -> None:
        fill(self, req_pool_indices, seq_lens, added_tokens - 1)

    IndexBuffers.fill = fill_without_the_newest  # type: ignore[method-assign]
