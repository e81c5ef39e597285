"""Tests against the real SGLang, on the CPU. See requirements.txt for how to install it.

Skipped, counted and with the reason, where SGLang is not installed.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch

from sglang_patch import compat

# Before triton is imported: the kernel that fills the index tensors runs interpreted on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = pathlib.Path(__file__).parent


def import_torchvision() -> None:
    """Import torchvision beside a CPU build of PyTorch, for which its wheel has no operators.

    transformers imports it. Only its registration of shapes for operators that are missing is
    left out.
    """
    register = torch.library.register_fake

    def register_others(op, *arguments, **named):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *arguments, **named)

    torch.library.register_fake = register_others
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this directory's tests where SGLang is not installed."""
    # Not by an import: this very directory is called sglang too.
    if compat.sglang_version() is not None:
        return
    reason = "SGLang is not installed; tests/sglang/requirements.txt says how"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def plugin():
    """``sglang_patch.plugin``, after SGLang loaded its plugins as a server does."""
    import_torchvision()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_patch import plugin

    return plugin


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    """A directory with the configuration of a tiny DeepSeek-V3."""
    import make_tiny_checkpoint

    (tmp_path / "config.json").write_text(json.dumps(make_tiny_checkpoint.CONFIG))
    return tmp_path


@pytest.fixture
def resolve(plugin, model):
    """A function that takes arguments of the server and returns them resolved."""
    from sglang.srt.arg_groups import overrides
    from sglang.srt.server_args import prepare_server_args

    def resolved(*arguments: str):
        common = ["--model-path", str(model), "--load-format", "dummy", "--skip-tokenizer-init"]
        # No GPU is touched: the arguments are only resolved as for one.
        server_args = prepare_server_args([*common, "--device", "cuda", *arguments])
        if hasattr(server_args, "resolve_once"):
            server_args.resolve_once()
        return overrides.resolved_view(server_args)

    return resolved
