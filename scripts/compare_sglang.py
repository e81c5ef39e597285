#!/usr/bin/env python
"""Compares real SGLang servers with ``etap`` and with SGLang's own backends.

    python scripts/compare_sglang.py                           on one GPU, about three minutes
    python scripts/compare_sglang.py --parts plain --quick     short requests only
    python scripts/compare_sglang.py --parts mixed one_batch   mixed chunks; SGLang's one_batch tool
    python scripts/compare_sglang.py --parts fa3 prefill       where SGLang has FlashAttention-3
    python scripts/compare_sglang.py --parts tp dp --quick     on two GPUs

All servers run at the same time, on a tiny DeepSeek-V3 whose outputs depend on attention
(make_tiny_checkpoint.py). Each gets short, context-dependent, shared-prefix, 64 concurrent and
longer than 32K requests; etap also after some are aborted. Greedy tokens and log-probabilities of
etap must be as close to each of SGLang's backends as the closest of its peers is, and a server
whose etap forgets one token must not be. sglang_eval/variants.py has the servers of the other
parts. Parts that an earlier run found without a problem, with the same sources, stay in the
evidence.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import make_tiny_checkpoint
from sglang_eval import broken, evidence, plugin, variants, workload
from sglang_eval.one_batch import OneBatch
from sglang_eval.servers import START, Server, ServerError, log, running
from sglang_eval.workload import Answer, Difference, has_close_logprobs, is_within

Answers = dict[str, list[Answer]]  # by the group's name

DEFAULT_PARTS = ("plain", "eagle", "pages")
PARTS = (*DEFAULT_PARTS, *variants.VARIANTS, "one_batch")
KEPT = (*PARTS, "after_abort")
PEERS = ("flashmla", "flashinfer", "triton")
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
EAGLE += ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
# Of the time, what servers may take to start.
START_SHARE = 0.8


def server_arguments(model: pathlib.Path, backend: str) -> list[str]:
    values = {
        "--model-path": model,
        "--attention-backend": backend,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--context-length": 49152,
        "--max-total-tokens": 262144,
        "--max-running-requests": 64,
        "--cuda-graph-max-bs-decode": 64,
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
        if "mixed" in options.parts:
            # There is nothing to mix but among concurrent requests.
            every = workload.groups(quick=False)
            wanted = {"concurrent", *(group.name for group in self.groups)}
            self.groups = [group for group in every if group.name in wanted]
        self.without_logprobs: set[str] = set()
        # How far SGLang's backends are apart: found by the part "plain", until then a guess that
        # is far below what the control shows.
        self.among = Difference(worst_logprob=0.15, worst_gap=0.15)

    def start(self, name: str, backend: str, *extra: str, **environment: str) -> Server:
        arguments = [*server_arguments(self.model, backend), *extra]
        if "--tp-size" not in extra:
            # A dozen servers that spin would slow each other down; ranks would wait for sleepers.
            arguments.append("--sleep-on-idle")
        return Server(name, arguments, self.options.work, environment)

    def start_variant(self, variant: variants.Variant) -> list[Server]:
        """Start a part's servers; what comes twice among a server's arguments, counts last."""
        extra: list[str] = []
        if variant.heads is not None:
            model = self.options.work / f"tiny_{variant.heads}_heads"
            make_tiny_checkpoint.write(model, seed=0, heads=variant.heads)
            extra = ["--model-path", str(model)]
        if not variant.has_logprobs:
            self.without_logprobs |= variant.servers.keys()
        return [
            self.start(name, backend, *options, *extra, **variants.environment_of(variant))
            for name, (backend, options) in variant.servers.items()
        ]

    def left(self) -> float:
        return max(5.0, self.deadline - time.monotonic())

    def ask(self, server: Server) -> Answers:
        """All groups' answers, as far as the server gives them."""
        answers: Answers = {}
        try:
            for group in self.groups:
                has_logprobs = server.name not in self.without_logprobs
                answers[group.name] = workload.run(server, group, self.left(), has_logprobs)
        except Exception as error:  # the other servers' answers are not to be lost
            self.problem(f"{server.name}: no answers: {type(error).__name__}: {error}")
        return answers

    def problem(self, text: str) -> None:
        self.problems.append(text.splitlines()[0])
        log(f"PROBLEM: {text}")

    def ask_all(self, servers: dict[str, Server]) -> dict[str, Answers]:
        """Ask all servers at the same time."""
        with concurrent.futures.ThreadPoolExecutor(max(len(servers), 1)) as pool:
            pending = {name: pool.submit(self.ask, server) for name, server in servers.items()}
            return {name: answers.result() for name, answers in pending.items()}


