"""A stand-in for the compiled kernel and for a Hopper GPU, to test how the wrapper calls it.

A wrapper on PyTorch's meta device has tensors whose values can't be read: a plan or run that
copied anything back from the device would fail.
"""

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import etap_flashinfer
from etap_flashinfer import dispatch

WORKSPACE_BYTES = 4096
KEPT_BYTES = 64
META = torch.device("meta")


class Variant(NamedTuple):
    dtype: torch.dtype
    row_tile: int
    kv_loader: str
    kv_cache: str = "same"


class FakeKernel:
    """Records which variants are loaded and what they are called with."""

    def __init__(self) -> None:
        self.loaded: list[Variant] = []
        self.calls: list[tuple[Variant, tuple[Any, ...]]] = []
        self.converted: list[torch.Tensor] = []  # by argument_converter's function
        self.fixed_splits: list[tuple[int, ...]] = []  # whose workspace was asked for

    def load(self, variant: Variant) -> SimpleNamespace:
        self.loaded.append(variant)
        return SimpleNamespace(
            run=lambda *arguments: self.calls.append((variant, arguments)),
            workspace_bytes=lambda device_index: WORKSPACE_BYTES,
            kept_bytes=lambda device_index: KEPT_BYTES,
            fixed_split_workspace_bytes=self._fixed_split_workspace_bytes,
        )

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        self.converted.append(tensor)
        return tensor

    def _fixed_split_workspace_bytes(self, *arguments: int) -> int:
        self.fixed_splits.append(arguments)
        return WORKSPACE_BYTES + (1 if arguments[-1] == 1 else 0)  # one tile a part: too much


def install(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """Put the stand-in in the place of the JIT, and take every device for a Hopper GPU."""
    kernel = FakeKernel()
    module = ModuleType("etap_flashinfer.jit")
    module.EtapMlaVariant = Variant  # type: ignore[attr-defined]
    module.get_etap_mla_module = kernel.load  # type: ignore[attr-defined]
    module.argument_converter = lambda: kernel.convert  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "etap_flashinfer.jit", module)
    monkeypatch.setattr(etap_flashinfer, "jit", module, raising=False)
    monkeypatch.setattr(dispatch, "etap_device_refusal", lambda device: None)
    return kernel


def plan_arguments(
    query_lens: tuple[int, ...] = (1, 1),
    index_device: torch.device | str = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of plan for requests of 2 pages of 64 tokens, bf16, 16 heads."""
    batch_size = len(query_lens)
    offsets = torch.tensor([0, *query_lens]).cumsum(0)
    arguments: dict[str, Any] = {
        "qo_indptr": offsets.int().to(index_device),
        "kv_indptr": torch.arange(batch_size + 1).mul(2).int().to(index_device),
        "kv_indices": torch.arange(2 * batch_size).int().to(index_device),
        "kv_len_arr": torch.full((batch_size,), 100).int().to(index_device),
        "num_heads": 16,
        "head_dim_ckv": 512,
        "head_dim_kpe": 64,
        "page_size": 64,
        "causal": False,
        "sm_scale": 192**-0.5,
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.bfloat16,
    }
    return arguments | changes


def run_inputs(
    total_queries: int = 2,
    num_heads: int = 16,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = META,
) -> dict[str, torch.Tensor]:
    """Arguments of run for such a plan: views of packed queries and of a packed cache."""
    query = torch.empty(total_queries, num_heads, 576, dtype=dtype, device=device)
    cache = torch.empty(8, page_size, 576, dtype=dtype, device=device)
    return {
        "q_nope": query[..., :512],
        "q_pe": query[..., 512:],
        "ckv_cache": cache[..., :512],
        "kpe_cache": cache[..., 512:],
    }
