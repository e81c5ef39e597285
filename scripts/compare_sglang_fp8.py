#!/usr/bin/env python
"""Compares SGLang servers with an fp8_e4m3 cache, ``etap`` and others, on one GPU.

    python scripts/compare_sglang_fp8.py                       everything, about five minutes
    python scripts/compare_sglang_fp8.py --parts agreement --quick
    python scripts/compare_sglang_fp8.py --parts drift capacity

agreement: etap with an fp8 cache must be as close to SGLang's FlashInfer with one, which converts
the pool and leaves the queries as they are, as the closest of its peers is, and a server whose etap
forgets one token must not be; with EAGLE it must answer as without. How far it is from FlashMLA and
Triton, which quantise the queries as well, is reported: they are as far from FlashInfer.
drift: greedy generations of 2,048 tokens with an fp8 and with a bf16 cache, reported, not judged.
capacity: tokens that the cache holds at the same memory fraction; must be nearly twice as many.
Servers, checkpoint and requests are those of compare_sglang.py. Writes the section "compare_fp8"
of results/<gpu>/sglang.json; parts that an earlier run found without a problem, with the same
sources, stay.
"""

from __future__ import annotations

import json
import sys
import urllib.request

import compare_sglang
from compare_sglang import EAGLE, Answers, Comparison
from sglang_eval import broken, workload
from sglang_eval.servers import START, Server, log, running
from sglang_eval.workload import Answer, Group

PARTS = ("agreement", "drift", "capacity")
PEERS = ("flashinfer", "flashmla", "triton")
EXACT_PEERS = ("flashinfer",)  # whose queries are not quantised
FP8 = ("--kv-cache-dtype", "fp8_e4m3")
# Against etap with a bf16 cache; flashmla with a bf16 cache shows what rounding alone changes.
DRIFTING = ("etap_fp8", "flashmla_fp8", "flashinfer_fp8", "flashmla")
DRIFT_TOKENS = 2048
DRIFT_PROMPTS = (64, 1_000, 8_000, 30_000)
CAPACITY_FRACTION = 0.2
LEAST_CAPACITY_RATIO = 1.9


def servers_of(comparison: Comparison) -> list[Server]:
    """Start what agreement and drift need, all at once."""
    options, parts = comparison.options, comparison.options.parts
    servers = [comparison.start("etap", "etap"), comparison.start("etap_fp8", "etap", *FP8)]
    servers += [comparison.start(f"{name}_fp8", name, *FP8) for name in options.peers]
    if "agreement" in parts:
        paths = f"{broken.write_distribution(options.work / 'control')}:"
        paths += compare_sglang.environment_path()
        servers.append(comparison.start("broken_fp8", "etap", *FP8, PYTHONPATH=paths))
        servers.append(comparison.start("etap_fp8_eagle", "etap", *FP8, *EAGLE))
    if "drift" in parts:
        servers.append(comparison.start("flashmla", "flashmla"))
    return servers


def judge_agreement(comparison: Comparison, answers: dict[str, Answers]) -> None:
    """Every server with an fp8 cache against the others, as without one."""
    of_backend = {n.removesuffix("_fp8"): a for n, a in answers.items() if n.endswith("_fp8")}
    compare_sglang.judge_plain(comparison, of_backend, judges=EXACT_PEERS)
    results = comparison.found.pop("plain", {})
    found = compare_sglang.compared(
        "etap, fp8 and bf16 cache", answers["etap_fp8"], answers["etap"]
    )
    results["etap_fp8_etap_bf16"] = workload.as_json(found)
    if "etap_fp8_eagle" in answers:
        found = compare_sglang.compared(
            "etap_fp8 with EAGLE and without", answers["etap_fp8_eagle"], answers["etap_fp8"]
        )
        results["etap_eagle"] = workload.as_json(found)
        if not workload.is_within(found, comparison.among):
            comparison.problem("etap_fp8 with EAGLE differs from etap_fp8 without")
    comparison.found["agreement"] = results


def drift(ours: Answer, other: Answer) -> dict[str, float | int]:
    """Tokens until two generations of one prompt part, and how log-probabilities change there.

    Returns
    -------
    dict
        ``tokens`` generated, ``equal`` before the first difference, ``share`` of the former, and
        ``mean_logprob_change``: mean absolute difference over the equal tokens.
    """
    pairs = list(zip(ours.tokens, other.tokens, strict=False))
    equal = next((n for n, (one, two) in enumerate(pairs) if one != two), len(pairs))
    logprobs = list(zip(ours.logprobs, other.logprobs, strict=False))[:equal]
    changes = [abs(one - two) for one, two in logprobs]
    return {
        "tokens": len(pairs),
        "equal": equal,
        "share": round(equal / max(len(pairs), 1), 4),
        "mean_logprob_change": round(sum(changes) / max(len(changes), 1), 5),
    }