def total_difference(first: Answers, second: Answers) -> Difference:
    total = Difference()
    for name in first.keys() & second.keys():
        total.add(workload.difference(first[name], second[name]))
    return total


def compared(name: str, first: Answers, second: Answers) -> Difference:
    """How far two servers are apart in all; logged, with the log-probabilities of each group."""
    found = total_difference(first, second)
    groups = ", ".join(
        f"{group} {workload.difference(first[group], second[group]).worst_logprob:.3f}"
        for group in first
        if group in second
    )
    log(
        f"{name}: {found.requests} requests, {found.compared_tokens} equal tokens, logprobs within "
        f"{found.worst_logprob:.4f} ({groups}), {found.diverged} part, gap {found.worst_gap:.4f}"
    )
    return found


def check_context(comparison: Comparison, name: str, answers: list[Answer]) -> None:
    """The checkpoint's control: one last token must not have the same successors everywhere."""
    first = answers[0].top[0]
    if all(first.keys() == answer.top[0].keys() for answer in answers):
        comparison.problem(f"{name}: outputs do not depend on the context")


def servers_of(comparison: Comparison) -> list[Server]:
    """Start etap, which every part compares with, and what the parts asked for need besides."""
    options, parts = comparison.options, comparison.options.parts
    servers = [comparison.start("etap", "etap")]
    if "plain" in parts:
        servers += [comparison.start(name, name) for name in options.peers]
        control = broken.write_distribution(options.work / "control")
        paths = f"{control}:{environment_path()}"
        servers.append(comparison.start("broken", "etap", PYTHONPATH=paths))
    if "eagle" in parts:
        servers += [
            comparison.start(f"{name}_eagle", name, *EAGLE) for name in ("etap", "flashmla")
        ]
    if "pages" in parts:
        servers += [
            comparison.start(f"etap_page{size}", "etap", "--page-size", str(size))
            for size in (1, 16, 32)
        ]
        decode_only = ["--decode-attention-backend", "etap"]
        decode_only += ["--prefill-attention-backend", "triton"]
        servers.append(comparison.start("etap_decode_only", "triton", *decode_only))
    for part, variant in variants.VARIANTS.items():
        if part in parts:
            servers += comparison.start_variant(variant)
    return servers


def environment_path() -> str:
    """``PYTHONPATH`` of a server, to put something before it."""
    from sglang_eval.servers import environment

    return environment(pathlib.Path("."))["PYTHONPATH"]


def allowed_differences(pairs: dict[tuple[str, str], Difference]) -> dict[str, Difference]:
    """What each backend differs by from the closest other one.

    Where choices part, how unlike the tokens were is a matter of chance: so its largest over all
    others that are about as close.
    """
    allowed = {}
    for name in dict.fromkeys(itertools.chain(*pairs)):
        own = [found for pair, found in pairs.items() if name in pair]
        closest = min(own, key=lambda found: found.worst_logprob)
        close = [found for found in own if has_close_logprobs(found, closest)]
        gap = max(found.worst_gap for found in close)
        allowed[name] = dataclasses.replace(closest, worst_gap=gap)
    return allowed


def judge_plain(
    comparison: Comparison, answers: dict[str, Answers], judges: Sequence[str] = ()
) -> None:
    """etap and a broken etap against SGLang's backends: all of them, or those that may judge."""
    complete = {name for name in answers if len(answers[name]) == len(comparison.groups)}
    peers = [name for name in comparison.options.peers if name in complete]
    pairs = {
        pair: compared(" and ".join(pair), *(answers[name] for name in pair))
        for pair in itertools.combinations(peers, 2)
    }
    results = {"_".join(pair): workload.as_json(found) for pair, found in pairs.items()}
    allowed = allowed_differences(pairs)
    if not allowed:
        comparison.problem("fewer than two of SGLang's backends ran: nothing to compare with")
        return
    judging = [name for name in allowed if name in judges or not judges]
    if not judging:
        comparison.problem(f"did not run, and nothing else may judge: {', '.join(judges)}")
        return
    tightest = min(judging, key=lambda name: allowed[name].worst_logprob)
    comparison.among = allowed[tightest]
    for name, ours in itertools.product(allowed, ("etap", "broken")):
        if ours not in answers:
            continue
        found = compared(f"{ours} and {name}", answers[ours], answers[name])
        results[f"{ours}_{name}"] = workload.as_json(found)
        if ours == "etap" and name in judging and not is_within(found, allowed[name]):
            comparison.problem(f"etap and {name} differ more than SGLang's backends do")
        if ours == "broken" and name == tightest and is_within(found, allowed[name]):
            comparison.problem(f"the comparison with {name} does not notice a broken backend")
    for name in ("etap", *peers):
        if "context" in answers[name]:
            check_context(comparison, name, answers[name]["context"])
    comparison.found["plain"] = results


