#!/usr/bin/env python
"""Compares real SGLang servers with ``etap`` and with SGLang's own backends, on one GPU.

    python scripts/compare_sglang.py                           everything, three to four minutes
    python scripts/compare_sglang.py --parts plain --quick     short requests only
    python scripts/compare_sglang.py --parts eagle
    python scripts/compare_sglang.py --tp 2 --parts plain      on two GPUs

All servers of a part run at the same time, on a tiny DeepSeek-V3 whose outputs depend on attention
(make_tiny_checkpoint.py). Each gets short, context-dependent, shared-prefix, 64 concurrent and
longer than 32K requests, before and after some are aborted. Greedy tokens and log-probabilities of
etap must be as close to each of SGLang's backends as those are among themselves, and a server
whose etap forgets one token must not be.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import make_tiny_checkpoint
from sglang_eval import broken, evidence, plugin, workload
from sglang_eval.servers import START, Server, ServerError, log, running
from sglang_eval.workload import Answer, Difference

PARTS = ("plain", "eagle", "pages")
PEERS = ("flashmla", "flashinfer", "triton")
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
EAGLE += ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
# Allowed beyond what SGLang's backends differ by among themselves: a factor and a floor.
FACTOR, FLOOR = 1.5, 0.05
# The control must differ by this much more than allowed.
CONTROL_FACTOR = 3.0


def server_arguments(model: pathlib.Path, backend: str, tp: int) -> list[str]:
    values = {
        "--model-path": model,
        "--attention-backend": backend,
        "--tp-size": tp,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--context-length": 49152,
        "--max-total-tokens": 262144,
        "--max-running-requests": 64,
        "--cuda-graph-max-bs": 64,
        "--chunked-prefill-size": 8192,
        "--mem-fraction-static": 0.5,
        "--random-seed": 0,
        "--watchdog-timeout": 600,
    }
    flags = [
        "--skip-tokenizer-init",
        "--disable-custom-all-reduce",
        "--disable-flashinfer-autotune",
    ]
    pairs = [str(part) for pair in values.items() for part in pair]
    return [*pairs, *flags]


class Comparison:
    """Servers of one run, their answers, and what was found wrong."""

    def __init__(self, options: argparse.Namespace, model: pathlib.Path) -> None:
        self.options = options
        self.model = model
        self.deadline = START + options.time_budget
        self.problems: list[str] = []
        self.found: dict[str, Any] = {}
        self.groups = workload.groups(options.quick)
        # How far SGLang's backends are apart: found by the part "plain", until then a guess that
        # is far below what the control shows.
        self.among = Difference(worst_logprob=0.15, worst_gap=0.15)

    def start(self, name: str, backend: str, *extra: str, **environment: str) -> Server:
        arguments = [*server_arguments(self.model, backend, self.options.tp), *extra]
        return Server(name, arguments, self.options.work, environment)

    def left(self) -> float:
        return max(5.0, self.deadline - time.monotonic())

    def ask(self, server: Server) -> dict[str, list[Answer]]:
        """All groups' answers, as far as the server gives them."""
        answers: dict[str, list[Answer]] = {}
        try:
            for group in self.groups:
                answers[group.name] = workload.run(server, group, self.left())
        except ServerError as error:
            self.problem(f"{server.name}: no answers: {error}")
        return answers

    def problem(self, text: str) -> None:
        self.problems.append(text.splitlines()[0])
        log(f"PROBLEM: {text}")

    def ask_all(self, servers: dict[str, Server]) -> dict[str, dict[str, list[Answer]]]:
        return {name: self.ask(server) for name, server in servers.items()}


def total_difference(first: dict[str, list[Answer]], second: dict[str, list[Answer]]) -> Difference:
    total = Difference()
    for name in first.keys() & second.keys():
        total.add(workload.difference(first[name], second[name]))
    return total


def report(name: str, found: Difference) -> None:
    log(
        f"{name}: {found.requests} requests, {found.compared_tokens} equal tokens, logprobs "
        f"within {found.worst_logprob:.4f}, {found.diverged} part, gap {found.worst_gap:.4f}"
    )


