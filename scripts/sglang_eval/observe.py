"""What a server's log and the GPU's memory say about a long run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess

# SGLang's own format has no level: this one is given to it in SGLANG_LOGGING_CONFIG_PATH.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"levels": {"format": "[%(asctime)s] %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "levels"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}
ERROR = re.compile(
    r"^\[[^]]*\] (ERROR|CRITICAL)\b|^Traceback |^Fatal Python error|CUDA error|"
    r"illegal memory access|Segmentation fault|crashed with exit code|leak detected",
    re.IGNORECASE,
)
# Races of SGLang that it logs as errors: a client that is gone while its last tokens come.
EXPECTED = (
    "but the state was deleted in TokenizerManager",
    "Request is disconnected from the client side",
)
RETRACTION = re.compile(r"KV cache pool is full\. Retract requests\. #retracted_reqs: (\d+)")


def write_logging_config(path: pathlib.Path) -> dict[str, str]:
    """Write a logging configuration; the environment with which a server uses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(LOGGING))
    return {"SGLANG_LOGGING_CONFIG_PATH": str(path)}


@dataclasses.dataclass
class LogFindings:
    """What is in a part of a server's log."""

    errors: list[str]
    expected_errors: int
    retractions: int  # times the cache was full
    retracted: int  # requests put back into the queue then


def scan(text: str) -> LogFindings:
    """Errors and out-of-memory retractions in a log written with :data:`LOGGING`."""
    errors = [line for line in text.splitlines() if ERROR.search(line)]
    unexpected = [line for line in errors if not any(known in line for known in EXPECTED)]
    counts = [int(match[1]) for match in RETRACTION.finditer(text)]
    return LogFindings(unexpected, len(errors) - len(unexpected), len(counts), sum(counts))


def read_from(path: pathlib.Path, offset: int) -> str:
    """A log from a byte on."""
    with open(path, "rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")


def gpu_memory_mib() -> int:
    """Memory of the (first visible) GPU that is in use, by whatever process, in MiB.

    Raises
    ------
    RuntimeError
        If nvidia-smi does not say.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        ["nvidia-smi", "-i", first, *query], capture_output=True, text=True, timeout=30
    )
    if done.returncode != 0 or not done.stdout.strip().isdigit():
        raise RuntimeError(
            f"nvidia-smi: status {done.returncode}: {(done.stdout + done.stderr).strip()[:300]}"
        )
    return int(done.stdout)


def growth(memory: list[int], warm_up: float) -> int:
    """By how much memory grew after the first ``warm_up`` of the samples.

    The server's allocator never gives memory back, so the last sample is the largest unless
    something else changed; the largest is taken.
    """
    settled = memory[int(len(memory) * warm_up) :]
    return max(settled) - settled[0]


def steady_growth(memory: list[int], warm_up: float) -> int:
    """The least by which memory grew in any third of the time after the warm-up.

    A leak grows in all of them. An allocator takes more when a batch is larger than any before,
    in steps that become rare.
    """
    settled = memory[int(len(memory) * warm_up) :]
    bounds = [(len(settled) - 1) * third // 3 for third in range(4)]
    parts = [settled[begin : end + 1] for begin, end in itertools.pairwise(bounds)]
    return min(growth(part, 0.0) for part in parts)
