"""Packaging of etap-flashinfer; the configuration of the tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read the version without importing the package, which needs torch."""
    text = (ROOT / "etap_flashinfer" / "version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("etap_flashinfer/version.py holds no __version__")
    return match.group(1)


setup(
    name="etap-flashinfer",
    version=read_version(),
    description="ETAP MLA decode kernels for Hopper GPUs behind FlashInfer's MLA wrapper interface",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The kernel sources stay at the top level of the repository and are installed inside the
    # package, so that an installed wheel compiles as a checkout does.
    packages=["etap_flashinfer", "etap_flashinfer.csrc", "sglang_patch"],
    package_dir={"etap_flashinfer.csrc": "csrc"},
    package_data={
        "etap_flashinfer": ["py.typed"],
        "etap_flashinfer.csrc": ["*"],
        "sglang_patch": ["py.typed"],
    },
    entry_points={
        # SGLang calls this in every process, before it reads its arguments.
        "sglang.srt.plugins": ["etap = sglang_patch.plugin:register"],
        "console_scripts": ["etap-sglang-check = sglang_patch.check:main"],
    },
    install_requires=["torch>=2.5", "jinja2", "filelock", "apache-tvm-ffi>=0.1.11,<0.2"],
    extras_require={
        "flashinfer": ["flashinfer-python>=0.6.14"],
        "test": ["pytest", "hypothesis", "numpy", "nvidia-cuda-nvdisasm", "setuptools>=77"],
        "bench": ["matplotlib", "tqdm"],
    },
)