def is_within(found: Difference, allowed: Difference) -> bool:
    return (
        found.compared_tokens > 0
        and found.worst_logprob <= FACTOR * allowed.worst_logprob + FLOOR
        and found.worst_gap <= FACTOR * max(allowed.worst_gap, allowed.worst_logprob) + FLOOR
    )


def check_context(comparison: Comparison, name: str, answers: list[Answer]) -> None:
    """The checkpoint's control: one last token must not have the same successors everywhere."""
    first = answers[0].top[0]
    if all(first.keys() == answer.top[0].keys() for answer in answers):
        comparison.problem(f"{name}: outputs do not depend on the context")


def plain(comparison: Comparison) -> None:
    """etap, a broken etap and SGLang's backends, all requests, some aborted in between."""
    options = comparison.options
    control = broken.write_distribution(options.work / "control")
    peers = [name for name in options.peers if name != "etap"]
    servers = [comparison.start(name, name) for name in ("etap", *peers)]
    paths = f"{control}:{environment_path()}"
    servers.append(comparison.start("broken", "etap", PYTHONPATH=paths))
    with running(servers, comparison.deadline) as ready:
        for name in {server.name for server in servers} - ready.keys():
            comparison.problem(f"{name}: did not start")
        answers = comparison.ask_all(ready)
        judge_plain(comparison, answers)
        if "etap" in ready:
            again_after_abort(comparison, ready["etap"], answers["etap"])


def environment_path() -> str:
    """``PYTHONPATH`` of a server, to put something before it."""
    from sglang_eval.servers import environment

    return environment(pathlib.Path("."))["PYTHONPATH"]


def judge_plain(comparison: Comparison, answers: dict[str, dict[str, list[Answer]]]) -> None:
    peers = [name for name in answers if name not in ("etap", "broken")]
    among = Difference()
    for first, second in itertools.combinations(peers, 2):
        found = total_difference(answers[first], answers[second])
        report(f"{first} and {second}", found)
        among.add(found)
    if among.compared_tokens:
        comparison.among = among
    results = {"among_peers": workload.as_json(among)}
    for name in peers:
        for ours in ("etap", "broken"):
            if ours not in answers:
                continue
            found = total_difference(answers[ours], answers[name])
            report(f"{ours} and {name}", found)
            results[f"{ours}_{name}"] = workload.as_json(found)
            if ours == "etap" and not is_within(found, among):
                comparison.problem(f"etap and {name} differ more than SGLang's backends do")
            too_close = found.worst_logprob < CONTROL_FACTOR * (among.worst_logprob + FLOOR)
            if ours == "broken" and too_close:
                comparison.problem(f"the comparison with {name} does not notice a broken backend")
    if len(peers) < 2:
        comparison.problem("fewer than two of SGLang's backends ran: nothing to compare with")
    for name, found_answers in answers.items():
        if "context" in found_answers:
            check_context(comparison, name, found_answers["context"])
    comparison.found["plain"] = results


def again_after_abort(
    comparison: Comparison, server: Server, before: dict[str, list[Answer]]
) -> None:
    """Abort running requests; what is asked afterwards must be answered as before."""
    try:
        aborted = workload.abort_some(server, comparison.left())
        after = {g.name: workload.run(server, g, comparison.left()) for g in comparison.groups[:3]}
    except ServerError as error:
        comparison.problem(f"abort: {error}")
        return
    found = total_difference({name: before[name] for name in after if name in before}, after)
    report(f"etap before and after {aborted} aborted requests", found)
    comparison.found["after_abort"] = {"aborted": aborted, **workload.as_json(found)}
    if aborted == 0:
        comparison.problem("no request was aborted")
    if not is_within(found, comparison.among):
        comparison.problem("etap answers otherwise after requests were aborted")


