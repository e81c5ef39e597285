"""SGLang's kit for MLA backends with an fp8 cache, which only some of its tests offer."""

from __future__ import annotations

import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _cast(keys: torch.Tensor) -> torch.Tensor:
    """What SGLang's pool keeps of the keys."""
    return keys.to(torch.float8_e4m3fn).to(keys.dtype)


@contextmanager
def fp8_cache(mla: Any) -> Iterator[None]:
    """Give the kit's runners a pool of e4m3, and let its reference read what the cast leaves.

    So its tolerance is as tight as with bf16: it allows for nothing that the cast loses.

    Parameters
    ----------
    mla : module
        ``sglang.test.kits.attention_unittest.attention_methods.mla_attention``.
    """
    runner, reference = mla.MockMLAModelRunner, mla.ReferenceDeepseekMLAAttention
    initialize, project = runner.__init__, reference.project_latent_qk

    def initialize_fp8(self: Any, **named: Any) -> None:
        initialize(self, **{**named, "fp8_kv_cache": True})

    def project_cast(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_nope, k_nope, q_rope, k_rope = project(self, hidden)
        return q_nope, _cast(k_nope), q_rope, _cast(k_rope)

    with (
        unittest.mock.patch.object(runner, "__init__", initialize_fp8),
        unittest.mock.patch.object(reference, "project_latent_qk", project_cast),
    ):
        yield
