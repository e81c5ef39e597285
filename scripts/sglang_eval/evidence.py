"""The evidence file ``results/<gpu>/sglang.json``: one section for each script that adds to it."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from decode_bench import evidence

SECTIONS = ("kit", "kit_fp8", "compare", "compare_fp8", "bench", "bench_fp8")
PATH_OPTIONS = ("--out", "--work", "--model")
BENCH_KEYS = ("step_ms", "tokens_per_s", "gpu_us", "attention_us")
TOP_KEYS = ("csrc_sha256", "device", "versions", "date")


def schema_errors(content: dict[str, Any]) -> list[str]:
    """What is wrong with an evidence file, one line each; empty when it keeps to the schema."""
    errors = [f"{key} is missing" for key in TOP_KEYS if key not in content]
    for name in SECTIONS:
        section = content.get(name, {})
        errors += [
            f"{name}: {key} is missing"
            for key in ("date", "command")
            if section and key not in section
        ]
    for section in ("bench", "bench_fp8"):
        errors += _case_errors(section, content.get(section, {}).get("cases", []))
    return errors


def _case_errors(section: str, cases: list[dict[str, Any]]) -> list[str]:
    errors = []
    for index, case in enumerate(cases):
        for key in ("batch", "context", "backends"):
            if key not in case:
                errors.append(f"{section}: case {index}: {key} is missing")
        for name, figures in case.get("backends", {}).items():
            errors += [
                f"{section}: case {index}: {name} has no {key}"
                for key in BENCH_KEYS
                if key not in figures
            ]
    return errors


def command_of(arguments: list[str]) -> str:
    """The command to repeat a measurement, without the directories that only this host had."""
    kept: list[str] = []
    for index, argument in enumerate(arguments):
        if argument not in PATH_OPTIONS and arguments[index - 1] not in PATH_OPTIONS:
            kept.append(argument)
    return shlex.join(["python", *kept])


def update(
    path: pathlib.Path | None, section: str, content: dict[str, Any], keep: Sequence[str] = ()
) -> pathlib.Path:
    """Put a section into the evidence file, and keep those measured with the same sources.

    Parameters
    ----------
    path : pathlib.Path, optional
        ``results/<gpu>/sglang.json`` if not given.
    section : str
        One of ``SECTIONS``.
    content : dict
        What was found. Date and command are added.
    keep : sequence of str
        Parts of the section that stay as an earlier run found them, each with that run's date and
        command, if ``content`` has none of that name and the run that found it had no problems.

    Returns
    -------
    pathlib.Path
        The file written.
    """
    if section not in SECTIONS:
        raise ValueError(f"section is {section!r}; allowed: {', '.join(SECTIONS)}")
    path = path or evidence.default_directory() / "sglang.json"
    header = evidence.header(evidence.check_sources_match(), None)
    del header["read_ceiling_gbps"]
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept = {}
    if before.get("csrc_sha256") == header["csrc_sha256"]:
        kept = {name: before[name] for name in SECTIONS if name in before}
    earlier = kept.get(section, {})
    origin = {key: earlier.get(key) for key in ("date", "command")}
    for name in keep:
        part = earlier.get(name)
        if part is None or name in content:
            continue
        # A part with a date of its own was already kept from a run before that one.
        if "date" in part or not earlier.get("problems"):
            content = content | {name: origin | part}
    kept[section] = {"date": header["date"], "command": command_of(sys.argv), **content}
    text = json.dumps({**header, **kept}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
    return path
