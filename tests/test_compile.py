"""Compile the kernel for sm_90a, which needs nvcc but no GPU, and look at what came out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import check_ptxas
import pytest
import torch

from etap_flashinfer import dispatch, jit

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def nvcc():
    """Skip without what compiling needs; in CI, where all of it is there, fail."""
    try:
        jit.compile_command(jit.ALL_VARIANTS[0])
    except jit.EtapJitError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reports(nvcc):
    """Reports of all variants, compiled on all cores."""
    nvdisasm = check_ptxas.find_nvdisasm()
    assert nvdisasm, "no nvdisasm: pip install nvidia-cuda-nvdisasm (part of the extra `test`)"
    jobs = os.cpu_count() or 1
    return {
        report.variant: report
        for report in check_ptxas.check_variants(jit.ALL_VARIANTS, jobs, nvdisasm)
    }


@pytest.mark.compile
@pytest.mark.parametrize("variant", jit.ALL_VARIANTS, ids=lambda variant: variant.short_name)
def test_variant_has_no_spills_and_the_expected_wgmma_shapes(variant, reports):
    report = reports[variant]
    print(check_ptxas.describe(report))
    assert not report.problems
    assert report.kernels
    assert all(kernel.registers > 0 for kernel in report.kernels)
    assert report.wgmma_shapes == check_ptxas.expected_wgmma_shapes(variant)


@pytest.mark.compile
def test_aot_module_loads_without_nvcc_and_flashinfer(nvcc, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    variant = jit.ALL_VARIANTS[0]
    command = [sys.executable, "-m", "etap_flashinfer.aot", "--out", str(tmp_path)]
    subprocess.run([*command, "--variants", variant.short_name], env=environment, check=True)
    manifest = json.loads((tmp_path / jit.AOT_MANIFEST).read_text())
    assert list(manifest["modules"]) == [variant.short_name]
    code = (
        "import sys; sys.modules['flashinfer'] = None\n"
        "from etap_flashinfer import jit\n"
        "jit.require_hopper = lambda: None\n"
        "module = jit.get_etap_mla_module(jit.ALL_VARIANTS[0])\n"
        "assert module is jit.get_etap_mla_module(jit.ALL_VARIANTS[0])\n"
        "module.run, module.workspace_bytes, module.fixed_split_workspace_bytes\n"
        "module.kept_bytes\n"
    )
    environment |= {jit.AOT_DIR_ENV: str(tmp_path), "PATH": "", "CUDA_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.compile
def test_two_processes_compile_and_load_at_the_same_time(nvcc, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["FLASHINFER_WORKSPACE_BASE"] = str(tmp_path)
    environment.pop(jit.AOT_DIR_ENV, None)
    code = (
        "from etap_flashinfer import jit\n"
        "jit.require_hopper = lambda: None\n"
        "module = jit.get_etap_mla_module(jit.ALL_VARIANTS[0])\n"
        "module.run, module.workspace_bytes, module.kept_bytes\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (library,) = tmp_path.rglob("*.so")
    assert library.stem == jit.ALL_VARIANTS[0].name


# --- the checks themselves ------------------------------------------------------------------------

_PTXAS = """\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'etap_mla' for 'sm_90a'
ptxas info    : Function properties for etap_mla
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 96 bytes smem
ptxas info    : Compiling entry function '_ZN4etap21etap_mla_merge_kernelIE' for 'sm_90a'
ptxas info    : Function properties for _ZN4etap21etap_mla_merge_kernelIE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""


def test_ptxas_report_is_read():
    output = _PTXAS.format(stack=0, stores=0, loads=0)
    first, second = check_ptxas.parse_ptxas(output)
    assert (first.name, first.registers, first.static_smem) == ("etap_mla", 168, 96)
    assert (second.name, second.registers, second.static_smem) == ("etap_mla_merge_kernel", 32, 0)
    assert check_ptxas.ptxas_problems(output) == []


@pytest.mark.parametrize(("stores", "loads"), [(8, 0), (0, 4)])
def test_spills_are_a_problem(stores, loads):
    output = _PTXAS.format(stack=16, stores=stores, loads=loads)
    (problem,) = check_ptxas.ptxas_problems(output)
    assert problem == f"etap_mla spills: {stores} bytes stored, {loads} loaded"


@pytest.mark.parametrize(
    "warning",
    [
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in function 'etap_mla'",
        "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored",
        "Wgmma.mma_async instructions are serialized in function 'etap_mla'",
    ],
)
def test_wgmma_warnings_are_a_problem(warning):
    output = _PTXAS.format(stack=0, stores=0, loads=0) + warning
    assert check_ptxas.ptxas_problems(output) == [warning]


def test_no_kernel_is_a_problem():
    assert check_ptxas.ptxas_problems("") == ["ptxas reported no kernel"]


