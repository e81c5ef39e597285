"""Compile the kernel variants for sm_90a and check what ptxas made of them. Needs no GPU.

Fails on register spills, on WGMMAs that ptxas serialised, on local memory in the SASS, and on WGMMA
shapes other than the row tile's own: 64 x row_tile for S^T = K Q^T and 64 x 2 row_tile for O^T =
V^T P^T, where P's high and low parts lie side by side; of 64 rows and more, which fill M
themselves, 64 x 64 for S = Q K^T and 64 x 128 for O = P V, or 64 x 256 with more than 64. With an
fp8 cache S^T has operands of fp16, to which e4m3 converts exactly, and O^T up to 16 rows operands
of e4m3; with more, or FlashMLA's layout, it is like S^T. The SASS is read with nvdisasm (of the
CUDA toolkit, or ``pip install nvidia-cuda-nvdisasm``); without it that part is left out, and the
output says so.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from etap_flashinfer.aot import select_variants
from etap_flashinfer.jit import ALL_VARIANTS, EtapJitError, EtapMlaVariant, compile_command

_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_KERNEL_NAME = re.compile(r"etap_mla_(?:[a-z]+_)?kernel")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_SERIALIZED = re.compile(r"C75\d\d|wgmma\.mma_async instructions are serialized", re.IGNORECASE)
_WGMMA = re.compile(r"\b[HQ]GMMA\.(\d+)x(\d+)x(\d+)\S*")  # Q: of 8-bit types
_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b\S*")


@dataclass
class KernelUsage:
    """What ptxas reports of one kernel: bytes, and registers a thread."""

    name: str
    registers: int = 0
    static_smem: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


@dataclass
class VariantReport:
    """Result of one variant; ``problems`` is empty if all is well."""

    variant: EtapMlaVariant
    kernels: list[KernelUsage] = field(default_factory=list)
    wgmma_shapes: set[tuple[int, int, int]] | None = None  # None: the SASS was not read
    problems: list[str] = field(default_factory=list)


def multiplies_codes(variant: EtapMlaVariant) -> bool:
    """Whether O^T = V^T P^T has operands of e4m3."""
    return variant.kv_cache == "fp8" and variant.row_tile <= 16


def expected_wgmma_shapes(variant: EtapMlaVariant) -> set[tuple[int, int, int]]:
    """WGMMA shapes (M, N, K) of both products.

    P has two parts side by side, but one with an fp8 cache; as e4m3 it has two, which stand side by
    side, or three, which don't.
    """
    row_tile = variant.row_tile
    if multiplies_codes(variant):
        are_side_by_side = variant.short_name.startswith("bf16")
        return {(64, row_tile, 16), (64, row_tile * (2 if are_side_by_side else 1), 32)}
    if variant.kv_cache != "same":
        return {(64, row_tile, 16)}
    if row_tile == 128:
        return {(64, 64, 16), (64, 256, 16)}
    if row_tile == 64:  # rows on M
        return {(64, 64, 16), (64, 128, 16)}
    return {(64, row_tile, 16), (64, 2 * row_tile, 16)}


def parse_ptxas(output: str) -> list[KernelUsage]:
    """Read the output of ``-Xptxas -v``."""
    kernels: list[KernelUsage] = []
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            name = _KERNEL_NAME.search(match[1])  # within the mangled one
            kernels.append(KernelUsage(name[0] if name else match[1]))
        elif kernels and (match := _SPILLS.search(line)):
            # Functions that are not inlined are listed after their kernel and count with it.
            kernels[-1].stack += int(match[1])
            kernels[-1].spill_stores += int(match[2])
            kernels[-1].spill_loads += int(match[3])
        elif kernels and (match := _USED.search(line)):
            kernels[-1].registers = int(match[1])
            kernels[-1].static_smem = int(match[2] or 0)
    return kernels


def ptxas_problems(output: str) -> list[str]:
    """What is wrong according to the output of ``-Xptxas -v``."""
    kernels = parse_ptxas(output)
    problems = [] if kernels else ["ptxas reported no kernel"]
    problems += [
        f"{kernel.name} spills: {kernel.spill_stores} bytes stored, {kernel.spill_loads} loaded"
        for kernel in kernels
        if kernel.spill_stores or kernel.spill_loads
    ]
    problems += [line.strip() for line in output.splitlines() if _SERIALIZED.search(line)]
    return problems


def sass_wgmma_shapes(sass: str) -> set[tuple[int, int, int]]:
    """WGMMA shapes (M, N, K) that occur in SASS."""
    return {(int(m[1]), int(m[2]), int(m[3])) for m in _WGMMA.finditer(sass)}


def sass_problems(sass: str, variant: EtapMlaVariant) -> list[str]:
    """What is wrong in a variant's SASS: local memory, WGMMA shapes, operand types."""
    problems = []
    if local := _LOCAL_MEMORY.findall(sass):
        problems.append(
            f"local memory: {len(local)} instructions ({', '.join(sorted(set(local)))})"
        )
    found, expected = sass_wgmma_shapes(sass), expected_wgmma_shapes(variant)
    if found != expected:
        problems.append(f"WGMMA shapes {_shapes(found)}, expected {_shapes(expected)}")
    instructions = {m[0] for m in _WGMMA.finditer(sass)}
    if wrong := {each for each in instructions if not _has_expected_types(each, variant)}:
        problems.append(f"WGMMA of other types than {variant.dtype}: {', '.join(sorted(wrong))}")
    return problems


