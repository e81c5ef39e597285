"""What differs between the SGLang versions served, 0.5.16 to 0.5.23."""

import importlib.metadata
import re
from typing import Any

Version = tuple[int, int, int]

OLDEST: Version = (0, 5, 16)
NEWEST: Version = (0, 5, 23)


def sglang_version() -> str | None:
    """The installed SGLang's version; None where it is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _parsed(version: str) -> Version | None:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def version_refusal(version: str) -> str | None:
    """Say why an SGLang version can't be served; None if it can, or may."""
    parsed = _parsed(version)
    if parsed is not None and parsed < OLDEST:
        return (
            f"SGLang {version} is too old for the attention backend 'etap', which needs "
            f"{_text(OLDEST)} to {_text(NEWEST)}: upgrade SGLang, or use another backend"
        )
    return None


def version_warning(version: str) -> str | None:
    """Say that an SGLang version was never tried; None if it was."""
    parsed = _parsed(version)
    if parsed is None or parsed > NEWEST:
        return (
            f"the attention backend 'etap' was tested with SGLang {_text(OLDEST)} to "
            f"{_text(NEWEST)}; the installed {version} is not one of them"
        )
    return None


def speculative_setting(runner: Any, name: str) -> Any:
    """Read one of the ``speculative_*`` settings of the server (moved in 0.5.17)."""
    try:
        from sglang.srt.runtime_context import get_spec
    except ImportError:
        return getattr(runner.server_args, name)
    return getattr(get_spec(), name)


def write_location(forward_batch: Any) -> Any:
    """Where the cache entries of a batch's new tokens go (wrapped since 0.5.22)."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    for_batch = getattr(KVWriteLoc, "for_batch", None)
    return forward_batch.out_cache_loc if for_batch is None else for_batch(forward_batch)


def translates_pages(backend: Any) -> bool:
    """Whether ``req_to_token`` holds virtual indices (unified memory pool, since 0.5.19)."""
    translator = getattr(backend, "kv_index_translator", None)
    return bool(
        getattr(translator, "reads_are_translated", False)
        or getattr(translator, "is_translating", False)
    )


def cache_dtype_refusal(kv_cache_dtype: Any) -> str | None:
    """Say why a type of the cache can't be served; None if it can.

    Parameters
    ----------
    kv_cache_dtype : torch.dtype or str
        As the model runner has it, or as given to ``--kv-cache-dtype``.
    """
    name = str(kv_cache_dtype).removeprefix("torch.")
    if name in ("auto", "bf16", "bfloat16", "float16", "fp8_e4m3", "float8_e4m3fn"):
        return None
    return (
        f"it does not read a cache of type {name}; allowed: --kv-cache-dtype auto, bf16 or fp8_e4m3"
    )


def prefill_backend_refusal(server_args: Any) -> str | None:
    """Say why another backend can't prefill, or decode, beside this one; None if it can.

    Where prefill and decode have backends of their own, SGLang 0.5.16 never tells FlashInfer's
    prefill, which ``etap`` and ``flashmla`` have too, about cached prefixes: the server would die
    with the first long one.
    """
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    default = getattr(server_args, "attention_backend", None)
    prefill = getattr(server_args, "prefill_attention_backend", None) or default
    decode = getattr(server_args, "decode_attention_backend", None) or default
    is_told = hasattr(HybridAttnBackend, "init_mha_chunk_metadata") or getattr(
        server_args, "disable_chunked_prefix_cache", False
    )
    if prefill == decode or prefill not in ("etap", "flashinfer", "flashmla") or is_told:
        return None
    return (
        f"this SGLang does not tell the prefill of {prefill} about cached prefixes when {decode} "
        "decodes; use --attention-backend etap, which prefills with FlashInfer, for both, another "
        "--prefill-attention-backend (fa3, triton), or --disable-chunked-prefix-cache"
    )


def make_tree_mask(
    max_bs: int, max_num_tokens: int, max_context_len: int, num_draft_tokens: int, device: Any
) -> Any:
    """Make the buffer that SGLang writes a draft's tree mask to, in the form its version wants."""
    try:
        from sglang.srt.layers.attention.verify_mask import maybe_create_verify_mask
    except ImportError:  # 0.5.16: the mask over all tokens
        import torch

        num_flags = max_num_tokens * (max_context_len + num_draft_tokens)
        return torch.zeros(num_flags, dtype=torch.bool, device=device)
    return maybe_create_verify_mask(
        is_draft_runner=False,
        skip_prefill=False,
        max_bs=max_bs,
        max_context_len=max_context_len,
        num_draft_tokens=num_draft_tokens,
        device=device,
        is_read=False,
    )
