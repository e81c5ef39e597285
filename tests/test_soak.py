"""The long run of an SGLang server, as far as it runs without SGLang and a GPU."""

from __future__ import annotations

import argparse
import http.server
import json
import sys
import threading
import time

import compare_sglang
import make_tiny_checkpoint
import pytest
import readme_tables
import soak_sglang
from sglang_eval import observe, one_batch, servers, traffic, variants, workload
from sglang_eval.workload import Answer, Difference

LOG = """\
[2026-11-21 13:50:21,123] INFO server_args with error in it
[2026-11-21 13:50:22,123] WARNING KV cache pool is full. Retract requests. #retracted_reqs: 3, #new
[2026-11-21 13:50:23,123] WARNING KV cache pool is full. Retract requests. #retracted_reqs: 1, #new
[2026-11-21 13:50:24,123] ERROR Received output for rid='x' but the state was deleted in \
TokenizerManager.
"""


def test_a_healthy_log_has_retractions_and_no_error():
    assert observe.scan(LOG) == observe.LogFindings([], 1, 2, 4)


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-21 13:50:24,1] ERROR Scheduler hit an exception",
        "[2026-11-21 13:50:24,1] CRITICAL no",
        "[2026-11-21 13:50:24] ERROR:    Exception in ASGI application",
        "Traceback (most recent call last):",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "[2026-11-21 13:50:24,1] WARNING pool memory leak detected! 3",
    ],
)
def test_errors_in_a_log_are_found(line):
    assert observe.scan(LOG + line + "\n").errors == [line]


def test_memory_may_grow_while_the_server_warms_up():
    assert observe.growth([10, 500, 900, 900, 900, 900], 0.5) == 0
    assert observe.growth([10, 500, 900, 900, 910, 905], 0.5) == 10


@pytest.mark.parametrize(
    ("memory", "grown"),
    [
        ([900] * 8 + [1000] * 8, 0),  # one step
        ([900, 910, 920, 930, 940, 950, 960], 20),
        ([900, 900, 910, 910, 910, 930, 930], 0),  # nothing in the middle
        ([900], 0),
    ],
)
def test_steps_of_an_allocator_are_not_a_leak(memory, grown):
    assert observe.steady_growth(memory, 0.0) == grown


# Traffic


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /generate like SGLang: so many tokens, or as many as there were before an abort."""

    protocol_version = "HTTP/1.0"
    aborted: set[str]
    greedy_tokens: list[int]
    left: list[str]
    missing_tokens: int

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/abort_request":
            self.aborted.add(body["rid"])
            self.reply()
            return
        wanted = body["sampling_params"]["max_new_tokens"] - self.missing_tokens
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
            self.stream(body["rid"], wanted)
        else:
            meta = self.meta(wanted, "length") | {"num_retractions": 1}
            if body.get("return_logprob"):
                tokens = range(wanted)
                meta["output_token_logprobs"] = [[-0.5, token, None] for token in tokens]
                meta["output_top_logprobs"] = [[[-0.5, token, None]] for token in tokens]
            self.reply({"meta_info": meta})

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 400)
        self.end_headers()

    def stream(self, name: str, wanted: int) -> None:
        try:
            for made in range(1, wanted + 1):
                is_aborted = name in self.aborted
                reason = "abort" if is_aborted else "length" if made == wanted else None
                text = json.dumps({"meta_info": self.meta(made, reason)})
                self.wfile.write(f"data: {text}\n\n".encode())
                if is_aborted:
                    break
                time.sleep(0.0005)
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.left.append(name)

    def meta(self, made: int, reason: str | None) -> dict:
        return {"completion_tokens": made, "finish_reason": reason and {"type": reason}}

    def reply(self, content: dict | None = None) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode() if content else b"")


@pytest.fixture
def handler():
    return type("Own", (Handler,), {"aborted": set(), "left": [], "missing_tokens": 0})


@pytest.fixture
def server(handler, tmp_path):
    """A Server whose process is a thread of this one."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    found = servers.Server.__new__(servers.Server)
    found.name, found.url = "fake", f"http://127.0.0.1:{web.server_address[1]}"
    found.log_path = tmp_path / "log"
    found.log_path.write_text("the server's log")
    yield found
    web.shutdown()
    web.server_close()


