"""A plain C++ header of csrc, compiled with the system's compiler and called through ctypes."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def load(directory: Path, wrapper: str) -> ctypes.CDLL:
    """``wrapper`` includes the header and exports functions. Undefined behaviour aborts."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = directory / "header.cpp", directory / "header.so"
    source.write_text(wrapper)
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fsanitize=undefined", "-fPIC", "-shared"]
    flags.append("-fno-sanitize-recover=all")
    subprocess.run([compiler, *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
