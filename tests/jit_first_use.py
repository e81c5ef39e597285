"""A process that uses a kernel's module for the first time, in a JIT cache of its own.

Apart from the tests, so that the process has nothing of them to import.
"""

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from etap_flashinfer import jit

VARIANT = jit.EtapMlaVariant(torch.bfloat16, 16, "tma")
NOBODY = 65534


def patches(root: Path, sources: Path) -> list[tuple[Any, str, Any]]:
    """Attributes that move sources, cache and compiler below ``root``, and make this a Hopper."""
    modules = jit._flashinfer_jit()
    return [
        (jit, "csrc_dir", lambda: root / "csrc"),
        (jit, "require_hopper", lambda: None),
        (modules.env, "FLASHINFER_GEN_SRC_DIR", sources),
        (modules.env, "FLASHINFER_JIT_DIR", root / "cached_ops"),
        (modules.cpp_ext, "get_cuda_path", lambda: str(root / "cuda")),
    ]


def use(
    connection: Connection, root: Path, sources: Path, environment: dict[str, str], how: str
) -> None:
    """Take the module as the wrapper does and send "works" or the error's message.

    ``how`` is "nobody" for a user without permissions, who is not root, "group" for a process group
    of its own.
    """
    os.environ.clear()
    os.environ.update(environment)
    for owner, name, value in patches(root, sources):
        setattr(owner, name, value)
    if how == "group":
        os.setsid()
    elif how == "nobody" and os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        module = jit.get_etap_mla_module(VARIANT)
        module["run"], module["workspace_bytes"], module["kept_bytes"]
        connection.send("works")
    except jit.EtapJitError as error:
        connection.send(str(error))