def _has_expected_types(instruction: str, variant: EtapMlaVariant) -> bool:
    """Whether a WGMMA accumulates in fp32 and its operands are the variant's."""
    if ".F32" not in instruction:
        return False
    if instruction.startswith("QGMMA"):
        return multiplies_codes(variant) and ".E4M3.E4M3" in instruction
    if variant.kv_cache != "same":
        return True
    return ("BF16" in instruction) == variant.short_name.startswith("bf16")


def _shapes(shapes: set[tuple[int, int, int]]) -> str:
    return " ".join("x".join(map(str, shape)) for shape in sorted(shapes)) or "none"


def find_nvdisasm() -> str | None:
    """Path of nvdisasm: on PATH, in the CUDA toolkit or in the nvidia-cuda-nvdisasm package."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    directories = [
        *os.environ.get("PATH", "").split(os.pathsep),
        str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"),
        *(str(path) for path in sorted(packages.glob("*/bin"))),
    ]
    return shutil.which("nvdisasm", path=os.pathsep.join(directories))


def cubin_command(command: Sequence[str], cubin: Path) -> list[str]:
    """Turn the command that compiles an object file into one for a cubin, with ptxas's report."""
    command = list(command)
    command[command.index("-c")] = "-cubin"
    command[command.index("-o") + 1] = str(cubin)
    return [*command, "-Xptxas", "-v"]


def check_variant(
    variant: EtapMlaVariant, command: Sequence[str], nvdisasm: str | None
) -> VariantReport:
    """Compile one variant's device code and check it."""
    report = VariantReport(variant)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "etap_mla.cubin"
        nvcc = subprocess.run(cubin_command(command, cubin), capture_output=True, text=True)
        output = nvcc.stdout + nvcc.stderr
        if nvcc.returncode != 0:
            report.problems.append(f"nvcc exits with {nvcc.returncode}:\n{output[-4000:]}")
            return report
        report.kernels = parse_ptxas(output)
        report.problems += ptxas_problems(output)
        if nvdisasm is not None:
            sass = subprocess.run(
                [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            report.wgmma_shapes = sass_wgmma_shapes(sass)
            report.problems += sass_problems(sass, variant)
    return report


def check_variants(
    variants: Sequence[EtapMlaVariant], jobs: int, nvdisasm: str | None
) -> Iterator[VariantReport]:
    """Check variants, `jobs` at a time, in their order.

    Raises
    ------
    EtapJitError
        If flashinfer or nvcc is missing.
    """
    commands = [compile_command(variant) for variant in variants]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check_variant, variants, commands, itertools.repeat(nvdisasm))


def describe(report: VariantReport) -> str:
    """Lines for a person: a verdict, each kernel, each problem."""
    lines = [f"{report.variant.short_name}: {'FAILED' if report.problems else 'ok'}"]
    if report.wgmma_shapes is not None:
        lines[0] += f", WGMMA {_shapes(report.wgmma_shapes)}"
    lines += [
        f"  {kernel.name}: {kernel.registers} registers, {kernel.static_smem} bytes static "
        f"smem, {kernel.stack} bytes stack, {kernel.spill_stores + kernel.spill_loads} spilled"
        for kernel in report.kernels
    ]
    return "\n".join(lines + [f"  problem: {problem}" for problem in report.problems])


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(variant.short_name for variant in ALL_VARIANTS)} (default: all)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args()
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        print("no nvdisasm: the SASS is not checked (pip install nvidia-cuda-nvdisasm)")
    failed = 0
    try:
        for report in check_variants(select_variants(options.variants), options.jobs, nvdisasm):
            print(describe(report), flush=True)
            failed += bool(report.problems)
    except (EtapJitError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{failed} variants failed" if failed else "all variants passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
