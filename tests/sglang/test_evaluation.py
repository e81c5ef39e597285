"""What the scripts under scripts/ ask of the real SGLang, as far as it needs no GPU."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# SGLang is imported there as it is here.
PREAMBLE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import conftest
conftest.import_torchvision()
"""
ONE_BATCH = """
import runpy
from sglang.srt.server_args import PortArgs

def stop(server_args):  # called when the arguments are parsed, before a GPU is wanted
    print("parsed:", server_args.attention_backend)
    raise SystemExit(0)

PortArgs.init_new = stop
sys.argv = {command!r}
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


LOGGING = """
import logging, types
from sglang.srt.utils.common import configure_logger

configure_logger(types.SimpleNamespace(log_level="info"))
logger = logging.getLogger("sglang.srt.x")
logger.info("an Error is told")
logger.error("out of luck")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PREAMBLE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("is_run_by_us", [True, False])
def test_one_batch_knows_the_backend_only_when_run_by_us(plugin, model, tmp_path, is_run_by_us):
    """``python -m sglang_patch.run``, in a process of its own: the plugin is not loaded there."""
    from sglang_eval import one_batch

    tool = "sglang.benchmark.one_batch"
    command = [*(["sglang_patch.run"] if is_run_by_us else []), tool]
    # No GPU is touched: the arguments are only resolved as for one.
    command += [*one_batch.arguments(model, tmp_path / "results"), "--device", "cuda"]
    done = run(ONE_BATCH.format(command=command))
    if is_run_by_us:
        assert "parsed: etap" in done.stdout, done.stderr[-2000:]
        assert done.returncode == 0
    else:
        assert "invalid choice: 'etap'" in done.stderr
        assert done.returncode == 2


def test_one_batch_finds_its_tokenizer(plugin, tmp_path):
    import make_tiny_checkpoint
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer
    from sglang_eval import one_batch

    one_batch.write_model(tmp_path, make_tiny_checkpoint.CONFIG)
    assert get_tokenizer(str(tmp_path), tokenizer_mode="auto") is not None


def test_the_soaks_log_has_levels(plugin, tmp_path, monkeypatch):
    """SGLang takes our logging configuration, and the scan finds its errors by it."""
    from sglang_eval import observe

    for name, value in observe.write_logging_config(tmp_path / "logging.json").items():
        monkeypatch.setenv(name, value)
    done = run(LOGGING)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "INFO an Error is told" in done.stderr
    assert [line[-17:] for line in observe.scan(done.stderr).errors] == ["ERROR out of luck"]


@pytest.mark.parametrize("part", ["fa3", "prefill", "mixed"])
def test_options_of_the_comparisons_servers_resolve(resolve, part):
    from sglang_eval.variants import VARIANTS

    for backend, options in VARIANTS[part].servers.values():
        view = resolve("--attention-backend", backend, *options)
        assert view.enable_mixed_chunk == (part == "mixed")
        if part == "prefill":
            assert (view.decode_attention_backend, view.page_size) == ("etap", 64)


@pytest.mark.parametrize("part", ["tp", "dp"])
def test_two_gpus_never_use_multicast(resolve, monkeypatch, part):
    """SGLang turns its fused all-reduce on by itself on Hopper GPUs, and that uses multicast."""
    from sglang.srt.arg_groups import overrides
    from sglang_eval.variants import VARIANTS

    is_known = hasattr(overrides, "is_sm90_supported")  # 0.5.16: elsewhere later
    monkeypatch.setattr(overrides, "is_sm90_supported", lambda *arguments: True, raising=False)
    backend, options = VARIANTS[part].servers[f"etap_{part}"]
    view = resolve("--attention-backend", backend, "--disable-custom-all-reduce", *options)
    assert view.flashinfer_allreduce_fusion_backend is None
    # In 0.5.23 the flag is resolved into a number of ranks.
    is_dp = view.enable_dp_attention or getattr(view, "attn_dp_size", 1) > 1
    assert (view.tp_size, is_dp) == (2, part == "dp")
    without = [option for option in options if "allreduce" not in option]
    if part == "tp" and is_known:
        view = resolve("--attention-backend", backend, *without)
        assert view.flashinfer_allreduce_fusion_backend == "auto"
