#!/usr/bin/env python
"""Lets an SGLang server with ``etap`` bear mixed requests for minutes, on one GPU.

    python scripts/soak_sglang.py                   8 minutes, and about 2 to start and to end
    python scripts/soak_sglang.py --minutes 60

64 clients send short and long prompts, prompts with shared prefixes, streams, streams that are left
midway, requests that are aborted, and many that generate so much that the cache, which is small,
runs full and SGLang retracts requests and computes them again. Among them are greedy requests whose
answers are known from two servers with SGLang's own backends: each must be as close to one of those
as these are among themselves (that the comparison notices a prompt without one of its tokens is
checked first). In the second half the GPU's memory must not keep growing, no error is logged, and
at the end the server must be idle, healthy, answer as before, and end when told to. Writes
results/<gpu>/soak.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import make_tiny_checkpoint
from decode_bench import evidence
from sglang_eval import observe, plugin, workload
from sglang_eval.evidence import command_of
from sglang_eval.servers import START, Server, log, running, stop_all
from sglang_eval.traffic import SAMPLE_TOKENS, Traffic
from sglang_eval.workload import Answer, Difference, Group

CLIENTS = 64
RUNNING = 48
PEERS = ("flashmla", "triton")
ROUNDS = 3  # of answers of each peer: rounding follows the batch
WARM_UP = 0.5  # of the run, before memory is watched
INTERVAL = 5.0  # seconds between samples of the memory
# What a growing allocator may take in a few steps; and, in each third of the second half, less than
# 512 lost bytes of 200 decode steps a second come to.
MEMORY_LIMIT_MIB = 256
STEADY_LIMIT_MIB = 6
SHUTDOWN_SECONDS = 60.0
END_SECONDS = 50.0  # kept for the last requests, the checks at the end, and the shutdown


def server_arguments(model: pathlib.Path, backend: str, max_total_tokens: int) -> list[str]:
    values = {
        "--model-path": model,
        "--attention-backend": backend,
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--context-length": 16384,
        "--max-total-tokens": max_total_tokens,
        "--max-running-requests": RUNNING,
        "--cuda-graph-max-bs-decode": RUNNING,
        "--chunked-prefill-size": 2048,
        "--mem-fraction-static": 0.3,
        # Let in more requests than the cache holds when they have grown.
        "--schedule-conservativeness": 0.3,
        "--random-seed": 0,
        "--watchdog-timeout": 300,
        "--log-level-http": "warning",
    }
    flags = ["--skip-tokenizer-init", "--disable-flashinfer-autotune"]
    return [*(str(part) for pair in values.items() for part in pair), *flags]


def samples() -> list[list[int]]:
    """Prompts of every kind, asked for again and again."""
    groups = {group.name: group.prompts for group in workload.groups(quick=False)}
    chosen = [*groups["short"], *groups["context"], *groups["shared prefix"]]
    return [*chosen, *groups["concurrent"][:8], workload.prompt("soak long", 9_000)]


def without_a_token(prompt: list[int]) -> list[int]:
    """A prompt that lost the token before its last."""
    return [*prompt[:-2], prompt[-1]]


@dataclasses.dataclass
class Reference:
    """What SGLang's own backends answer, and how far apart they are."""

    answers: list[list[Answer]]  # of each prompt, from every peer and round
    allowed: Difference
    noticed: int  # prompts without a token that are told from whole ones
    altered: int

    def beyond(self, index: int, answer: Answer) -> Difference | None:
        """How far an answer is from the closest known one; None if that is close enough."""
        found = [workload.difference([answer], [known]) for known in self.answers[index]]
        if any(workload.is_close(each, self.allowed) for each in found):
            return None
        return min(found, key=lambda each: (each.worst_gap, each.worst_logprob))


def spread(first: list[list[Answer]], second: list[list[Answer]]) -> Difference:
    """The most that two peers' answers are apart, over all pairs of their rounds."""
    total = Difference()
    for one, other in itertools.product(first, second):
        total.add(workload.difference(one, other))
    return total


def ask_peers(peers: list[Server], prompts: list[list[int]], seconds: float) -> Reference:
    """Ask peers in several rounds, in batches and one by one."""
    rounds = [
        [
            workload.run(
                peer, Group(f"round {n}", prompts, SAMPLE_TOKENS, parallel=n < ROUNDS - 1), seconds
            )
            for n in range(ROUNDS)
        ]
        for peer in peers
    ]
    allowed = spread(rounds[0], rounds[1])
    answers = [list(each) for each in zip(*itertools.chain(*rounds), strict=True)]
    long_enough = [index for index, prompt in enumerate(prompts) if len(prompt) > 2]
    altered = [without_a_token(prompts[index]) for index in long_enough]
    group = Group("without a token", altered, SAMPLE_TOKENS, parallel=True)
    reference = Reference(answers, allowed, 0, len(altered))
    for index, answer in zip(long_enough, workload.run(peers[0], group, seconds), strict=True):
        reference.noticed += reference.beyond(index, answer) is not None
    log(
        f"peers: {workload.as_json(allowed)}; {reference.noticed} of {len(altered)} altered noticed"
    )
    return reference


