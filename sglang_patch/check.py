"""``etap-sglang-check``: whether SGLang will run with ``--attention-backend etap`` here."""

import importlib.metadata
import logging
import shutil
import subprocess
import sys

from . import compat

MODES = (
    ("prefill, chunked prefill, mixed batches", "FlashInfer (SGLang's flashinfer MLA backend)"),
    ("the same, short prefix in an fp8 cache", "ETAP (FlashInfer would convert the whole pool)"),
    ("decode, with and without CUDA graphs", "ETAP"),
    ("EAGLE/MTP: verify, draft-extend, multi-step draft", "ETAP (topk 1)"),
    ("cache", "bf16, fp16 or fp8_e4m3; any page size (64 unless you say otherwise)"),
    ("heads a GPU", "1 to 128"),
)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, problems: list[str], required: bool = True) -> str:
    version = _version(name)
    if version is None and required:
        problems.append(f"{name} is not installed")
    return version or "not installed"


def _sglang(problems: list[str], warnings: list[str]) -> str:
    version = compat.sglang_version()
    if version is None:
        problems.append("SGLang is not installed in this environment")
        return "not installed"
    if refusal := compat.version_refusal(version):
        problems.append(refusal)
    elif warning := compat.version_warning(version):
        warnings.append(warning)
    return version


def _registration(problems: list[str]) -> str:
    """Load SGLang's plugins as a server does, and see whether ``etap`` is in its place."""
    if compat.sglang_version() is None:
        return "not tried"
    points = importlib.metadata.entry_points(group="sglang.srt.plugins")
    if not any(point.name == "etap" for point in points):
        problems.append(
            "SGLang can't find the plugin: install etap-flashinfer (pip install), a checkout on "
            "PYTHONPATH alone is not enough"
        )
        return "no entry point"
    try:
        from sglang.srt import server_args
        from sglang.srt.plugins import load_plugins

        from . import plugin

        logging.getLogger("sglang").setLevel(logging.ERROR)
        load_plugins()
        if plugin.BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
            problems.append("--attention-backend does not accept 'etap'; see the log above")
            return "failed"
        if missing := plugin.missing_hooks():
            problems.append(f"SGLang did not apply the hooks to {', '.join(missing)}")
            return "in part"
    except Exception as error:  # a broken dependency of SGLang raises anything
        problems.append(f"SGLang's plugins do not load: {type(error).__name__}: {error}")
        return "failed"
    return "--attention-backend etap is accepted, all hooks applied"


def _gpu(problems: list[str]) -> tuple[str, str]:
    """Names of the GPUs and the driver's version."""
    import torch

    from etap_flashinfer import dispatch

    if not torch.cuda.is_available():
        problems.append("PyTorch sees no GPU; the ETAP kernel needs a Hopper GPU (H100, H200, H20)")
        return "none", _driver()
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        names.append(torch.cuda.get_device_name(device))
        if refusal := dispatch.etap_device_refusal(device):
            problems.append(refusal)
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)), _driver()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    if shutil.which(command[0]) is None:
        return "unknown"
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return "unknown"
    return output.stdout.strip() or "unknown"


def _kernel(problems: list[str]) -> str:
    """Load the variant of 16 heads, decode, pages of 64: from AOT modules, or compiled now."""
    import torch

    from etap_flashinfer import jit

    try:
        jit.get_etap_mla_module(jit.EtapMlaVariant(torch.bfloat16, 16, "tma"))
    except jit.EtapJitError as error:
        problems.append(f"the kernel can't be loaded: {str(error).splitlines()[0]}")
        return "failed"
    return "compiled and loaded"


def main() -> int:
    """Print one screen; the exit status is 0 if a server will work."""
    problems: list[str] = []
    warnings: list[str] = []
    gpus, driver = _gpu(problems)
    facts = {
        "SGLang": _sglang(problems, warnings),
        "etap-flashinfer": _package("etap-flashinfer", problems),
        "flashinfer-python": _package("flashinfer-python", problems),
        "torch": _package("torch", problems),
        "GPU": gpus,
        "driver": driver,
        "plugin": _registration(problems),
    }
    # Without a GPU the reason is known already.
    facts["kernel"] = _kernel(problems) if gpus != "none" else "not tried"
    for name, value in facts.items():
        print(f"{name:18} {value}")
    print("\nWith --attention-backend etap:")
    for mode, backend in MODES:
        print(f"  {mode:50} {backend}")
    print()
    for warning in warnings:
        print(f"WARNING: {warning}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("It will not work as it is." if problems else "It will work.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
