"""Requests that a server gets, and how the answers of two servers are compared."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import random
import time
from typing import Any

from .servers import Server, log

VOCABULARY = 1024
TOP = 8  # log-probabilities asked for at each step
# Allowed beyond what SGLang's backends differ by among themselves: a factor and a floor.
FACTOR, FLOOR = 1.5, 0.05
# Where choices part, how unlike the tokens were comes in steps of a bf16 logit, 1/16 or 1/8, and
# the largest of some twenty is a matter of chance. Of 34 such figures (EAGLE against none, FlashMLA
# and etap, in 17 evidence runs) 24 were 0.125, 7 were 0.1875 and 3 were 0.25, so what is right may
# be twice as far apart as another that is right. What is broken is further off by far.
GAP_FACTOR = 2.0


@dataclasses.dataclass
class Answer:
    """What a server generated for one prompt."""

    tokens: list[int]
    logprobs: list[float]  # empty if the server gave none
    top: list[dict[int, float]]  # token -> log-probability, of the TOP most likely; or empty
    accept_length: float | None = None
    retractions: int = 0

    def gap_to(self, step: int, other_token: int) -> float:
        """How much likelier this answer's token was than another; infinite if not in ``top``."""
        if not self.top:
            return 0.0  # unknown here: the other answer's own gap decides
        return self.logprobs[step] - self.top[step].get(other_token, float("-inf"))


def prompt(seed: str, length: int) -> list[int]:
    """Random tokens, the same for the same seed, without the special ones."""
    generator = random.Random(seed)
    return [generator.randrange(2, VOCABULARY) for _ in range(length)]


def answer_of(
    server: Server, tokens: list[int], new_tokens: int, timeout: float, logprobs: bool = True
) -> Answer:
    body: dict[str, Any] = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    if logprobs:
        body |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": TOP}
    reply = server.post("/generate", body, timeout)
    meta = reply["meta_info"]
    # With speculative decoding a version may leave log-probabilities out, but never tokens.
    pairs = meta.get("output_token_logprobs") or []
    tops = meta.get("output_top_logprobs") or []
    return Answer(
        [int(token) for token in reply.get("output_ids") or [entry[1] for entry in pairs]],
        [float(entry[0]) for entry in pairs],
        [{int(e[1]): float(e[0]) for e in entry or ()} for entry in tops],
        meta.get("spec_accept_length"),
        meta.get("num_retractions") or 0,
    )


@dataclasses.dataclass
class Group:
    """Prompts sent together (``parallel``) or one after another."""

    name: str
    prompts: list[list[int]]
    new_tokens: int
    parallel: bool


def groups(quick: bool) -> list[Group]:
    """The workload: short, long, shared-prefix and concurrent requests."""
    short = [prompt(f"short {n}", n) for n in (1, 2, 15, 63, 64, 65, 127, 700)]
    long = [prompt("long 0", 33_000), prompt("long 1", 40_001)]
    prefix = prompt("prefix", 3_000)
    shared = [prefix + prompt(f"tail {n}", n) for n in (1, 30, 64, 500)]
    lengths = random.Random(1)
    many = [prompt(f"many {n}", lengths.randrange(3, 1_500)) for n in range(64)]
    # The same last token after different contexts: only attention tells them apart, and where these
    # are short, one token weighs most.
    dependent = [[*prompt(f"context {n}", n), 7] for n in range(4, 28)]
    found = [
        Group("short", short, 64, parallel=False),
        Group("context", dependent, 8, parallel=True),
        Group("shared prefix", shared, 32, parallel=False),
        Group("concurrent", many, 48, parallel=True),
        Group("long", long, 32, parallel=True),
    ]
    return found[:3] if quick else found


def run(server: Server, group: Group, timeout: float, logprobs: bool = True) -> list[Answer]:
    """All answers of a group, in the order of its prompts."""
    start = time.monotonic()
    workers = len(group.prompts) if group.parallel else 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = [
            pool.submit(answer_of, server, tokens, group.new_tokens, timeout, logprobs)
            for tokens in group.prompts
        ]
        answers = [future.result() for future in pending]
    log(f"{server.name}: {group.name}: {len(answers)} in {time.monotonic() - start:.1f} s")
    return answers


def abort_some(server: Server, timeout: float) -> int:
    """Start long requests and abort them while they run; returns how many ended early."""
    names = [f"aborted-{n}" for n in range(8)]
    new_tokens = 4_000

    def generate(name: str) -> int:
        body = {
            "rid": name,
            "input_ids": prompt(name, 500),
            "sampling_params": {"max_new_tokens": new_tokens, "ignore_eos": True},
        }
        return int(server.post("/generate", body, timeout)["meta_info"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        pending = [pool.submit(generate, name) for name in names]
        for name in names:
            time.sleep(0.15)
            server.post("/abort_request", {"rid": name}, timeout)
        produced = [future.result() for future in pending]
    return sum(count < new_tokens for count in produced)


@dataclasses.dataclass
class Difference:
    """How far two servers' answers are apart."""

    requests: int = 0
    diverged: int = 0
    worst_logprob: float = 0.0  # of the same token after the same tokens
    worst_gap: float = 0.0  # between the two tokens, where greedy choices differ
    compared_tokens: int = 0

    def add(self, other: Difference) -> None:
        self.requests += other.requests
        self.diverged += other.diverged
        self.worst_logprob = max(self.worst_logprob, other.worst_logprob)
        self.worst_gap = max(self.worst_gap, other.worst_gap)
        self.compared_tokens += other.compared_tokens


def difference(first: list[Answer], second: list[Answer]) -> Difference:
    """Compare greedy tokens and log-probabilities up to where the choices part.

    Equal choices are followed token by token. Where they part, a backend is not wrong if both
    tokens were about as likely; ``worst_gap`` says how unlike they were at most (infinite if one
    is not among the most likely tokens of the other). What comes after has another context.
    """
    total = Difference(requests=len(first))
    for one, other in zip(first, second, strict=True):
        if len(one.tokens) != len(other.tokens):
            total.worst_gap = float("inf")  # both were asked for as many, whatever they choose
        has_logprobs = bool(one.logprobs and other.logprobs)
        for step, (token, other_token) in enumerate(zip(one.tokens, other.tokens, strict=False)):
            if token != other_token:
                gap = max(one.gap_to(step, other_token), other.gap_to(step, token))
                total.worst_gap = max(total.worst_gap, gap)
                total.diverged += 1
                break
            total.compared_tokens += 1
            if has_logprobs:
                apart = abs(one.logprobs[step] - other.logprobs[step])
                total.worst_logprob = max(total.worst_logprob, apart)
    return total


def has_close_logprobs(found: Difference, allowed: Difference) -> bool:
    return found.worst_logprob <= FACTOR * allowed.worst_logprob + FLOOR


def is_close(found: Difference, allowed: Difference) -> bool:
    """Whether answers are hardly further apart than those of two backends that are right."""
    return (
        has_close_logprobs(found, allowed)
        and found.worst_gap <= GAP_FACTOR * max(allowed.worst_gap, allowed.worst_logprob) + FLOOR
    )


def is_within(found: Difference, allowed: Difference) -> bool:
    """Whether answers are close, and not for want of anything to compare."""
    return found.compared_tokens > 0 and is_close(found, allowed)


def as_json(found: Difference) -> dict[str, Any]:
    # JSON has no infinity.
    return {
        key: (round(value, 5) if value < float("inf") else "infinite")
        if isinstance(value, float)
        else value
        for key, value in dataclasses.asdict(found).items()
    }
