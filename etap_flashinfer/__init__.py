"""ETAP MLA decode kernels for Hopper GPUs behind FlashInfer's MLA wrapper interface."""

from .version import __version__

__all__ = ["__version__"]
