"""Rendering, naming, loading and every error path of the JIT; no compiler and no GPU needed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from etap_flashinfer import aot, jit

REPOSITORY = Path(__file__).resolve().parents[1]
VARIANT = jit.EtapMlaVariant(torch.bfloat16, 16, "tma")
each_variant = pytest.mark.parametrize(
    "variant", jit.ALL_VARIANTS, ids=lambda variant: variant.short_name
)


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """Sources of a module that is no kernel, with the package's own configuration template."""
    directory = tmp_path / "csrc"
    directory.mkdir()
    template = jit.csrc_dir() / "etap_mla_config.jinja"
    (directory / template.name).write_text(template.read_text())
    (directory / "etap_mla_binding.cu").write_text('#include "etap_mla_config.inc"\n')
    (directory / "etap_mla_traits.cuh").write_text("#pragma once\n")
    monkeypatch.setattr(jit, "csrc_dir", lambda: directory)
    return directory


@pytest.fixture
def flashinfer_jit(tmp_path, monkeypatch):
    """FlashInfer's JIT with its directories moved to a temporary one and no target set."""
    pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    modules = jit._flashinfer_jit()
    monkeypatch.setattr(modules.env, "FLASHINFER_GEN_SRC_DIR", tmp_path / "generated")
    monkeypatch.setattr(modules.env, "FLASHINFER_JIT_DIR", tmp_path / "cached_ops")
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("FLASHINFER_NVCC", raising=False)
    return modules