def abort_and_ask(comparison: Comparison, server: Server) -> tuple[int, Answers]:
    """Abort requests while they run, and ask again; how many were aborted, and the answers."""
    try:
        aborted = workload.abort_some(server, comparison.left())
        groups = comparison.groups[:3]
        return aborted, {g.name: workload.run(server, g, comparison.left()) for g in groups}
    except ServerError as error:
        comparison.problem(f"abort: {error}")
        return 0, {}


def judge_after_abort(
    comparison: Comparison, aborted: int, before: Answers, after: Answers
) -> None:
    """What is asked after an abort must be answered as before."""
    found = compared(f"etap before and after {aborted} aborted requests", before, after)
    comparison.found["after_abort"] = {"aborted": aborted, **workload.as_json(found)}
    if aborted == 0:
        comparison.problem("no request was aborted")
    if not is_within(found, comparison.among):
        comparison.problem("etap answers otherwise after requests were aborted")


def judge_eagle(comparison: Comparison, answers: dict[str, Answers]) -> None:
    """EAGLE with the MTP layer: the same tokens as without, and drafts that are accepted."""
    results: dict[str, Any] = {}
    allowed = comparison.among
    if "flashmla_eagle" in answers:
        allowed = compared(
            "flashmla with EAGLE and etap without", answers["flashmla_eagle"], answers["etap"]
        )
        results["flashmla_eagle"] = workload.as_json(allowed)
    if "etap_eagle" in answers:
        found = compared("etap with EAGLE and without", answers["etap_eagle"], answers["etap"])
        results["etap_eagle"] = workload.as_json(found)
        if not is_within(found, allowed):
            comparison.problem("etap with EAGLE differs from etap without")
    for name in ("etap_eagle", "flashmla_eagle"):
        lengths = [a.accept_length for group in answers.get(name, {}).values() for a in group]
        known = [length for length in lengths if length]
        if known:
            results[f"{name}_accept_length"] = round(sum(known) / len(known), 3)
            log(f"{name}: accepted {results[f'{name}_accept_length']} tokens a step")
    ours, theirs = (results.get(f"{n}_eagle_accept_length") for n in ("etap", "flashmla"))
    if ours is None or ours < 1.1 or (theirs and ours < 0.97 * theirs):
        comparison.problem(f"etap accepts {ours} tokens a step, flashmla {theirs}")
    comparison.found["eagle"] = results


def judge_pages(comparison: Comparison, answers: dict[str, Answers]) -> None:
    """Page sizes other than 64, and etap for decode only: the same answers as with 64."""
    results = {}
    for name in answers.keys() & {*(f"etap_page{n}" for n in (1, 16, 32)), "etap_decode_only"}:
        found = compared(f"{name} and etap", answers[name], answers["etap"])
        results[name] = workload.as_json(found)
        if not is_within(found, comparison.among):
            comparison.problem(f"{name} differs from etap with pages of 64 tokens")
    comparison.found["pages"] = results


def judge_beside_etap(part: str, comparison: Comparison, answers: dict[str, Answers]) -> None:
    """Servers of a part against etap: nothing but rounding may tell them apart."""
    results = {}
    for name in variants.VARIANTS[part].servers.keys() & answers.keys():
        found = compared(f"{name} and etap", answers[name], answers["etap"])
        results[name] = workload.as_json(found)
        if not is_within(found, comparison.among):
            comparison.problem(f"{name} and etap differ more than SGLang's backends do")
    comparison.found[part] = results


def judge_mixed(comparison: Comparison, answers: dict[str, Answers]) -> None:
    """Decode mixed into prefill batches: etap must answer as without."""
    if "etap_mixed" not in answers:
        return
    judge_beside_etap("mixed", comparison, answers)
    log_path = comparison.options.work / "server.etap_mixed.log"
    mixed_batches = variants.mixed_batches(log_path.read_text(errors="replace"))
    log(f"etap_mixed: {mixed_batches} mixed batches")
    if not mixed_batches:
        comparison.problem("etap_mixed: no batch was mixed")
    comparison.found["mixed"]["mixed_batches"] = mixed_batches


