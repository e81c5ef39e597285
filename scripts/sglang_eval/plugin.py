"""Makes SGLang find the plugin of this tree where etap-flashinfer is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile

from decode_bench.evidence import REPOSITORY

GROUP = "sglang.srt.plugins"


def ensure_discoverable() -> None:
    """Put this tree, and metadata that name its plugin, on the paths of this process and its
    children, unless etap-flashinfer is installed.

    SGLang finds plugins by the metadata of installed distributions. On a host where this tree only
    lies on ``PYTHONPATH`` there are none, and the server would not know ``etap``.

    Raises
    ------
    RuntimeError
        If the plugin is not found after all.
    """
    if not _is_found():
        directory = tempfile.mkdtemp(prefix="etap_plugin_")
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", directory]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
        paths = [directory, str(REPOSITORY)]
        sys.path[:0] = paths
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])
        importlib.invalidate_caches()
    if not _is_found():
        raise RuntimeError(
            f"no plugin 'etap' in the entry points of {GROUP}: install this tree, "
            "pip install --no-deps -e ."
        )


def _is_found() -> bool:
    return any(point.name == "etap" for point in importlib.metadata.entry_points(group=GROUP))
