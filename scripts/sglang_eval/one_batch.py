"""``python -m sglang_patch.run sglang.benchmark.one_batch`` as a user starts it, run once."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from .servers import LOG_LINES, ServerError, environment, log

BATCH, PROMPT, NEW_TOKENS = 4, 512, 16
# The tool's prompts have tokens up to 10,000, and it wants a tokenizer that it then does not use.
VOCABULARY = 16_160
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
}
RESULT_KEYS = ("prefill_latency", "median_decode_latency", "median_decode_throughput")


def write_model(directory: pathlib.Path, config: dict[str, Any]) -> None:
    """A configuration, for weights that SGLang draws itself, and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config | {"vocab_size": VOCABULARY},
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def arguments(model: pathlib.Path, results: pathlib.Path) -> list[str]:
    """The tool's arguments, ``etap`` among them, and a small pool."""
    values = {
        "--model-path": model,
        "--load-format": "dummy",
        "--attention-backend": "etap",
        "--batch-size": BATCH,
        "--input-len": PROMPT,
        "--output-len": NEW_TOKENS,
        "--result-filename": results,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--context-length": 2048,
        "--max-total-tokens": 16_384,
        "--max-running-requests": BATCH,
        "--cuda-graph-max-bs-decode": BATCH,
        "--mem-fraction-static": 0.5,
    }
    flags = ["--skip-tokenizer-init", "--disable-flashinfer-autotune", "--disable-radix-cache"]
    return [*(str(part) for pair in values.items() for part in pair), *flags]


class OneBatch:
    """The tool as a child process; its output in a file."""

    def __init__(self, work: pathlib.Path, config: dict[str, Any]) -> None:
        self.results = work / "one_batch.jsonl"
        self.results.unlink(missing_ok=True)
        self.log_path = work / "one_batch.log"
        write_model(work / "one_batch_model", config)
        tool = [sys.executable, "-m", "sglang_patch.run", "sglang.benchmark.one_batch"]
        with open(self.log_path, "w") as output:
            self.process = subprocess.Popen(
                [*tool, *arguments(work / "one_batch_model", self.results)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(work),
                start_new_session=True,
            )
        log(f"one_batch: starting, log in {self.log_path}")

    def result(self, seconds: float) -> dict[str, Any]:
        """Wait for what it measured.

        Raises
        ------
        ServerError
            If it failed or took longer; the message has the end of its output.
        """
        status: int | str
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = f"none after {seconds:.0f} s"
        self.stop()
        if status != 0 or not self.results.exists():
            lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise ServerError(f"one_batch: status {status}\n" + "\n".join(lines))
        found = json.loads(self.results.read_text().splitlines()[-1])
        return {"batch": BATCH, "context": PROMPT, **{key: found[key] for key in RESULT_KEYS}}

    def stop(self) -> None:
        """End the whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
