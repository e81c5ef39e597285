#!/usr/bin/env python
"""Writes the measured tables of the README from results/h200/*.json, or checks them.

    python scripts/readme_tables.py            rewrite what is between the markers
    python scripts/readme_tables.py --check    fail if a table is out of date or evidence is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; NAME is one of
batch-context, shapes, fp8, validation, sglang, sglang-fp8, drift, reliability, l2-tiles,
h20-emulation. All but batch-context, shapes and validation say so while nothing was measured.
Evidence is stale when it was measured with other kernel sources than those under csrc/.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import roofline
from decode_bench import emulation_report, evidence, report
from decode_bench.report import Case
from sglang_eval import evidence as sglang_evidence

Found = dict[str, dict[str, Any]]

NOT_MEASURED = "Not measured yet.\n"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table:\2 -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    alignment = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, alignment, *rows))


def provenance(found: dict[str, Any]) -> str:
    """One line under a table: device, versions, date, command, and whether it is out of date."""
    versions = found["versions"]
    named = {
        "torch": "torch",
        "flashinfer-python": "FlashInfer",
        "sglang": "SGLang",
        "sglang-kernel": "sglang-kernel",
    }
    parts = [f"{title} {versions[key]}" for key, title in named.items() if key in versions]
    ceiling = found.get("read_ceiling_gbps")
    if ceiling:
        parts.append(f"read ceiling {ceiling:.0f} GB/s")
    text = f"\n{found['device']}, {', '.join(parts)}, {found['date'][:10]}."
    if "command" in found:
        text += f" Made by `{found['command']}`."
    if found["csrc_sha256"] != evidence.csrc_sha256():
        text += f" **Of earlier kernel sources** ({found['csrc_sha256'][:12]})."
    return f"{text}\n"


def _times(case: Case, peers: Sequence[str], ceiling: float | None) -> list[str]:
    share = "-" if not ceiling else f"{100 * case['gbps'] / ceiling:.0f} %"
    cells = [f"**{case['us']:.1f}**", share]
    cells += [report.figure(case["peers"].get(name, {}).get("us")) for name in peers]
    return [*cells, report.figure(report.speedup(case), 2)]


def _peers(cases: Sequence[Case]) -> list[str]:
    return [name for name in report.PEER_TITLES if any(name in case["peers"] for case in cases)]


def _time_head(peers: Sequence[str]) -> list[str]:
    return ["ETAP, us", "of ceiling", *(report.PEER_TITLES[n] for n in peers), "best peer / ETAP"]


def batch_context_table(found: Found) -> str:
    """16 heads, one query token, bf16, page 64: every batch and context."""
    decode = found["decode"]
    cases = sorted(
        (case for case in decode["cases"] if report.is_plain(case)),
        key=lambda case: (case["batch"], case["context"]),
    )
    peers, ceiling = _peers(cases), decode["read_ceiling_gbps"]
    rows = [
        [f"{case['batch']} x {report.tokens(case['context'])}", *_times(case, peers, ceiling)]
        for case in cases
    ]
    return markdown(["batch x context", *_time_head(peers)], rows) + provenance(decode)


def fixed_split_table(found: Found) -> str:
    """Batch-invariant calls beside others, for each size of parts that was measured."""
    cases = [case for case in found["decode"]["cases"] if "fixed_split" in case]
    if not cases:
        return NOT_MEASURED
    slowdowns = report.fixed_split_slowdowns(cases)
    cells = sorted({cell for of_size in slowdowns.values() for cell in of_size})
    rows = [
        [f"{batch} x {report.tokens(context)}"]
        + [report.figure(of_size.get((batch, context)), 2) for of_size in slowdowns.values()]
        for batch, context in cells
    ]
    means = [f"{report.geometric_mean(of_size.values()):.2f}" for of_size in slowdowns.values()]
    head = ["batch x context", *(f"parts of {size}" for size in slowdowns)]
    return markdown(head, [*rows, ["geometric mean", *means]]) + provenance(found["decode"])


def shapes_table(found: Found) -> str:
    """Every other shape: heads, query lengths, page sizes, fp16, varied lengths."""
    decode = found["decode"]
    cases = [case for case in decode["cases"] if not report.is_plain(case)]
    return _shapes([case for case in cases if not report.is_fp8(case)], decode)


def fp8_table(found: Found) -> str:
    """Every shape with an fp8 cache."""
    decode = found["decode"]
    cases = [case for case in decode["cases"] if report.is_fp8(case)]
    return _shapes(cases, decode) if cases else NOT_MEASURED


def _shapes(cases: Sequence[Case], decode: dict[str, Any]) -> str:
    peers, ceiling = _peers(cases), decode["read_ceiling_gbps"]
    rows = []
    for case in cases:
        lengths = f"{case['lengths']} " if "lengths" in case else ""
        shape = f"{case['batch']} x {lengths}{report.tokens(case['context'])}"
        fields = [str(case[key]) for key in ("heads", "q_len", "page_size")]
        rows.append([shape, *fields, report.types(case), *_times(case, peers, ceiling)])
    head = ["batch x context", "heads", "queries", "page", "dtype", *_time_head(peers)]
    return markdown(head, rows) + provenance(decode)


def l2_tiles_table(found: Found) -> str:
    """Cycles of a 64-token tile with the data in L2."""
    measured = found.get("l2_tiles")
    if measured is None:
        return NOT_MEASURED
    rows = roofline.l2_rows(roofline.PRESETS["h200"], measured)
    return markdown(roofline.L2_HEAD, rows) + provenance(measured)


def h20_emulation_table(found: Found) -> str:
    """The H20 emulation at 16 heads, and what it says of the paper."""
    emulated = found.get("h20_emulation")
    if emulated is None:
        return NOT_MEASURED
    cases = [case for case in emulated["cases"] if case["heads"] == 16]
    cases.sort(key=lambda case: (case["batch"], case["context"]))
    costs = ", ".join(
        f"{row['emulated']:.0f} ({row['h20']:.0f}) at N = {row['columns']}"
        for row in emulated["wgmma_cycles"]
    )
    lines = [
        f"**{emulation_report.EMULATION}**\n\n",
        markdown(emulation_report.HEAD, [emulation_report.table_row(case) for case in cases]),
        "\n",
        *(f"{line}\n" for line in emulation_report.verdicts(emulated["cases"])),
        f"Cycles of a WGMMA, emulated (H20): {costs}.\n",
    ]
    return "".join(lines) + provenance(emulated)


def validation_table(found: Found) -> str:
    """Numbers of tests, sanitizer outcomes and the worst accuracy."""
    validation = found["validation"]
    counts = validation["tests"]
    rows = [
        ["GPU tests", f"{counts['passed']} passed, {counts['failed']} failed"],
        *(
            [f"compute-sanitizer {tool}", found_by_tool["outcome"]]
            for tool, found_by_tool in validation["sanitizer"].items()
        ),
    ]
    for kind, (worst, count) in report.worst_ratios(validation["cases"]).items():
        name = f"RMSE against float64 over that of rounding alone, {kind} cache"
        rows.append([name, f"at most {worst:.3f} over {count} cases"])
    return markdown(["check", "outcome"], rows) + provenance(validation)


def reliability_table(found: Found) -> str:
    """Random calls, FlashInfer's own tests, the cost of validate and the long run, as far as they
    were measured."""
    rows, sources = [], []
    if "fuzz" in found:
        sources.append(found["fuzz"])
        for run in found["fuzz"]["runs"]:
            worst = max(run["worst"][key] for key in ("element", "rmse", "lse"))
            text = f"{run['mismatches']} mismatches; largest error {worst:.2f} of what is allowed"
            rows.append(
                [f"{run['cases']:,} random calls against float64 (seed {run['seed']})", text]
            )
    if "flashinfer_suite" in found:
        suite = found["flashinfer_suite"]
        sources.append(suite)
        total = sum(map(collections.Counter, suite["tests"].values()), collections.Counter())
        text = (
            f"{total['passed']:,} passed, {len(suite['failed'])} failed, {total['differs']} differ"
        )
        rows.append([f"FlashInfer {suite['suite']['version']}'s own tests of the wrapper", text])
    if "plan_check" in found:
        sources.append(found["plan_check"])
        for plan in found["plan_check"]["plans"]:
            shape = f"{plan['batch']} x {report.tokens(plan['context'])}, page {plan['page_size']}"
            text = f"{plan['us']:.0f} us, with `validate=True` {plan['us_validated']:.0f} us"
            rows.append([f"`plan()` of {shape}", text])
    if "soak" in found:
        sources.append(found["soak"])
        rows += soak_rows(found["soak"]["soak"])
    if not rows:
        return NOT_MEASURED
    return markdown(["what", "outcome"], rows) + "".join(dict.fromkeys(map(provenance, sources)))


def soak_rows(soak: dict[str, Any]) -> list[list[str]]:
    """The long run of an SGLang server; what a run that broke off did not reach is left out."""
    problems = len(soak["problems"])
    rows = [["SGLang server under mixed requests", f"{problems} problems"]]
    if "seconds" in soak:
        answered = sum(sum(outcomes.values()) for outcomes in soak["requests"].values())
        left = soak["requests"].get("disconnect", {}).get("disconnected", 0)
        aborted = soak["requests"].get("abort", {}).get("aborted", 0)
        text = f"{answered:,}, of them {aborted:,} aborted and {left:,} left by the client"
        rows.append([f"requests in {soak['seconds'] / 60:.1f} minutes", text])
    if "retracted_requests" in soak:
        text = f"{soak['retracted_requests']:,} times; {soak['log_errors']} errors in the log"
        rows.append(["requests taken back because the cache was full", text])
    if "beyond" in soak.get("samples", {}):
        samples = soak["samples"]
        text = f"{samples['beyond']} of {samples['compared']:,} differ"
        rows.append([f"answers against those of {' and '.join(samples['peers'])}", text])
    if "memory_mib" in soak:
        memory = soak["memory_mib"]
        text = f"+{memory['growth_in_second_half']} MiB (limit {memory['limit']} MiB)"
        if "steady_growth" in memory:  # not in older evidence
            steady, limit = memory["steady_growth"], memory["steady_limit"]
            text += f", in each third of it by {steady} MiB or more (limit {limit} MiB)"
        rows.append(["GPU memory in the second half", text])
    return rows


def sglang_table(found: Found) -> str:
    """Time of a decode step end to end, and attention's share of the GPU's time, by backend."""
    return _steps(found, "bench")


def sglang_fp8_table(found: Found) -> str:
    """The same with an fp8 cache."""
    return _steps(found, "bench_fp8")


def _steps(found: Found, section: str) -> str:
    bench = found.get("sglang", {}).get(section)
    if bench is None:
        return NOT_MEASURED
    others = [name for name in bench["backends"] if name != "etap"]
    rows = []
    for case in bench["cases"]:
        ours = case["backends"].get("etap")
        figures = [case["backends"].get(name) for name in others]
        times = [each["step_ms"] for each in figures if each]
        ratio = min(times) / ours["step_ms"] if ours and times else None
        shape = f"{case['batch']} x {report.tokens(case['context'])}"
        per_second = "-" if ours is None else f"{ours['tokens_per_s']:.0f}"
        cells = [_step(each) for each in (ours, *figures)]
        rows.append([shape, per_second, *cells, report.figure(ratio, 2)])
    head = ["batch x context", "ETAP, tokens/s", "ETAP, ms", *(f"{name}, ms" for name in others)]
    return markdown([*head, "best other / ETAP"], rows) + provenance({**found["sglang"], **bench})


def drift_table(found: Found) -> str:
    """What an fp8 cache holds, and how greedy generations part from those with a bf16 cache."""
    section = found.get("sglang", {}).get("compare_fp8", {})
    rows = []
    if "capacity" in section:
        capacity = section["capacity"]
        bf16, fp8 = (capacity["tokens"][name] for name in ("auto", "fp8_e4m3"))
        name = f"tokens of cache at `--mem-fraction-static {capacity['mem_fraction_static']}`"
        rows.append([name, f"bf16 {bf16:,}, fp8 {fp8:,}: {capacity['ratio']:.2f} times as many"])
    for name, prompts in section.get("drift", {}).get("servers", {}).items():
        shares = [f"{100 * each['share']:.0f} %" for each in prompts.values()]
        changes = [f"{each['mean_logprob_change']:.4f}" for each in prompts.values()]
        what = f"{name} against etap with a bf16 cache, prompts of {', '.join(prompts)} tokens"
        text = f"equal for {', '.join(shares)} of the generation, log-probabilities there "
        rows.append([what, f"{text}{', '.join(changes)} apart in the mean"])
    if not rows:
        return NOT_MEASURED
    return markdown(["what", "outcome"], rows) + provenance({**found["sglang"], **section})


def _step(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    share = 100 * figures["attention_us"] / figures["gpu_us"] if figures["gpu_us"] else 0.0
    return f"{figures['step_ms']:.2f} ({share:.0f} %)"


EVIDENCE = (
    *("decode", "validation", "sglang", "fuzz", "plan_check", "soak"),
    *("l2_tiles", "h20_emulation", "flashinfer_suite"),
)
TABLES = {
    "batch-context": ("decode", batch_context_table),
    "fixed-split": ("decode", fixed_split_table),
    "shapes": ("decode", shapes_table),
    "fp8": ("decode", fp8_table),
    "validation": ("validation", validation_table),
    "sglang": (None, sglang_table),
    "sglang-fp8": (None, sglang_fp8_table),
    "drift": (None, drift_table),
    "reliability": (None, reliability_table),
    "l2-tiles": (None, l2_tiles_table),
    "h20-emulation": (None, h20_emulation_table),
}


def load_evidence(directory: pathlib.Path) -> Found:
    """The evidence files of a directory by name, without those that are not there."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(directory.glob("*.json"))
        if path.stem in EVIDENCE
    }