def judge_gpus(part: str, comparison: Comparison, answers: dict[str, Answers]) -> None:
    """Two GPUs: etap against SGLang's backends with the same options."""
    ours, *peers = variants.VARIANTS[part].servers
    if not all(answers.get(name) for name in (ours, *peers)):
        comparison.problem(f"{part}: not all of {ours}, {', '.join(peers)} answered")
        return
    allowed = compared(" and ".join(peers), *(answers[name] for name in peers))
    results = {"_".join(peers): workload.as_json(allowed)}
    for name in peers:
        found = compared(f"{ours} and {name}", answers[ours], answers[name])
        results[f"{ours}_{name}"] = workload.as_json(found)
        if not is_within(found, allowed):
            comparison.problem(f"{ours} and {name} differ more than {' and '.join(peers)} do")
    check_context(comparison, ours, answers[ours]["context"])
    comparison.found[part] = results


# In this order: the first finds what the others are measured with.
JUDGES: dict[str, Callable[[Comparison, dict[str, Answers]], None]] = {
    "plain": judge_plain,
    "eagle": judge_eagle,
    "pages": judge_pages,
    "fa3": functools.partial(judge_beside_etap, "fa3"),
    "prefill": functools.partial(judge_beside_etap, "prefill"),
    "mixed": judge_mixed,
    "tp": functools.partial(judge_gpus, "tp"),
    "dp": functools.partial(judge_gpus, "dp"),
}


def compare(comparison: Comparison) -> None:
    """Start all servers, ask them, judge their answers part by part."""
    servers = servers_of(comparison)
    started_by = START + START_SHARE * comparison.options.time_budget
    with running(servers, started_by) as ready:
        for name in {server.name for server in servers} - ready.keys():
            comparison.problem(f"{name}: did not start")
        if "etap" not in ready:
            return
        answers = comparison.ask_all(ready)
        aborted, after = abort_and_ask(comparison, ready["etap"])
    for part, judge in JUDGES.items():
        if part in comparison.options.parts:
            log(f"part {part}")
            judge(comparison, answers)
    judge_after_abort(comparison, aborted, answers["etap"], after)


def run_parts(comparison: Comparison) -> None:
    """The tools and the servers; the tool starts with the servers, and ends meanwhile."""
    options = comparison.options
    if missing := variants.missing_gpus(options.parts):
        comparison.problem(missing)
        return
    tool = None
    try:
        if "one_batch" in options.parts:
            tool = OneBatch(options.work, make_tiny_checkpoint.CONFIG)
        if set(options.parts) != {"one_batch"}:
            compare(comparison)
        if tool is not None:
            comparison.found["one_batch"] = tool.result(comparison.left())
            log(f"one_batch: {comparison.found['one_batch']}")
    finally:
        if tool is not None:
            tool.stop()


def make_parser(
    description: str | None,
    parts: Sequence[str],
    default_parts: Sequence[str],
    peers: Sequence[str],
    seconds: float,
) -> argparse.ArgumentParser:
    """The command line of a comparison, whose time budget is ``seconds`` unless one is given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=parts, default=default_parts)
    parser.add_argument("--peers", nargs="+", default=peers, help=f"default: {' '.join(peers)}")
    parser.add_argument("--quick", action="store_true", help="short requests only")
    parser.add_argument(
        "--time-budget", type=float, default=seconds, help=f"seconds ({seconds:.0f})"
    )
    parser.add_argument("--model", type=pathlib.Path, help="made if not given")
    parser.add_argument("--work", type=pathlib.Path, help="logs and caches; temporary if not given")
    parser.add_argument("--out", type=pathlib.Path, help="results/<gpu>/sglang.json")
    return parser


def run(
    options: argparse.Namespace,
    work: Callable[[Comparison], None],
    section: str,
    keep: Sequence[str],
) -> int:
    """A comparison from its command line to its section of the evidence; the exit status."""
    options.work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="etap_sglang_"))
    plugin.ensure_discoverable()
    model = options.model
    if model is None:
        model = options.work / "tiny"
        make_tiny_checkpoint.write(model, seed=0)
        log(f"checkpoint in {model}")
    comparison = Comparison(options, model)
    try:
        work(comparison)
    except Exception as error:  # what was found before is not to be lost
        traceback.print_exc()
        comparison.problem(f"{type(error).__name__}: {error}")
    content = {"problems": comparison.problems, **comparison.found}
    print(f"written: {evidence.update(options.out, section, content, keep=keep)}")
    for problem in comparison.problems:
        print(f"PROBLEM: {problem}")
    print("FAILED" if comparison.problems else "PASSED")
    return 1 if comparison.problems else 0


def main(arguments: list[str] | None = None) -> int:
    options = make_parser(__doc__, PARTS, DEFAULT_PARTS, PEERS, 420.0).parse_args(arguments)
    return run(options, run_parts, "compare", KEPT)


if __name__ == "__main__":
    sys.exit(main())