def eagle(comparison: Comparison) -> None:
    """EAGLE with the MTP layer: the same tokens as without, and drafts that are accepted."""
    servers = [
        comparison.start("etap_eagle", "etap", *EAGLE),
        comparison.start("flashmla_eagle", "flashmla", *EAGLE),
        comparison.start("etap_alone", "etap"),
    ]
    with running(servers, comparison.deadline) as ready:
        for name in {server.name for server in servers} - ready.keys():
            comparison.problem(f"{name}: did not start")
        answers = comparison.ask_all(ready)
    results: dict[str, Any] = {}
    allowed = comparison.among
    if "flashmla_eagle" in answers and "etap_alone" in answers:
        allowed = total_difference(answers["flashmla_eagle"], answers["etap_alone"])
        report("flashmla with EAGLE and etap without", allowed)
    if "etap_eagle" in answers and "etap_alone" in answers:
        found = total_difference(answers["etap_eagle"], answers["etap_alone"])
        report("etap with EAGLE and without", found)
        results["etap_eagle"] = workload.as_json(found)
        if not is_within(found, allowed):
            comparison.problem("etap with EAGLE differs from etap without")
    for name, found_answers in answers.items():
        lengths = [a.accept_length for group in found_answers.values() for a in group]
        known = [length for length in lengths if length]
        if known:
            results[f"{name}_accept_length"] = round(sum(known) / len(known), 3)
            log(f"{name}: accepted {results[f'{name}_accept_length']} tokens a step")
    ours, theirs = (results.get(f"{n}_eagle_accept_length") for n in ("etap", "flashmla"))
    if ours is None or ours < 1.1 or (theirs and ours < 0.97 * theirs):
        comparison.problem(f"etap accepts {ours} tokens a step, flashmla {theirs}")
    comparison.found["eagle"] = results


def pages(comparison: Comparison) -> None:
    """Page sizes other than 64, and etap for decode only: the same answers as with 64."""
    servers = [comparison.start("etap_page64", "etap")]
    servers += [
        comparison.start(f"etap_page{size}", "etap", "--page-size", str(size))
        for size in (1, 16, 32)
    ]
    decode_only = ["--decode-attention-backend", "etap", "--prefill-attention-backend", "triton"]
    servers.append(comparison.start("etap_decode_only", "triton", *decode_only))
    with running(servers, comparison.deadline) as ready:
        for name in {server.name for server in servers} - ready.keys():
            comparison.problem(f"{name}: did not start")
        answers = comparison.ask_all(ready)
    results = {}
    for name in answers.keys() - {"etap_page64"}:
        found = total_difference(answers[name], answers.get("etap_page64", {}))
        report(f"{name} and etap_page64", found)
        results[name] = workload.as_json(found)
        if not is_within(found, comparison.among):
            comparison.problem(f"{name} differs from etap with pages of 64 tokens")
    comparison.found["pages"] = results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", default=PEERS, help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (1)")
    parser.add_argument("--quick", action="store_true", help="short requests only")
    parser.add_argument("--time-budget", type=float, default=420.0, help="seconds (420)")
    parser.add_argument("--model", type=pathlib.Path, help="made if not given")
    parser.add_argument("--work", type=pathlib.Path, help="logs and caches; temporary if not given")
    parser.add_argument("--out", type=pathlib.Path, help="results/<gpu>/sglang.json")
    options = parser.parse_args(arguments)
    options.work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="etap_sglang_"))
    plugin.ensure_discoverable()
    model = options.model
    if model is None:
        model = options.work / "tiny"
        make_tiny_checkpoint.write(model, seed=0)
        log(f"checkpoint in {model}")
    comparison = Comparison(options, model)
    functions = {"plain": plain, "eagle": eagle, "pages": pages}
    for part in options.parts:
        if time.monotonic() > comparison.deadline:
            comparison.problem(f"{part}: not run, the time budget was spent")
            continue
        log(f"part {part}")
        try:
            functions[part](comparison)
        except Exception as error:  # the other parts' findings are not to be lost
            traceback.print_exc()
            comparison.problem(f"{part}: {type(error).__name__}: {error}")
    content = {"tp": options.tp, "problems": comparison.problems, **comparison.found}
    print(f"written: {evidence.update(options.out, 'compare', content)}")
    for problem in comparison.problems:
        print(f"PROBLEM: {problem}")
    print("FAILED" if comparison.problems else "PASSED")
    return 1 if comparison.problems else 0


if __name__ == "__main__":
    sys.exit(main())
