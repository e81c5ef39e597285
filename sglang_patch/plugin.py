"""Registration with SGLang, through its plugin entry point and hooks only.

SGLang's loader logs what a plugin raises and goes on, and so it does with a hook that can't be
applied. The server would then say "invalid choice: 'etap'", or run with half of a registration.
So what goes wrong here is said in the log with the word etap in it, and :func:`create` checks that
everything is in its place before a backend is made.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from . import compat

logger = logging.getLogger(__name__)

BACKEND = "etap"
DEFAULT_PAGE_SIZE = 64
PAGE_SIZE_PASS = "sglang.srt.arg_groups.overrides._mla_backend_page_constraints"
DRAFT_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"


def register() -> None:
    """Make ``--attention-backend etap`` known to SGLang: the entry point's function."""
    version = compat.sglang_version() or "of an unknown version"
    try:
        _register(version)
    except Exception:
        logger.exception(
            "etap-flashinfer could not add its attention backend 'etap' to SGLang %s, which will "
            "not accept --attention-backend etap; `etap-sglang-check` says more",
            version,
        )


@functools.cache
def _register(version: str) -> None:
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(create)
    if refusal := compat.version_refusal(version):
        # Only said, and raised by create(): the user may want another backend.
        logger.error("%s", refusal)
        return
    if warning := compat.version_warning(version):
        logger.warning("%s", warning)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    server_args.add_chunked_prefix_cache_attention_backend(BACKEND)
    HookRegistry.register(PAGE_SIZE_PASS, _resolve_arguments, HookType.AFTER)
    HookRegistry.register(DRAFT_FACTORY, _create_draft_backend, HookType.AROUND)


def _resolve_arguments(declared: dict[str, Any], view: Any) -> dict[str, Any]:
    """Default to pages of 64 tokens, and refuse other caches before any weight is loaded.

    Runs after SGLang's own pass over the page size, while arguments are resolved.
    """
    backends = (view.attention_backend, view.decode_attention_backend)
    if BACKEND not in backends:
        return declared
    if refusal := compat.cache_dtype_refusal(view.kv_cache_dtype):
        raise ValueError(f"--attention-backend {BACKEND}: {refusal}")
    if view.page_size is None and "page_size" not in declared:
        logger.info("Attention backend 'etap': page size %d", DEFAULT_PAGE_SIZE)
        return {**declared, "page_size": DEFAULT_PAGE_SIZE}
    return declared


def _create_draft_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], Any]],
    *arguments: Any,
    **options: Any,
) -> Any:
    """Add ``etap`` to the draft backends, which SGLang lists in a local variable.

    The map of the steps of a multi-step draft is told from that of draft-extend by the function
    that stands there for FlashMLA.
    """
    is_multi_step = backend_map["flashmla"] == factory._create_flashmla_decode_backend

    def make() -> Any:
        from .backend import EtapMLABackend, EtapMultiStepDraftBackend

        runner = factory.draft_model_runner
        _prepare_models()
        backend: Any
        if is_multi_step:
            backend = EtapMultiStepDraftBackend(runner, factory.topk, factory.speculative_num_steps)
        else:
            _allow_draft_extend_graph()
            backend = EtapMLABackend(runner, skip_prefill=False)
        # Since 0.5.18 an entry also says under which name the backend runs.
        is_stamped = "stamps_children" in inspect.signature(original).parameters
        return (BACKEND, backend) if is_stamped else backend

    return original(factory, backend_name, {**backend_map, BACKEND: make}, *arguments, **options)


@functools.cache
def _allow_draft_extend_graph() -> None:
    """Let SGLang capture draft-extend in a CUDA graph, which it does for classes in a list only.

    The list is local to a method. FlashMLA's backend is in it, which has the same parent and the
    same contract; backends are abstract base classes, so another can be registered as one. Nothing
    else in SGLang asks whether a backend is FlashMLA's.
    """
    from sglang.srt.layers.attention.flashmla_backend import FlashMLABackend

    from .backend import EtapMLABackend

    FlashMLABackend.register(EtapMLABackend)


def create(runner: Any) -> Any:
    """Make the backend for a model runner: what SGLang's registry calls, before any forward."""
    if refusal := compat.version_refusal(compat.sglang_version() or ""):
        raise RuntimeError(refusal)
    if missing := missing_hooks():
        raise RuntimeError(
            "the attention backend 'etap' is registered only in part; SGLang did not apply its "
            f"hooks to {', '.join(missing)}. The log of the plugin loader, above, says why; "
            "`etap-sglang-check` tries again"
        )
    if not runner.use_mla_backend:
        raise ValueError(
            "--attention-backend etap serves multi-head latent attention (DeepSeek-style models); "
            "this model has none: use another backend"
        )
    _prepare_models()
    from .backend import EtapMLABackend

    return EtapMLABackend(runner)


def missing_hooks() -> list[str]:
    """Names of the functions of SGLang that should be hooked and are not."""
    import pkgutil

    return [
        target
        for target in (PAGE_SIZE_PASS, DRAFT_FACTORY)
        if not hasattr(pkgutil.resolve_name(target), "__wrapped__")
    ]


@functools.cache
def _prepare_models() -> None:
    """Tell DeepSeek's model code how to call the backend.

    Prefill chooses between plain and absorbed attention as it does for FlashMLA, whose parent is
    ours too, and queries and cache entries come in two parts, which saves two copies a layer.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler, utils

    attention_backend_handler.AttentionBackendRegistry.register(
        BACKEND, attention_backend_handler.handle_attention_flashmla
    )
    if BACKEND not in utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(BACKEND)