def sass(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/  {each} ;" for i, each in enumerate(instructions))


_QK = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT"
_PV = "HGMMA.64x32x16.F32.BF16 R32, gdesc[UR8].tnspA, R32, gsb0"


def bf16_n16(kv_cache="same"):
    return jit.EtapMlaVariant(torch.bfloat16, 16, "tma", kv_cache)


def test_expected_shapes():
    variants = [jit.EtapMlaVariant(torch.bfloat16, n, "tma") for n in dispatch.ROW_TILES]
    widths = [sorted(s[1] for s in check_ptxas.expected_wgmma_shapes(v)) for v in variants]
    assert widths == [[8, 16], [16, 32], [32, 64], [64, 128], [64, 256]]
    assert check_ptxas.expected_wgmma_shapes(bf16_n16("flashmla_656")) == {(64, 16, 16)}


@pytest.mark.parametrize(
    ("dtype", "row_tile", "shapes"),
    [
        (torch.bfloat16, 8, {(64, 8, 16), (64, 16, 32)}),
        (torch.bfloat16, 16, {(64, 16, 16), (64, 32, 32)}),
        (torch.bfloat16, 32, {(64, 32, 16)}),
        (torch.bfloat16, 64, {(64, 64, 16)}),
        (torch.float16, 16, {(64, 16, 16), (64, 16, 32)}),  # three parts, one after another
    ],
)
def test_expected_shapes_with_an_fp8_cache(dtype, row_tile, shapes):
    variant = jit.EtapMlaVariant(dtype, row_tile, "tma", "fp8")
    assert check_ptxas.expected_wgmma_shapes(variant) == shapes


def test_sass_as_expected_is_no_problem():
    assert check_ptxas.sass_problems(sass(_QK, _PV, "LDG.E R0, [R2.64]"), bf16_n16()) == []


_FP16 = _QK.replace(".BF16", "")
_FP8 = "QGMMA.64x32x32.F32.E4M3.E4M3 R24, R4, gdesc[UR4], R24"
_FP8_N16 = _FP8.replace("64x32x32", "64x16x16")  # an expected shape of unexpected operands


@pytest.mark.parametrize("instructions", [[_QK], [_FP16], [_QK, _FP16]])
def test_either_type_serves_flashmlas_layout(instructions):
    assert check_ptxas.sass_problems(sass(*instructions), bf16_n16("flashmla_656")) == []


def test_codes_are_multiplied_with_an_fp8_cache():
    assert check_ptxas.sass_problems(sass(_FP16, _FP8), bf16_n16("fp8")) == []


@pytest.mark.parametrize(
    ("kv_cache", "instructions", "problem"),
    [
        ("flashmla_656", [], "WGMMA shapes none"),
        ("flashmla_656", [_QK, _PV], "WGMMA shapes 64x16x16 64x32x16, expected 64x16x16"),
        ("flashmla_656", [_FP16.replace("F32", "F16")], "WGMMA of other types"),
        ("flashmla_656", [_FP8_N16], "WGMMA of other types"),
        ("fp8", [_FP16], "WGMMA shapes 64x16x16, expected 64x16x16 64x32x32"),
        ("fp8", [_FP16, _FP8.replace("F32", "F16", 1)], "WGMMA of other types"),
        ("fp8", [_FP16, _FP8.replace("E4M3.E4M3", "E5M2.E4M3")], "WGMMA of other types"),
    ],
)
def test_sass_problems_with_an_fp8_cache(kv_cache, instructions, problem):
    (found,) = check_ptxas.sass_problems(sass(*instructions), bf16_n16(kv_cache))
    assert problem in found


@pytest.mark.parametrize(
    ("instructions", "problem"),
    [
        ([_QK, _PV, _FP8_N16], "WGMMA of other types"),
        ([_QK], "WGMMA shapes 64x16x16, expected 64x16x16 64x32x16"),
        ([], "WGMMA shapes none"),
        ([_QK, _PV, "HGMMA.64x64x16.F32.BF16 R0, gdesc[UR4], R0"], "64x64x16, expected"),
        ([_QK, _PV, "STL.64 [R1+0x8], R2"], "local memory: 1 instructions (STL.64)"),
        ([_QK, _PV, "@P0 LDL R2, [R1]"], "local memory: 1 instructions (LDL)"),
        ([_QK.replace(".BF16", ""), _PV], "WGMMA of other types than torch.bfloat16"),
        ([_QK.replace("F32", "F16"), _PV], "WGMMA of other types than torch.bfloat16"),
    ],
)
def test_sass_problems_are_found(instructions, problem):
    (found,) = check_ptxas.sass_problems(sass(*instructions), bf16_n16())
    assert problem in found


# --- packaging ------------------------------------------------------------------------------------


def test_wheel_carries_the_sources(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("etap_flashinfer", "csrc", "sglang_patch"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = wheels.glob("etap_flashinfer-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = (
        "from etap_flashinfer import jit\n"
        "assert jit.csrc_dir().parent.name == 'etap_flashinfer'\n"
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='sglang.srt.plugins', name='etap')\n"
        "assert callable(point.load())\n"
        "(command,) = entry_points(group='console_scripts', name='etap-sglang-check')\n"
        "assert callable(command.load())\n"
        "print(jit.csrc_sha256())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == jit.csrc_sha256()