def test_every_kind_of_request_ends_as_it_must(server, handler, monkeypatch):
    monkeypatch.setattr(traffic, "WEIGHTS", dict.fromkeys(traffic.WEIGHTS, 1))
    found = traffic.Traffic(server, [[1, 2], [3]], seed=0)
    watched = []
    found.run(4, 2.0, lambda: watched.append(1), 0.2)
    assert found.problems == []
    assert {kind for kind, _ in found.outcomes} == traffic.WEIGHTS.keys()
    assert found.outcomes["abort", "aborted"] > 0
    assert found.outcomes["disconnect", "disconnected"] > 0
    assert handler.left
    assert len(watched) > 5
    assert {index for index, _ in found.sampled} == {0, 1}
    assert all(len(a.tokens) == traffic.SAMPLE_TOKENS and a.top for _, a in found.sampled)
    assert found.sampled[0][1].retractions == 1


def test_a_request_with_too_few_tokens_is_a_problem(server, handler, monkeypatch):
    handler.missing_tokens = 1
    monkeypatch.setattr(traffic, "WEIGHTS", {"short": 1, "stream": 1})
    monkeypatch.setattr(traffic, "MAX_PROBLEMS", 1)
    found = traffic.Traffic(server, [], seed=0)
    assert found.run(2, 60.0, lambda: None, 0.1) < 30  # it gives up
    assert "WrongAnswerError" in found.problems[0]


def test_workers_end_when_watching_fails(server, monkeypatch):
    monkeypatch.setattr(traffic, "WEIGHTS", {"short": 1})

    def fail():
        raise RuntimeError("nvidia-smi: status 9")

    with pytest.raises(RuntimeError, match="nvidia-smi"):
        traffic.Traffic(server, [], seed=0).run(2, 60.0, fail, 0.1)


def test_names_of_requests_never_begin_alike():
    """SGLang aborts every request whose name begins with the one given."""
    names = [f"soak-0-{worker}-{number}." for worker in range(13) for number in range(13)]
    assert not any(a != b and b.startswith(a) for a in names for b in names)


def test_a_stream_that_breaks_off_or_says_an_error_is_not_an_answer(server, handler, monkeypatch):
    for line, expected in ((b"data: {}\n\n", "before it was done"), (b'data: {"error": 1}', ": 1")):
        monkeypatch.setattr(handler, "stream", lambda self, *_, line=line: self.wfile.write(line))
        body = {"rid": "x", "sampling_params": {"max_new_tokens": 1}}
        with (
            server.stream("/generate", body, 5.0) as events,
            pytest.raises(servers.ServerError, match=expected),
        ):
            list(events)


def test_status_of_a_path(server):
    assert (server.status("/health", 5.0), server.status("/flush_cache", 5.0)) == (200, 400)


@pytest.mark.parametrize("is_obedient", [True, False])
def test_shutdown_waits_for_every_process(tmp_path, monkeypatch, is_obedient):
    script = tmp_path / "fake.py"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(2)"
    script.write_text(
        "import signal, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('up', flush=True)\n"
        f"signal.signal(signal.SIGTERM, signal.{'SIG_DFL' if is_obedient else 'SIG_IGN'})\n"
        "time.sleep(600)\n"
    )
    popen = servers.subprocess.Popen
    monkeypatch.setattr(
        servers.subprocess, "Popen", lambda _, **named: popen([sys.executable, script], **named)
    )
    server = servers.Server("fake", [], tmp_path)
    try:
        deadline = time.monotonic() + 60
        while "up" not in server.tail().splitlines() and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_obedient:
            assert server.shut_down(30.0) > 0.5  # the child was waited for
        else:
            with pytest.raises(servers.ServerError, match="still there"):
                server.shut_down(1.0)
    finally:
        server.stop()


# Judging


def answer(*logprobs: float, tokens=(5, 6)) -> Answer:
    top = [{5: value, 6: value - 0.1} for value in logprobs]
    return Answer(list(tokens[: len(logprobs)]), list(logprobs), top)


def reference() -> soak_sglang.Reference:
    allowed = Difference(requests=1, worst_logprob=0.1, worst_gap=0.1, compared_tokens=2)
    known = [[answer(-0.5, -1.0), answer(-0.6, -1.1)]]
    return soak_sglang.Reference(known, allowed, 1, 1)


def test_a_sample_must_be_as_close_to_one_peer_as_peers_are():
    assert reference().beyond(0, answer(-0.75, -1.25)) is None  # 0.15 from the second
    beyond = reference().beyond(0, answer(-0.9, -1.4))
    assert beyond is not None
    assert beyond.worst_logprob == pytest.approx(0.3)


def test_samples_that_part_at_a_near_tie_are_close():
    assert reference().beyond(0, answer(-0.5, -1.0, tokens=(6, 5))) is None


