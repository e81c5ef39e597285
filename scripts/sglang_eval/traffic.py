"""Mixed requests for a server that is to bear them for minutes, and what must come back."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from . import workload
from .servers import Server
from .workload import Answer

REQUEST_SECONDS = 120.0  # after which a request hangs
MAX_PROBLEMS = 20  # the server is gone, or every answer is wrong: no use going on
SAMPLE_TOKENS = 48
# A few lengths only: a server's memory is flat once it has seen the largest batches.
LONG = (1_500, 4_000, 9_000)
PREFIXES = tuple(workload.prompt(f"soak prefix {n}", 3_000) for n in range(4))
# How often each kind is sent. "memory" generates much, so that requests outgrow the cache.
WEIGHTS = {
    "sample": 3,
    "short": 3,
    "long": 1,
    "shared prefix": 2,
    "memory": 4,
    "stream": 1,
    "disconnect": 1,
    "abort": 1,
}


class WrongAnswerError(RuntimeError):
    """A request did not end as it must."""


def request(kind: str, generator: random.Random, name: str) -> dict[str, Any]:
    """Body of a request of one kind; ``name`` makes its prompt unique."""
    lengths = {
        "short": (generator.randrange(1, 65), generator.randrange(1, 129)),
        "long": (generator.choice(LONG), 64),
        "shared prefix": (generator.randrange(1, 300), 64),
        "memory": (generator.randrange(200, 800), generator.randrange(800, 1_400)),
        "stream": (generator.randrange(1, 800), generator.randrange(16, 256)),
        "disconnect": (generator.randrange(1, 800), 2_000),
        "abort": (generator.randrange(1, 800), 2_000),
    }
    length, new_tokens = lengths[kind]
    tokens = workload.prompt(name, length)
    if kind == "shared prefix":
        tokens = generator.choice(PREFIXES) + tokens
    return {
        "rid": name,
        "input_ids": tokens,
        "sampling_params": {
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
        },
    }


class Traffic:
    """Workers that send one request after another to a server until time is up.

    Parameters
    ----------
    server : Server
        Gets the requests.
    samples : list of list of int
        Prompts asked for greedily again and again; :attr:`sampled` has the answers.
    seed : int
        The same seed sends the same requests, if not in the same order.

    Attributes
    ----------
    outcomes : Counter
        By ``(kind, outcome)``.
    sampled : list of (int, Answer)
        Index of the prompt, and what came back.
    problems : list of str
        Requests that failed or did not end as they must.
    """

    def __init__(self, server: Server, samples: list[list[int]], seed: int) -> None:
        self.server = server
        self.samples = samples
        self.seed = seed
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.sampled: list[tuple[int, Answer]] = []
        self.problems: list[str] = []
        self._lock = threading.Lock()
        self._until = 0.0

    def run(
        self, workers: int, seconds: float, watch: Callable[[], None], interval: float
    ) -> float:
        """Send requests for so long, and call ``watch`` every ``interval`` seconds meanwhile.

        Returns the seconds it took, until the last request was answered.
        """
        start = time.monotonic()
        self._until = start + seconds
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            pending = {pool.submit(self._work, worker) for worker in range(workers)}
            try:
                while pending:
                    _, pending = concurrent.futures.wait(pending, interval)
                    watch()
            finally:
                self._until = 0.0  # whatever watching met, the workers end
        return time.monotonic() - start

    def _work(self, worker: int) -> None:
        generator = random.Random(f"{self.seed} {worker}")
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        for number in itertools.count():
            if time.monotonic() > self._until or len(self.problems) >= MAX_PROBLEMS:
                return
            [kind] = generator.choices(kinds, weights)
            # The dot: an abort is for every request whose name begins with the one given.
            name = f"soak-{self.seed}-{worker}-{number}."
            try:
                outcome = self._send(kind, generator, name)
            except Exception as error:  # said, and the other requests go on
                with self._lock:
                    self.problems.append(f"{kind} {name}: {type(error).__name__}: {error}")
                time.sleep(1.0)
            else:
                with self._lock:
                    self.outcomes[kind, outcome] += 1

    def _send(self, kind: str, generator: random.Random, name: str) -> str:
        """One request; how it ended."""
        if kind == "sample":
            return self._sample(generator)
        body = request(kind, generator, name)
        if kind == "stream":
            return self._stream(body)
        if kind == "disconnect":
            return self._disconnect(body, generator.randrange(1, 40))
        if kind == "abort":
            return self._abort(body, generator.randrange(0, 40))
        meta = self.server.post("/generate", body, REQUEST_SECONDS)["meta_info"]
        return self._completed(body, meta)

    def _sample(self, generator: random.Random) -> str:
        index = generator.randrange(len(self.samples))
        tokens = self.samples[index]
        answer = workload.answer_of(self.server, tokens, SAMPLE_TOKENS, REQUEST_SECONDS)
        with self._lock:
            self.sampled.append((index, answer))
        return "complete"

    def _completed(self, body: dict[str, Any], meta: dict[str, Any]) -> str:
        wanted, made = body["sampling_params"]["max_new_tokens"], meta["completion_tokens"]
        reason = meta["finish_reason"]
        if made != wanted or reason["type"] != "length":
            raise WrongAnswerError(f"{made} of {wanted} tokens, ended by {reason}")
        return "complete"

    def _stream(self, body: dict[str, Any]) -> str:
        meta: dict[str, Any] = {"completion_tokens": 0}
        with self.server.stream("/generate", body, REQUEST_SECONDS) as events:
            for event in events:
                before, meta = meta["completion_tokens"], event["meta_info"]
                if meta["completion_tokens"] < before:
                    raise WrongAnswerError(f"{meta['completion_tokens']} tokens after {before}")
        return self._completed(body, meta)

    def _disconnect(self, body: dict[str, Any], after: int) -> str:
        with self.server.stream("/generate", body, REQUEST_SECONDS) as events:
            read = sum(1 for _ in itertools.islice(events, after))
        return "disconnected" if read == after else "complete"

    def _abort(self, body: dict[str, Any], after: int) -> str:
        meta: dict[str, Any] = {}
        with self.server.stream("/generate", body, REQUEST_SECONDS) as events:
            for event in itertools.islice(events, after):
                meta = event["meta_info"]
            self.server.post("/abort_request", {"rid": body["rid"]}, REQUEST_SECONDS)
            for event in events:
                meta = event["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return "aborted"
        return self._completed(body, meta)  # too late, or too early to be known yet