class Soak:
    """One run: what was found, and what was wrong."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = START + options.time_budget
        self.problems: list[str] = []
        self.found: dict[str, Any] = {}
        self.prompts = samples()

    def problem(self, text: str) -> None:
        self.problems.append(text.splitlines()[0][:500])
        log(f"PROBLEM: {text}")

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def server(self, backend: str, max_total_tokens: int) -> Server:
        work = self.options.work
        variables = observe.write_logging_config(work / "logging.json")
        arguments = server_arguments(self.options.model, backend, max_total_tokens)
        return Server(f"soak_{backend}", arguments, work, variables)

    def run(self) -> None:
        etap = self.server("etap", self.options.max_total_tokens)
        peers = [self.server(name, 65_536) for name in PEERS]
        start_by = time.monotonic() + self.left() - 60.0
        with running([etap, *peers], start_by) as ready:
            missing = {server.name for server in (etap, *peers)} - ready.keys()
            if missing:
                self.problem(f"did not start: {', '.join(sorted(missing))}")
                return
            try:
                reference = ask_peers(peers, self.prompts, self.left())
                self.check_reference(reference)
                stop_all(peers)  # the GPU's memory is etap's from here on
                self.bear(etap, reference)
                self.check_end(etap, reference)
            except BaseException:
                log(f"the end of {etap.name}'s log:\n{etap.tail(60)}")
                raise
            if self.problems:
                log(f"the end of {etap.name}'s log:\n{etap.tail(60)}")

    def check_reference(self, reference: Reference) -> None:
        self.found["samples"] = {
            "prompts": len(self.prompts),
            "peers": list(PEERS),
            "peers_apart": workload.as_json(reference.allowed),
            "altered_prompts": reference.altered,
            "altered_prompts_noticed": reference.noticed,
        }
        if reference.noticed == 0:
            self.problem("the comparison does not notice a prompt without one of its tokens")
        if reference.allowed.worst_gap == float("inf"):
            self.problem(f"{' and '.join(PEERS)} are too far apart to judge by")

    def bear(self, etap: Server, reference: Reference) -> None:
        """The requests, and what must hold while they are answered."""
        traffic = Traffic(etap, self.prompts, self.options.seed)
        memory = [observe.gpu_memory_mib()]
        self.offset = etap.log_path.stat().st_size
        seconds = min(60 * self.options.minutes, self.left() - END_SECONDS)
        if seconds < 60 * self.options.minutes:
            log(f"{seconds:.0f} s are left of the time budget: shorter than asked for")
        log(f"{CLIENTS} clients for {seconds:.0f} s")

        def watch() -> None:
            memory.append(observe.gpu_memory_mib())
            if len(memory) % 12 == 1:
                done = sum(traffic.outcomes.values())
                log(f"{done} requests, {len(traffic.problems)} problems, {memory[-1]} MiB")

        took = traffic.run(CLIENTS, seconds, watch, INTERVAL)
        self.found["seconds"] = round(took)
        self.judge_requests(traffic)
        self.judge_samples(traffic.sampled, reference)
        self.judge_memory(memory)

    def judge_requests(self, traffic: Traffic) -> None:
        outcomes: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(traffic.outcomes.items()):
            outcomes.setdefault(kind, {})[outcome] = count
        self.found["requests"] = outcomes
        self.found["failed_requests"] = len(traffic.problems)
        log(f"requests: {outcomes}")
        for text in traffic.problems[:3]:
            self.problem(text)
        for kind, outcome in (("abort", "aborted"), ("disconnect", "disconnected")):
            if not traffic.outcomes[kind, outcome]:
                self.problem(f"no request was {outcome}")

    def judge_samples(self, sampled: list[tuple[int, Answer]], reference: Reference) -> None:
        beyond = []
        for index, answer in sampled:
            found = reference.beyond(index, answer)
            if found is not None:
                beyond.append((index, answer.retractions, found))
        self.found["samples"] |= {
            "compared": len(sampled),
            "beyond": len(beyond),
            "retracted": sum(answer.retractions > 0 for _, answer in sampled),
        }
        log(f"samples: {self.found['samples']}")
        for index, retractions, found in beyond[:3]:
            self.problem(
                f"sample {index} ({len(self.prompts[index])} tokens, retracted {retractions} "
                f"times) differs: {workload.as_json(found)}"
            )
        if not sampled:
            self.problem("no sample was compared")

    def judge_memory(self, memory: list[int]) -> None:
        grown = observe.growth(memory, WARM_UP)
        steady = observe.steady_growth(memory, WARM_UP)
        self.found["memory_mib"] = {
            "samples": memory,
            "growth_in_second_half": grown,
            "limit": MEMORY_LIMIT_MIB,
            "steady_growth": steady,
            "steady_limit": STEADY_LIMIT_MIB,
        }
        log(f"memory: {self.found['memory_mib']}")
        if grown > MEMORY_LIMIT_MIB:
            self.problem(f"the GPU's memory grew by {grown} MiB; allowed: {MEMORY_LIMIT_MIB}")
        if steady > STEADY_LIMIT_MIB:
            self.problem(
                f"the GPU's memory grew by {steady} MiB or more in each third of the second half; "
                f"allowed: {STEADY_LIMIT_MIB}"
            )

    def check_end(self, etap: Server, reference: Reference) -> None:
        """Idle, healthy, right, no error in the log, and a shutdown in good order."""
        # A request whose client is gone is aborted two seconds later. SGLang flushes its cache when
        # no request is left, and compares what its pools count with what they hold while idle.
        time.sleep(5.0)
        status = etap.status("/flush_cache?timeout=30", 60.0)
        if status != 200:
            self.problem(f"not idle after the last answer: /flush_cache answers {status}")
        status = etap.status("/health", 30.0)
        if status != 200:
            self.problem(f"not healthy: /health answers {status}")
        group = Group("afterwards", self.prompts, SAMPLE_TOKENS, parallel=True)
        answers = workload.run(etap, group, self.left())
        self.judge_afterwards(answers, reference)
        findings = observe.scan(observe.read_from(etap.log_path, self.offset))
        self.found["retractions"] = findings.retractions
        self.found["retracted_requests"] = findings.retracted
        self.found["log_errors"] = len(findings.errors)
        self.found["log_errors_expected"] = findings.expected_errors
        log(f"cache full {findings.retractions} times, {findings.retracted} requests retracted")
        if not findings.retractions:
            self.problem("the cache was never full: give a smaller --max-total-tokens")
        for line in findings.errors[:5]:
            self.problem(f"in the log: {line}")
        self.found["shutdown_seconds"] = round(etap.shut_down(SHUTDOWN_SECONDS), 1)
        log(f"shut down in {self.found['shutdown_seconds']} s")
        if "Remaining number of requests 0" not in observe.read_from(etap.log_path, self.offset):
            self.problem("the log does not say that the server ended in good order")

    def judge_afterwards(self, answers: list[Answer], reference: Reference) -> None:
        wrong = [i for i, answer in enumerate(answers) if reference.beyond(i, answer) is not None]
        self.found["samples"]["beyond_afterwards"] = len(wrong)
        if wrong:
            self.problem(f"after the run the samples {wrong[:10]} are answered otherwise")


def write_evidence(soak: Soak) -> pathlib.Path:
    path = soak.options.out or evidence.default_directory() / "soak.json"
    header = evidence.header(evidence.check_sources_match(), None)
    figures = {"problems": soak.problems, **soak.found}
    content = {"command": command_of(sys.argv), "soak": figures, "cases": []}
    evidence.write(path, header | content)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of requests (8)")
    parser.add_argument("--max-total-tokens", type=int, default=24576, help="of the cache (24576)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--time-budget", type=float, help="seconds in all, the run is cut to fit (4 minutes more)"
    )
    parser.add_argument("--model", type=pathlib.Path, help="made if not given")
    parser.add_argument("--work", type=pathlib.Path, help="logs and caches; temporary if not given")
    parser.add_argument("--out", type=pathlib.Path, help="results/<gpu>/soak.json")
    options = parser.parse_args(arguments)
    options.time_budget = options.time_budget or 60 * options.minutes + 240
    options.work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="etap_soak_"))
    plugin.ensure_discoverable()
    if options.model is None:
        options.model = options.work / "tiny"
        make_tiny_checkpoint.write(options.model, seed=0)
    soak = Soak(options)
    try:
        soak.run()
    except (Exception, KeyboardInterrupt) as error:  # what was found before is not to be lost
        traceback.print_exc()
        soak.problem(f"{type(error).__name__}: {error}")
    print(f"written: {write_evidence(soak)}")
    for problem in soak.problems:
        print(f"PROBLEM: {problem}")
    print("FAILED" if soak.problems else "PASSED")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