def measure_drift(comparison: Comparison, ready: dict[str, Server]) -> None:
    """Long greedy generations of every server that is to drift, and of etap with bf16."""
    prompts = [workload.prompt(f"drift {length}", length) for length in DRIFT_PROMPTS]
    comparison.groups = [Group("drift", prompts, DRIFT_TOKENS, parallel=True)]
    names = [name for name in ("etap", *DRIFTING) if name in ready]
    answers = comparison.ask_all({name: ready[name] for name in names})
    if "drift" not in answers["etap"]:
        return
    results = {}
    for name in names[1:]:
        if "drift" not in answers[name]:
            continue
        pairs = zip(answers["etap"]["drift"], answers[name]["drift"], strict=True)
        found = [drift(ours, other) for ours, other in pairs]
        results[name] = dict(zip(map(str, DRIFT_PROMPTS), found, strict=True))
        text = ", ".join(
            f"after {length}: {each['equal']} of {each['tokens']} tokens equal, logprobs "
            f"{each['mean_logprob_change']:.4f} apart"
            for length, each in results[name].items()
        )
        log(f"{name} against etap with a bf16 cache: {text}")
    comparison.found["drift"] = {"against": "etap", "servers": results}


def capacity_arguments(arguments: list[str], extra: tuple[str, ...]) -> list[str]:
    """A server's arguments without a limit of tokens, and with a small part of the memory."""
    limit = arguments.index("--max-total-tokens")
    kept = arguments[:limit] + arguments[limit + 2 :]
    fraction = ["--mem-fraction-static", str(CAPACITY_FRACTION)]
    return [*kept, *fraction, "--cuda-graph-max-bs-decode", "1", *extra]


def measure_capacity(comparison: Comparison) -> None:
    """Tokens that fit, one server after the other: each takes its part of what is free."""
    options = comparison.options
    base = compare_sglang.server_arguments(comparison.model, "etap")
    tokens: dict[str, int] = {}
    for name, extra in (("auto", ()), ("fp8_e4m3", FP8)):
        arguments = capacity_arguments(base, extra)
        server = Server(f"capacity_{name}", arguments, options.work)
        with running([server], START + options.time_budget) as ready:
            if not ready:
                comparison.problem(f"{server.name}: did not start")
                return
            with urllib.request.urlopen(f"{server.url}/server_info", timeout=30) as reply:
                tokens[name] = int(json.load(reply)["max_total_num_tokens"])
    judge_capacity(comparison, tokens)


def judge_capacity(comparison: Comparison, tokens: dict[str, int]) -> None:
    """Half the bytes a token must be nearly twice the tokens."""
    ratio = round(tokens["fp8_e4m3"] / tokens["auto"], 3)
    log(f"tokens at a memory fraction of {CAPACITY_FRACTION}: {tokens}, ratio {ratio}")
    comparison.found["capacity"] = {
        "mem_fraction_static": CAPACITY_FRACTION,
        "tokens": tokens,
        "ratio": ratio,
    }
    if ratio < LEAST_CAPACITY_RATIO:
        comparison.problem(f"an fp8 cache holds {ratio} times the tokens of bf16")


def compare(comparison: Comparison) -> None:
    """Run the parts: those that share servers first, the capacity when these have gone."""
    parts = comparison.options.parts
    if {"agreement", "drift"} & set(parts):
        servers = servers_of(comparison)
        share = compare_sglang.START_SHARE * (0.7 if "capacity" in parts else 1.0)
        with running(servers, START + share * comparison.options.time_budget) as ready:
            for name in {server.name for server in servers} - ready.keys():
                comparison.problem(f"{name}: did not start")
            if not {"etap", "etap_fp8"} <= ready.keys():
                return
            if "agreement" in parts:
                judge_agreement(comparison, comparison.ask_all(ready))
            if "drift" in parts:
                measure_drift(comparison, ready)
    if "capacity" in parts:
        measure_capacity(comparison)


def main(arguments: list[str] | None = None) -> int:
    parser = compare_sglang.make_parser(__doc__, PARTS, PARTS, PEERS, 480.0)
    return compare_sglang.run(parser.parse_args(arguments), compare, "compare_fp8", PARTS)


if __name__ == "__main__":
    sys.exit(main())