@pytest.fixture
def fake_cuda(tmp_path, flashinfer_jit, monkeypatch):
    """A CUDA toolkit whose nvcc fails, and a function that replaces what the nvcc does."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)

    def write_nvcc(body: str) -> None:
        version = "release 13.0, V13.0.88"
        nvcc.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit; fi\n{body}\n'
        )
        nvcc.chmod(0o755)

    write_nvcc("exit 1")
    monkeypatch.setattr(flashinfer_jit.cpp_ext, "get_cuda_path", lambda: str(nvcc.parents[1]))
    flashinfer_jit.cpp_ext.get_cuda_version.cache_clear()
    yield write_nvcc
    flashinfer_jit.cpp_ext.get_cuda_version.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(REPOSITORY)]))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


# --- variants and names ---------------------------------------------------------------------------


def test_all_variants_are_the_48():
    assert len(set(jit.ALL_VARIANTS)) == len({v.name for v in jit.ALL_VARIANTS}) == 48
    caches = [v.kv_cache for v in jit.ALL_VARIANTS]
    assert [caches.count(each) for each in ("same", "fp8", "flashmla_656")] == [20, 16, 12]
    for cache, row_tiles in (("same", 5), ("fp8", 4), ("flashmla_656", 3)):
        found = {v.row_tile for v in jit.ALL_VARIANTS if v.kv_cache == cache}
        assert sorted(found) == [8, 16, 32, 64, 128][:row_tiles]
    assert {v.dtype for v in jit.ALL_VARIANTS} == {torch.bfloat16, torch.float16}


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.float32, 16, "tma"),
        (torch.bfloat16, 24, "tma"),
        (torch.bfloat16, 16, "cp_async"),
        (torch.bfloat16, 16, "tma", "fp8_e5m2"),
        (torch.bfloat16, 64, "tma", "flashmla_656"),
    ],
)
def test_variant_names_what_is_allowed(arguments):
    with pytest.raises(ValueError, match="allowed: ") as error:
        jit.EtapMlaVariant(*arguments)
    assert any(repr(argument) in str(error.value) for argument in arguments)


@pytest.mark.parametrize(
    ("kv_cache", "short_name", "rendered"),
    [
        ("same", "bf16_n16_tma", "kSame"),
        ("fp8", "bf16_fp8_n16_tma", "kFp8"),
        ("flashmla_656", "bf16_flashmla_656_n16_tma", "kFp8FlashMla"),
    ],
)
def test_names_of_the_caches(kv_cache, short_name, rendered):
    variant = jit.EtapMlaVariant(torch.bfloat16, 16, "tma", kv_cache)
    assert variant.short_name == short_name
    assert variant.name.startswith(f"etap_mla_{short_name}_")
    assert jit._render_config("KvCache::{{ kv_cache }}", variant) == f"KvCache::{rendered}"


def test_hash_is_the_documented_one(csrc):
    (csrc / "nested").mkdir()
    (csrc / "nested" / "a.cuh").write_bytes(b"\r\n\xff")
    names = sorted(p.relative_to(csrc.parent).as_posix() for p in csrc.rglob("*") if p.is_file())
    assert names[-1] == "csrc/nested/a.cuh"
    digest = hashlib.sha256()
    for name in names:
        for part in (name.encode(), b"\0", (csrc.parent / name).read_bytes(), b"\0"):
            digest.update(part)
    assert jit.csrc_sha256() == digest.hexdigest()
    assert VARIANT.name == f"etap_mla_bf16_n16_tma_{digest.hexdigest()[:12]}"


def test_changed_source_changes_the_name(csrc):
    names = {VARIANT.name}
    (csrc / "etap_mla_traits.cuh").write_text("#pragma once\n// changed\n")
    names.add(VARIANT.name)
    (csrc / "etap_mla_traits.cuh").rename(csrc / "etap_mla_renamed.cuh")
    names.add(VARIANT.name)
    assert len(names) == 3


def test_missing_sources_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "csrc_dir", lambda: tmp_path)
    with pytest.raises(jit.EtapJitError, match="install etap-flashinfer again"):
        jit.csrc_sha256()


def test_import_leaves_flashinfer_alone():
    code = (
        "import sys, etap_flashinfer.jit, etap_flashinfer.aot\n"
        "assert not {'flashinfer', 'tvm_ffi'} & set(sys.modules)"
    )
    assert run_python(code).returncode == 0


# --- rendering and the spec -----------------------------------------------------------------------


@each_variant
def test_rendered_configuration(variant, csrc, flashinfer_jit):
    spec = jit.gen_etap_mla_module(variant)
    directory = Path(spec.sources[0]).parent
    config = (directory / "etap_mla_config.inc").read_text()
    dtype = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t"}[variant.short_name[:4]]
    loader = {"tma": "kTma", "gather": "kGather"}[variant.kv_loader]
    assert re.findall(r"using DType = (.*);", config) == [dtype]
    assert re.findall(r"constexpr int kRows = (\d+);", config) == [str(variant.row_tile)]
    assert re.findall(r"constexpr KvLoader kKvLoader = KvLoader::(.*);", config) == [loader]
    assert "{{" not in config
    binding = "etap_mla_binding.cu"
    assert (directory / binding).read_text() == (csrc / binding).read_text()


def test_undefined_template_variable_is_an_error():
    with pytest.raises(Exception, match="unknown_variable"):
        jit._render_config("{{ unknown_variable }}", VARIANT)


def test_spec_compiles_for_sm90a_only(csrc, flashinfer_jit, fake_cuda):
    spec = jit.gen_etap_mla_module(VARIANT)
    assert spec.name == VARIANT.name
    command = jit.compile_command(VARIANT)
    targets = [flag for flag in command if "gencode" in flag]
    assert targets == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert any(flag.endswith("cutlass/include") for flag in command)


@pytest.mark.parametrize("listed", [None, "8.0"])
def test_target_list_is_left_as_it_was(listed, csrc, flashinfer_jit, fake_cuda, monkeypatch):
    if listed is not None:
        monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", listed)
    targets = flashinfer_jit.core.current_compilation_context.TARGET_CUDA_ARCHS
    before = set(targets)
    with pytest.raises(jit.EtapJitError):
        jit.build_etap_mla_module(VARIANT)
    assert os.environ.get("FLASHINFER_CUDA_ARCH_LIST") == listed
    assert targets == before


def test_sources_are_written_once(csrc, flashinfer_jit):
    def times():
        generated = flashinfer_jit.env.FLASHINFER_GEN_SRC_DIR / VARIANT.name
        return {path: path.stat().st_mtime_ns for path in generated.rglob("*")}

    jit.gen_etap_mla_module(VARIANT)
    first = times()
    threads = [threading.Thread(target=jit.gen_etap_mla_module, args=[VARIANT]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) > 3
    assert times() == first


def test_nothing_is_written_beside_the_sources(csrc, flashinfer_jit, fake_cuda):
    before = sorted(csrc.rglob("*"))
    with pytest.raises(jit.EtapJitError):
        jit.build_etap_mla_module(VARIANT)
    assert sorted(csrc.rglob("*")) == before


# --- errors ---------------------------------------------------------------------------------------

_GENERATE = (
    "from etap_flashinfer import jit\n"
    "try:\n    jit.gen_etap_mla_module(jit.ALL_VARIANTS[0])\n"
    "except jit.EtapJitError as error:\n    print(error)\n"
)


def test_flashinfer_missing():
    result = run_python(f"import sys; sys.modules['flashinfer'] = None\n{_GENERATE}")
    assert "flashinfer, which is not installed" in result.stdout
    assert "pip install 'etap-flashinfer[flashinfer]'" in result.stdout


def test_flashinfer_fails_to_import(tmp_path):
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("raise RuntimeError('no driver found')\n")
    result = run_python(_GENERATE, PYTHONPATH=str(tmp_path))
    assert "does not import: RuntimeError: no driver found" in result.stdout
    assert "0.7.2.post1" in result.stdout
    assert jit.AOT_DIR_ENV in result.stdout


def test_nvcc_missing(csrc, flashinfer_jit, tmp_path, monkeypatch):
    monkeypatch.setattr(flashinfer_jit.cpp_ext, "get_cuda_path", lambda: str(tmp_path))
    with pytest.raises(jit.EtapJitError, match="set CUDA_HOME") as error:
        jit.build_etap_mla_module(VARIANT)
    assert f"{tmp_path}/bin/nvcc is not an executable file" in str(error.value)
    assert "etap_flashinfer.aot" in str(error.value)


def test_cuda_toolkit_missing(csrc, flashinfer_jit, monkeypatch):
    def get_cuda_path():
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(flashinfer_jit.cpp_ext, "get_cuda_path", get_cuda_path)
    with pytest.raises(jit.EtapJitError, match=r"Could not find nvcc.*set CUDA_HOME"):
        jit.build_etap_mla_module(VARIANT)


def test_ninja_missing(csrc, fake_cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(jit.EtapJitError, match="pip install ninja"):
        jit.build_etap_mla_module(VARIANT)


def test_failed_build_shows_the_compilers_last_lines(csrc, fake_cuda):
    fake_cuda("seq 1 1000; echo 'etap_mla.cuh(7): error: deliberate'; exit 1")
    with pytest.raises(jit.EtapJitError, match="error: deliberate") as error:
        jit.build_etap_mla_module(VARIANT)
    message = str(error.value)
    assert VARIANT.name in message
    assert "CUDA_HOME" in message
    assert "\n1000\n" in message
    assert "\n900\n" not in message


def test_disabled_jit(csrc, fake_cuda, monkeypatch):
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    with pytest.raises(jit.EtapJitError, match="FLASHINFER_DISABLE_JIT"):
        jit.build_etap_mla_module(VARIANT)


def set_gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )


def test_no_gpu(monkeypatch):
    set_gpus(monkeypatch)
    with pytest.raises(jit.EtapJitError, match=r"not on cpu. Use backend='auto' or 'reference'"):
        jit.get_etap_mla_module(VARIANT)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_gpu_is_not_hopper(monkeypatch, capability):
    set_gpus(monkeypatch, capability)
    found = f"has compute capability {capability[0]}.{capability[1]}. Use backend='auto'"
    with pytest.raises(jit.EtapJitError, match=re.escape(found)):
        jit.get_etap_mla_module(VARIANT)


def test_one_of_several_gpus_is_hopper(monkeypatch):
    set_gpus(monkeypatch, (8, 0), (9, 0))
    jit.require_hopper()
    set_gpus(monkeypatch, (8, 0), (10, 0))
    with pytest.raises(jit.EtapJitError, match=r"cuda:0 has .* 8.0; .*cuda:1 has .* 10.0\."):
        jit.require_hopper()


# --- modules built ahead of time ------------------------------------------------------------------


@pytest.fixture
def aot_dir(tmp_path, csrc, monkeypatch):
    """A directory with a right manifest and a library that is not one."""
    set_gpus(monkeypatch, (9, 0))
    directory = tmp_path / "aot"
    directory.mkdir()
    (directory / f"{VARIANT.name}.so").write_bytes(b"\x7fELF cut off")
    aot._write_manifest(directory, [VARIANT], {"nvcc": "13.0.88"})
    monkeypatch.setenv(jit.AOT_DIR_ENV, str(directory))
    return directory


def test_aot_path_comes_from_the_manifest(aot_dir):
    manifest = json.loads((aot_dir / jit.AOT_MANIFEST).read_text())
    assert manifest["modules"] == {VARIANT.short_name: f"{VARIANT.name}.so"}
    assert manifest["csrc_sha256"] == jit.csrc_sha256()
    assert jit.aot_library_path(VARIANT, aot_dir) == aot_dir / f"{VARIANT.name}.so"


def test_aot_of_other_sources(aot_dir, csrc):
    built_from = jit.csrc_sha256()
    (csrc / "etap_mla_traits.cuh").write_text("// newer\n")
    with pytest.raises(jit.EtapJitError, match="built from other sources") as error:
        jit.get_etap_mla_module(VARIANT)
    assert built_from in str(error.value)
    assert jit.csrc_sha256() in str(error.value)
    assert f"python -m etap_flashinfer.aot --out {aot_dir}" in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_aot_without_readable_manifest(aot_dir, text):
    manifest = aot_dir / jit.AOT_MANIFEST
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(jit.EtapJitError, match="holds no readable manifest"):
        jit.get_etap_mla_module(VARIANT)


def test_aot_lacks_the_variant(aot_dir):
    other = jit.EtapMlaVariant(torch.float16, 8, "gather")
    with pytest.raises(jit.EtapJitError, match="lacks fp16_n8_gather; it lists bf16_n16_tma"):
        jit.get_etap_mla_module(other)


def test_aot_library_is_deleted(aot_dir):
    (aot_dir / f"{VARIANT.name}.so").unlink()
    with pytest.raises(jit.EtapJitError, match="lacks bf16_n16_tma"):
        jit.get_etap_mla_module(VARIANT)


def test_aot_library_does_not_load(aot_dir):
    pytest.importorskip("tvm_ffi")
    with pytest.raises(jit.EtapJitError, match="does not load"):
        jit.get_etap_mla_module(VARIANT)


def test_aot_names_what_is_allowed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        aot.main(["--out", str(tmp_path / "aot"), "--variants", "bf16_n16_tma", "fp32_n16_tma"])
    assert "unknown variants fp32_n16_tma; allowed: bf16_n8_tma" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        aot.main(["--out", str(tmp_path / "aot"), "--jobs", "0"])
    assert "--jobs is 0" in capsys.readouterr().err
    assert not (tmp_path / "aot").exists()


def test_aot_build_fails_in_its_worker(tmp_path, fake_cuda, monkeypatch, capsys):
    fake_cuda("echo 'error: deliberate'; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    arguments = ["--out", str(tmp_path / "aot"), "--variants", "bf16_n16_tma", "--jobs", "1"]
    assert aot.main(arguments) == 1
    assert "error: deliberate" in capsys.readouterr().err
    assert not (tmp_path / "aot" / jit.AOT_MANIFEST).exists()


def test_aot_without_nvcc(tmp_path, csrc, flashinfer_jit, monkeypatch, capsys):
    monkeypatch.setattr(flashinfer_jit.cpp_ext, "get_cuda_path", lambda: str(tmp_path))
    assert aot.main(["--out", str(tmp_path / "aot")]) == 1
    assert "set CUDA_HOME" in capsys.readouterr().err
    assert not (tmp_path / "aot" / jit.AOT_MANIFEST).exists()