def make_soak(tmp_path) -> soak_sglang.Soak:
    return soak_sglang.Soak(argparse.Namespace(time_budget=10.0, work=tmp_path, minutes=1.0))


def test_what_is_wrong_is_said(tmp_path, server):
    soak = make_soak(tmp_path)
    soak.found["samples"] = {}
    soak.judge_samples([(0, answer(-0.5, -1.0)), (0, answer(-2.5, -1.0))], reference())
    soak.judge_memory([100] * 10 + [101, 110, 120, 358])
    soak.judge_requests(traffic.Traffic(server, [], 0))
    assert [problem.split(" (")[0] for problem in soak.problems[:1]] == ["sample 0"]
    assert soak.problems[1:] == [
        "the GPU's memory grew by 258 MiB; allowed: 256",
        "no request was aborted",
        "no request was disconnected",
    ]
    assert soak.found["samples"] == {"compared": 2, "beyond": 1, "retracted": 0}
    assert soak.found["memory_mib"]["steady_growth"] == 0


def test_memory_that_keeps_growing_is_said(tmp_path):
    soak = make_soak(tmp_path)
    soak.judge_memory([1000 + 4 * second for second in range(20)])
    (problem,) = soak.problems
    assert problem.startswith("the GPU's memory grew by 12 MiB or more in each third")


def test_peers_that_are_far_apart_or_notice_nothing_cannot_judge(tmp_path):
    soak = make_soak(tmp_path)
    blind = reference()
    blind.noticed, blind.allowed = 0, Difference(worst_gap=float("inf"))
    soak.check_reference(blind)
    assert len(soak.problems) == 2
    json.dumps(soak.found, allow_nan=False)


def test_samples_are_of_every_kind_and_fit_the_server():
    prompts = soak_sglang.samples()
    assert len(prompts) == len({tuple(prompt) for prompt in prompts}) > 20
    assert max(map(len, prompts)) + traffic.SAMPLE_TOKENS < 16384
    assert soak_sglang.without_a_token([1, 2, 3, 4]) == [1, 2, 4]


def test_reliability_table_has_the_soak():
    soak = {
        "problems": [],
        "seconds": 480,
        "requests": {"abort": {"aborted": 9}, "disconnect": {"disconnected": 8, "complete": 1}},
        "retracted_requests": 7,
        "log_errors": 0,
        "samples": {"peers": ["flashmla", "triton"], "compared": 1234, "beyond": 0},
        "memory_mib": {"growth_in_second_half": 2, "limit": 64},
    }
    head = {"device": "NVIDIA H200", "versions": {"sglang": "0.5.16"}, "date": "2026-11-21"}
    head["csrc_sha256"] = "0" * 64
    text = readme_tables.reliability_table({"soak": {**head, "soak": soak}})
    assert "| requests in 8.0 minutes | 18, of them 9 aborted and 8 left by the client |" in text
    assert "| answers against those of flashmla and triton | 0 of 1,234 differ |" in text
    assert "| GPU memory in the second half | +2 MiB (limit 64 MiB) |" in text
    soak["memory_mib"] |= {"steady_growth": 1, "steady_limit": 6}
    assert readme_tables.soak_rows(soak)[-1] == [
        "GPU memory in the second half",
        "+2 MiB (limit 64 MiB), in each third of it by 1 MiB or more (limit 6 MiB)",
    ]
    broken_off = readme_tables.soak_rows({"problems": ["did not start: soak_etap"]})
    assert broken_off == [["SGLang server under mixed requests", "1 problems"]]


# Parts of compare_sglang.py


def test_parts_that_need_two_gpus_say_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert variants.missing_gpus(["plain", "fa3"]) is None
    assert variants.missing_gpus(["plain", "tp", "dp"]) == "tp, dp: 2 GPUs needed, 1 found"
    for part in ("tp", "dp"):
        assert variants.environment_of(variants.VARIANTS[part])["NCCL_NVLS_ENABLE"] == "0"


def test_batches_that_decode_beside_a_prefill_are_counted():
    log = (
        "[x] Prefill batch, #new-seq: 1, #running-req: 0, #queue-req: 0\n"
        "[x] Prefill batch, #new-seq: 1, #running-req: 12, #queue-req: 0\n"
        "[x] Decode batch, #running-req: 3, #token: 192\n"
    )
    assert variants.mixed_batches(log) == 1


def comparison(tmp_path, *parts: str) -> compare_sglang.Comparison:
    options = argparse.Namespace(
        peers=(), parts=list(parts), quick=True, time_budget=1.0, work=tmp_path
    )
    return compare_sglang.Comparison(options, None)


