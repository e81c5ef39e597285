"""Servers of compare_sglang.py that differ from the first one in their options, by part."""

from __future__ import annotations

import dataclasses
import re

Options = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Servers that are judged together.

    Attributes
    ----------
    servers : dict
        Backend and options by the server's name.
    gpus : int
        What each server needs.
    heads : int, optional
        Of a checkpoint of their own.
    has_logprobs : bool
        Whether requests ask for log-probabilities.
    """

    servers: dict[str, tuple[str, Options]]
    gpus: int = 1
    heads: int | None = None
    has_logprobs: bool = True


def _with(part: str, options: Options, *backends: str) -> dict[str, tuple[str, Options]]:
    return {f"{backend}_{part}": (backend, options) for backend in backends}


def _decode_only(prefill: str) -> Options:
    return ("--decode-attention-backend", "etap", "--prefill-attention-backend", prefill)


TWO_GPUS: Options = ("--tp-size", "2", "--enforce-disable-flashinfer-allreduce-fusion")
# SGLang never mixes decode into a prefill batch in which a request wants log-probabilities. Small
# chunks: more batches to mix.
MIXED: Options = ("--enable-mixed-chunk", "--chunked-prefill-size", "512")
VARIANTS = {
    "fa3": Variant({"fa3": ("fa3", ())}),
    "prefill": Variant({"etap_prefill_fa3": ("fa3", _decode_only("fa3"))}),
    # etap alone: SGLang 0.5.16's flashmla and flashinfer die of a mixed batch.
    "mixed": Variant(_with("mixed", MIXED, "etap"), has_logprobs=False),
    "tp": Variant(_with("tp", TWO_GPUS, "etap", "flashmla", "triton"), gpus=2),
    # Each rank attends with all heads: as many as DeepSeek-V3 has.
    "dp": Variant(
        _with(
            "dp",
            (*TWO_GPUS, "--dp-size", "2", "--enable-dp-attention"),
            "etap",
            "flashmla",
            "triton",
        ),
        gpus=2,
        heads=128,
    ),
}
# NVLink multicast stays off: SGLang's fusion of all-reduce (above) and NCCL would use it, and a
# host whose GPUs are shared may not stand it. Ranks find each other without a network. Servers on
# one GPU beside these must not look like an imbalance.
TWO_GPU_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "SGLANG_HOST_IP": "127.0.0.1",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
PREFILL_BESIDE_DECODE = re.compile(r"^.*Prefill batch.*#running-req: [1-9]", re.MULTILINE)


def environment_of(variant: Variant) -> dict[str, str]:
    """What a variant's servers need in their environment."""
    return TWO_GPU_ENVIRONMENT if variant.gpus > 1 else {}


def missing_gpus(parts: list[str]) -> str | None:
    """Why the parts asked for can't run here; None if they can."""
    import torch

    here = torch.cuda.device_count()
    short = [part for part in parts if part in VARIANTS and VARIANTS[part].gpus > here]
    return f"{', '.join(short)}: 2 GPUs needed, {here} found" if short else None


def mixed_batches(log: str) -> int:
    """Prefill batches in a server's log that were formed while requests were decoded."""
    return len(PREFILL_BESIDE_DECODE.findall(log))