def render(readme: str, found: Found) -> str:
    """The README with every marked table written anew.

    Raises
    ------
    ValueError
        If a marker names an unknown table or one whose evidence is missing, or has no end.
    """

    def replaced(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
        source, make = TABLES[name]
        if source is not None and source not in found:
            raise ValueError(f"table {name} needs {source}.json, which is not there")
        return match[1] + make(found) + match[4]

    opened = readme.count("<!-- table:")
    if opened != len(MARKED.findall(readme)):
        raise ValueError("a table marker of the README has no matching end")
    return MARKED.sub(replaced, readme)


def stale(found: Found, csrc_hash: str) -> list[str]:
    """Evidence measured with other sources or not in the schema, one line each."""
    lines = []
    for name, content in found.items():
        measured = content.get("csrc_sha256", "")
        if measured != csrc_hash:
            lines.append(
                f"{name}.json is stale: measured with csrc {measured[:12]}, now {csrc_hash[:12]}"
            )
        schema = sglang_evidence if name == "sglang" else evidence
        lines += [f"{name}.json: {error}" for error in schema.schema_errors(content)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    parser.add_argument("--readme", type=pathlib.Path, default=evidence.REPOSITORY / "README.md")
    parser.add_argument(
        "--results", type=pathlib.Path, default=evidence.REPOSITORY / "results" / "h200"
    )
    options = parser.parse_args(arguments)
    found = load_evidence(options.results)
    problems = stale(found, evidence.csrc_sha256())
    before = options.readme.read_text()
    try:
        after = render(before, found)
    except ValueError as error:
        problems.append(str(error))
        after = before
    if options.check and after != before:
        problems.append(f"{options.readme.name}: tables differ; run scripts/readme_tables.py")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not options.check and after != before:
        options.readme.write_text(after)
        print(f"written: {options.readme}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
