"""ETAP MLA decode kernels for Hopper GPUs behind FlashInfer's MLA wrapper interface."""

from .mla import BatchMLAPagedAttentionWrapper
from .version import __version__

__all__ = ["BatchMLAPagedAttentionWrapper", "__version__"]