def test_mixing_needs_concurrent_requests(tmp_path):
    names = [group.name for group in comparison(tmp_path, "mixed").groups]
    assert names == ["short", "context", "shared prefix", "concurrent"]


@pytest.mark.parametrize(("gap", "problems"), [(0.1, 0), (1.0, 1)])
def test_mixed_answers_are_judged_by_tokens(tmp_path, gap, problems):
    found = comparison(tmp_path, "mixed")
    (tmp_path / "server.etap_mixed.log").write_text("Prefill batch, #running-req: 1\n")
    plain = Answer([5, 6], [-0.5, -1.0], [{5: -0.5}, {6: -1.0, 7: -1.0 - gap}])
    silent = Answer([5, 7], [], [])
    answers = {"etap": plain, "etap_mixed": silent}
    compare_sglang.judge_mixed(found, {name: {"short": [a]} for name, a in answers.items()})
    assert len(found.problems) == problems
    assert found.found["mixed"]["mixed_batches"] == 1


def test_two_gpus_are_judged_by_peers_with_the_same_options(tmp_path):
    found = comparison(tmp_path, "tp")
    answers = {
        name: {"context": [answer(value, -1.0), answer(value, -1.0)]}
        for name, value in (("etap_tp", -0.9), ("flashmla_tp", -0.5), ("triton_tp", -0.55))
    }
    answers["etap_tp"]["context"][1].top[0] = {1: -0.9}
    compare_sglang.JUDGES["tp"](found, answers)
    assert found.problems == [
        f"etap_tp and {name}_tp differ more than flashmla_tp and triton_tp do"
        for name in ("flashmla", "triton")
    ]
    found.problems.clear()
    compare_sglang.JUDGES["dp"](found, answers)
    assert found.problems == ["dp: not all of etap_dp, flashmla_dp, triton_dp answered"]


def test_servers_of_a_part(tmp_path, monkeypatch):
    started = {}

    def start(name, arguments, work, environment):
        started[name] = (arguments, environment)

    monkeypatch.setattr(compare_sglang, "Server", start)
    monkeypatch.setattr(make_tiny_checkpoint, "write", lambda *_, **named: None)
    found = comparison(tmp_path, "mixed", "dp")
    found.model = tmp_path / "tiny"
    assert len(compare_sglang.servers_of(found)) == 5
    assert found.without_logprobs == {"etap_mixed"}
    arguments, environment = started["etap_dp"]
    assert arguments[-1] == str(tmp_path / "tiny_128_heads")
    assert "--sleep-on-idle" not in arguments
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert "--sleep-on-idle" in started["etap_mixed"][0]


def test_checkpoint_with_other_heads():
    weights = make_tiny_checkpoint.make_weights(0, heads=4)
    assert weights["model.layers.0.self_attn.o_proj.weight"].shape == (1024, 4 * 128)


# one_batch


def make_tool(tmp_path, monkeypatch, program: str) -> one_batch.OneBatch:
    script = tmp_path / "tool.py"
    script.write_text(program)
    popen = one_batch.subprocess.Popen
    monkeypatch.setattr(
        one_batch.subprocess,
        "Popen",
        lambda command, **named: popen([sys.executable, script, *command], **named),
    )
    return one_batch.OneBatch(tmp_path, make_tiny_checkpoint.CONFIG)


def test_one_batchs_figures_are_read(tmp_path, monkeypatch):
    program = (
        "import json, sys\n"
        "assert sys.argv[3:5] == ['sglang_patch.run', 'sglang.benchmark.one_batch'], sys.argv\n"
        "path = sys.argv[sys.argv.index('--result-filename') + 1]\n"
        f"open(path, 'w').write(json.dumps(dict.fromkeys({one_batch.RESULT_KEYS}, 1.0)))\n"
    )
    found = make_tool(tmp_path, monkeypatch, program).result(60.0)
    assert found["median_decode_latency"] == 1.0
    assert found["batch"] == one_batch.BATCH


def test_one_batch_that_fails_is_said_with_its_output(tmp_path, monkeypatch):
    tool = make_tool(tmp_path, monkeypatch, "raise SystemExit('invalid choice')")
    with pytest.raises(servers.ServerError, match=r"(?s)status 1.*invalid choice"):
        tool.result(60.0)


def test_one_batchs_prompts_have_tokens_of_the_model(tmp_path):
    one_batch.write_model(tmp_path, make_tiny_checkpoint.CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] > 10_000
    assert workload.VOCABULARY < 10_000  # why the tiny checkpoint does not do
