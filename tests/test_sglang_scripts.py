"""The logic of the scripts that need SGLang and a GPU, as far as it runs without either."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import types

import bench_sglang
import compare_sglang
import compare_sglang_fp8
import make_tiny_checkpoint
import pytest
import readme_tables
import torch
from sglang_eval import broken, evidence, servers, workload
from sglang_eval.bench_worker import covered, fill_cache, is_attention
from sglang_eval.workload import Answer, Difference

K = 1024


def answer(tokens, logprobs, top=None) -> Answer:
    top = top or [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
    return Answer(list(tokens), list(logprobs), top)


# Comparing answers


def test_equal_answers_do_not_differ():
    one = answer([5, 6], [-0.5, -1.0])
    assert workload.difference([one], [one]) == Difference(1, 0, 0.0, 0.0, 2)


def test_logprobs_are_compared_up_to_where_choices_part():
    first = answer([5, 6, 7], [-0.5, -1.0, -9.0], [{5: -0.5}, {6: -1.0, 8: -1.1}, {7: -9.0}])
    second = answer([5, 8, 9], [-0.6, -1.05, -1.0], [{5: -0.6}, {8: -1.05, 6: -1.2}, {9: -1.0}])
    found = workload.difference([first], [second])
    assert found.worst_logprob == pytest.approx(0.1)
    assert found.worst_gap == pytest.approx(0.15)
    assert (found.diverged, found.compared_tokens) == (1, 1)


def test_a_token_that_the_other_thinks_impossible_is_an_infinite_gap():
    found = workload.difference([answer([5], [-0.5])], [answer([6], [-0.5])])
    assert found.worst_gap == float("inf")
    assert not compare_sglang.is_within(found, Difference(worst_gap=5.0, worst_logprob=5.0))


def test_without_logprobs_the_other_answer_says_the_gap():
    silent = Answer([5, 8], [], [])
    spoken = answer([5, 6], [-0.5, -1.0], [{5: -0.5}, {6: -1.0, 8: -1.3}])
    for pair in ((silent, spoken), (spoken, silent)):
        found = workload.difference([pair[0]], [pair[1]])
        assert found.worst_gap == pytest.approx(0.3)
        assert found.compared_tokens == 1


def test_answers_of_unequal_length_differ():
    found = workload.difference([answer([5], [-0.5])], [answer([5, 6], [-0.5, -1.0])])
    assert found.worst_gap == float("inf")


def test_nothing_compared_is_not_agreement():
    assert not compare_sglang.is_within(Difference(), Difference(worst_logprob=1.0))
    total = compare_sglang.total_difference({}, {"short": []})
    assert not compare_sglang.is_within(total, Difference(worst_logprob=1.0))


def test_bound_is_what_peers_differ_by():
    among = Difference(requests=1, worst_logprob=0.1, compared_tokens=9)
    assert compare_sglang.is_within(Difference(1, 0, 0.19, 0.0, 9), among)
    assert not compare_sglang.is_within(Difference(1, 0, 0.21, 0.0, 9), among)


def test_workload_has_every_kind_of_request():
    groups = {group.name: group for group in workload.groups(quick=False)}
    assert len(groups["concurrent"].prompts) == 64
    assert min(map(len, groups["long"].prompts)) > 32 * K
    shared = groups["shared prefix"].prompts
    assert all(prompt[:3000] == shared[0][:3000] for prompt in shared)
    assert len({tuple(prompt) for prompt in shared}) == len(shared)
    assert len({prompt[-1] for prompt in groups["context"].prompts}) == 1
    assert workload.prompt("x", 9) == workload.prompt("x", 9) != workload.prompt("y", 9)
    assert len(workload.groups(quick=True)) < len(groups)


def test_broken_backend_loses_a_token(monkeypatch):
    pytest.importorskip("triton")
    from sglang_patch.metadata import IndexBuffers

    added = []
    monkeypatch.setattr(IndexBuffers, "fill", lambda self, rows, lens, extra=0: added.append(extra))
    broken.register()
    IndexBuffers.fill(None, None, None)
    IndexBuffers.fill(None, None, None, added_tokens=3)
    assert added == [-1, 2]


def test_broken_plugin_is_found_on_the_path(tmp_path, monkeypatch):
    import importlib.metadata

    monkeypatch.syspath_prepend(str(broken.write_distribution(tmp_path)))
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="etap_broken")
    assert [point.load() for point in points] == [broken.register]


def judged(answers, peers=("flashmla", "triton", "flashinfer")) -> list[str]:
    options = argparse.Namespace(peers=peers, parts=["plain"], quick=True, time_budget=1.0)
    comparison = compare_sglang.Comparison(options, None)
    comparison.groups = comparison.groups[:1]
    compare_sglang.judge_plain(
        comparison, {name: {"short": [found]} for name, found in answers.items()}
    )
    return comparison.problems


def test_a_peer_that_is_far_from_all_does_not_widen_the_bounds():
    answers = {
        "flashmla": answer([5], [-0.50]),
        "triton": answer([5], [-0.51]),
        "flashinfer": answer([5], [-1.50]),
        "etap": answer([5], [-0.52]),
        "broken": answer([5], [-1.00]),
    }
    assert judged(answers) == []
    assert judged(answers, ("flashmla",)) == [
        "fewer than two of SGLang's backends ran: nothing to compare with"
    ]
    worse = answers | {"etap": answer([5], [-0.60])}
    assert judged(worse) == [
        "etap and flashmla differ more than SGLang's backends do",
        "etap and triton differ more than SGLang's backends do",
    ]
    unnoticed = answers | {"broken": answer([5], [-0.52])}
    assert judged(unnoticed) == ["the comparison with flashmla does not notice a broken backend"]


def test_the_largest_gap_counts_of_peers_that_are_close():
    pairs = {
        ("flashmla", "triton"): Difference(1, 1, 0.12, 0.125, 9),
        ("flashmla", "flashinfer"): Difference(1, 1, 0.11, 0.1875, 9),
        ("triton", "flashinfer"): Difference(1, 1, 0.16, 0.25, 9),
        ("triton", "far"): Difference(1, 1, 0.9, 4.0, 9),
    }
    allowed = compare_sglang.allowed_differences(pairs)
    assert allowed["triton"] == Difference(1, 1, 0.12, 0.25, 9)
    assert allowed["flashmla"] == Difference(1, 1, 0.11, 0.1875, 9)
    assert compare_sglang.is_within(Difference(1, 1, 0.12, 0.5, 9), allowed["triton"])
    assert not compare_sglang.is_within(Difference(1, 1, 0.12, 1.0, 9), allowed["triton"])


# fp8 cache


def fp8_answers(**changes) -> dict:
    found = {
        "flashinfer_fp8": answer([5], [-0.50]),
        "flashmla_fp8": answer([5], [-0.56]),
        "triton_fp8": answer([5], [-0.58]),
        "etap_fp8": answer([5], [-0.51]),
        "etap_fp8_eagle": answer([5], [-0.51]),
        "broken_fp8": answer([5], [-1.00]),
        "etap": answer([5], [-0.70]),
    }
    return {name: {"short": [each]} for name, each in (found | changes).items()}


def fp8_comparison() -> compare_sglang.Comparison:
    options = argparse.Namespace(
        peers=compare_sglang_fp8.PEERS, parts=compare_sglang_fp8.PARTS, quick=True, time_budget=1.0
    )
    comparison = compare_sglang.Comparison(options, None)
    comparison.groups = comparison.groups[:1]
    return comparison


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"etap_fp8": answer([5], [-0.9]), "etap_fp8_eagle": answer([5], [-0.9])}, ["etap and "]),
        ({"etap_fp8_eagle": answer([5], [-0.9])}, ["etap_fp8 with EAGLE differs"]),
        ({"broken_fp8": answer([5], [-0.51])}, ["the comparison with "]),
        # Far from those that quantise the queries, but not from the one that does not.
        ({"flashmla_fp8": answer([5], [-0.7]), "triton_fp8": answer([5], [-0.71])}, []),
    ],
)
def test_servers_with_an_fp8_cache_are_judged_among_themselves(changes, problems):
    comparison = fp8_comparison()
    compare_sglang_fp8.judge_agreement(comparison, fp8_answers(**changes))
    kinds = {
        next((p for p in problems if line.startswith(p)), line) for line in comparison.problems
    }
    assert kinds == set(problems)
    found = comparison.found["agreement"]
    assert found["etap_fp8_etap_bf16"]["worst_logprob"] > 0.15
    assert found["etap_flashinfer"]["compared_tokens"] == 1


def test_servers_that_do_not_start_are_in_the_evidence(tmp_path, monkeypatch):
    commands, written = [], []
    popen = servers.subprocess.Popen

    def fail_to_start(command, **named):
        commands.append(command)
        return popen([sys.executable, "-c", "raise SystemExit(1)"], **named)

    monkeypatch.setattr(servers.subprocess, "Popen", fail_to_start)
    monkeypatch.setattr(compare_sglang.plugin, "ensure_discoverable", lambda: None)
    monkeypatch.setattr(evidence, "update", lambda *given, keep: written.append((*given, keep)))
    assert compare_sglang_fp8.main(["--work", str(tmp_path), "--model", "tiny"]) == 1
    ((_, section, content, keep),) = written
    assert (section, keep) == ("compare_fp8", compare_sglang_fp8.PARTS)
    assert len(content["problems"]) == len(commands) == 8
    assert all(problem.endswith(": did not start") for problem in content["problems"])
    assert sum("fp8_e4m3" in command for command in commands) == 6


def test_drift_ends_where_generations_part():
    ours = answer([5, 6, 7, 8], [-0.5, -1.0, -1.0, -1.0])
    other = answer([5, 6, 9, 8], [-0.6, -1.3, -1.0, -9.0])
    expected = {"tokens": 4, "equal": 2, "share": 0.5, "mean_logprob_change": 0.2}
    assert compare_sglang_fp8.drift(ours, other) == expected
    assert compare_sglang_fp8.drift(ours, ours)["share"] == 1.0
    assert compare_sglang_fp8.drift(ours, answer([1], [0.0]))["equal"] == 0


def test_capacity_is_measured_without_a_limit_and_judged(tmp_path):
    base = compare_sglang.server_arguments(tmp_path, "etap")
    arguments = compare_sglang_fp8.capacity_arguments(base, compare_sglang_fp8.FP8)
    assert "--max-total-tokens" not in arguments
    assert "262144" not in arguments
    assert len(arguments) == len(base) + 4
    fraction = len(arguments) - 1 - arguments[::-1].index("--mem-fraction-static")
    assert arguments[fraction + 1] == "0.2"  # the last one counts
    for tokens, problems in ((1990, 0), (1500, 1)):
        comparison = fp8_comparison()
        compare_sglang_fp8.judge_capacity(comparison, {"auto": 1000, "fp8_e4m3": tokens})
        assert len(comparison.problems) == problems


# Servers


def make_server(tmp_path, monkeypatch, program: str) -> servers.Server:
    script = tmp_path / "fake.py"
    script.write_text(program)
    popen = servers.subprocess.Popen
    monkeypatch.setattr(
        servers.subprocess, "Popen", lambda _, **named: popen([sys.executable, script], **named)
    )
    return servers.Server("fake", ["--x"], tmp_path)


def test_a_server_that_dies_is_said_with_its_log(tmp_path, monkeypatch):
    server = make_server(tmp_path, monkeypatch, "print('out of luck'); raise SystemExit(3)")
    with pytest.raises(servers.ServerError, match=r"(?s)status 3.*out of luck"):
        server.wait_until_ready(time.monotonic() + 60)


def test_a_server_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.5)
    server = make_server(tmp_path, monkeypatch, program)
    with servers.running([server], time.monotonic() + 2.0) as ready:
        assert ready == {}
    assert server.process.poll() is not None
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_servers_keep_their_caches_and_stay_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE", raising=False)
    found = servers.environment(tmp_path)
    assert found["TRITON_CACHE_DIR"] == "/elsewhere"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["FLASHINFER_WORKSPACE_BASE"].startswith(str(tmp_path))
    assert found["PYTHONPATH"].split(os.pathsep)[0].endswith("scripts")


# Checkpoint


def test_checkpoint_is_the_same_for_the_same_seed():
    first, second = make_tiny_checkpoint.make_weights(0), make_tiny_checkpoint.make_weights(0)
    other = make_tiny_checkpoint.make_weights(1)
    assert first.keys() == other.keys()
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].dtype == torch.bfloat16


def test_checkpoint_has_an_mtp_layer_with_experts():
    names = make_tiny_checkpoint.make_weights(0).keys()
    layer = f"model.layers.{make_tiny_checkpoint.CONFIG['num_hidden_layers']}"
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "mlp.experts.7.up_proj"):
        assert f"{layer}.{name}.weight" in names


# Benchmark


def bench_case(batch=16, context=32 * K, **step_ms) -> dict:
    figures = {"tokens_per_s": 100.0, "gpu_us": 1000.0, "attention_us": 250.0}
    backends = {name: {"step_ms": value, **figures} for name, value in step_ms.items()}
    return {"batch": batch, "context": context, "backends": backends}


def test_attention_kernels_are_told_from_others():
    for name in (
        "etap_mla_kernel<Traits>",
        "etap_mla_merge_kernel",
        "flash_fwd_splitkv_mla_kernel",
    ):
        assert is_attention(name)
    for name in ("set_mla_kv_buffer_kernel", "_fill_kernel", "nvjet_tst_64x8", "fused_rope_kernel"):
        assert not is_attention(name)


def test_kernels_that_overlap_are_counted_once():
    assert covered([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (1.2, 1.4)]) == 3.5
    assert covered([]) == 0.0


def test_random_caches_are_of_the_pools_type():
    bf16 = [torch.zeros(300, 1, 576, dtype=torch.bfloat16) for _ in range(2)]
    fp8 = [torch.zeros(300, 1, 576, dtype=torch.uint8)]
    for dtype, buffers in ((torch.bfloat16, bf16), (torch.float8_e4m3fn, fp8)):
        pool = types.SimpleNamespace(dtype=dtype, kv_buffer=buffers)
        fill_cache(types.SimpleNamespace(token_to_kv_pool=pool))
        for buffer in buffers:
            assert 0.95 < buffer.view(dtype).float().std() < 1.05
    assert not torch.equal(*bf16)


def test_backends_cases_are_merged():
    case = {"batch": 1, "context": 4, "step_ms": 1.0}
    found = {"etap": {"cases": [case]}, "fa3": {"cases": [case | {"step_ms": 2.0}]}}
    merged = bench_sglang.merged(found)
    assert merged == [
        {"batch": 1, "context": 4, "backends": {"etap": {"step_ms": 1.0}, "fa3": {"step_ms": 2.0}}}
    ]


def test_backends_measure_one_after_another_and_one_may_fail(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text(
        "import json, sys, time\n"
        "cases, backend = sys.argv[1:]\n"
        "end = float(sys.stdin.readline())\n"
        "assert backend != 'broken', 'out of luck'\n"
        "found = {'class': backend, 'page_size': 64, 'cases': [], 'times': [time.time(), end]}\n"
        "time.sleep(0.2)\n"
        "open(cases, 'w').write(json.dumps(found | {'times': [*found['times'], time.time()]}))\n"
    )
    monkeypatch.setattr(
        bench_sglang,
        "worker_command",
        lambda _, backend, cases: [sys.executable, str(program), str(cases), backend],
    )
    options = argparse.Namespace(
        work=tmp_path, backends=["etap", "broken", "triton"], time_budget=60.0
    )
    found = bench_sglang.run_all(options)
    assert list(found) == ["etap", "triton"]
    first, second = (found[name]["times"] for name in found)
    assert first[2] <= second[0]
    assert time.time() < first[1] < second[1] < time.time() + 60


def test_table_shows_every_backend_and_gaps():
    lines = bench_sglang.table([bench_case(etap=2.0, fa3=3.0)], ["etap", "fa3", "flashmla"])
    assert "1.500" in lines
    assert "25 %" in lines
    assert lines.splitlines()[1].split()[-2] == "-"


# Evidence


@pytest.fixture
def updated(tmp_path, monkeypatch):
    """A function that adds a section to an evidence file as if measured on a GPU."""
    header = {
        "csrc_sha256": "a" * 64,
        "device": "NVIDIA H200",
        "versions": {"sglang": "0.5.16"},
        "date": "2026-11-21T10:00:00+00:00",
        "read_ceiling_gbps": None,
    }
    decode_bench = evidence.evidence
    monkeypatch.setattr(decode_bench, "check_sources_match", lambda: header["csrc_sha256"])
    monkeypatch.setattr(decode_bench, "header", lambda csrc, _: header | {"csrc_sha256": csrc})
    path = tmp_path / "h200" / "sglang.json"

    def update(section, content, csrc="a" * 64):
        header["csrc_sha256"] = csrc
        evidence.update(path, section, content)
        return json.loads(path.read_text())

    return update


def test_sections_are_kept_while_the_sources_are_the_same(updated):
    updated("kit", {"passed": {"decode": 3}})
    both = updated("bench", {"cases": [bench_case(etap=1.0)]})
    assert both["kit"]["passed"] == {"decode": 3}
    assert evidence.schema_errors(both) == []
    alone = updated("bench", {"cases": []}, csrc="b" * 64)
    assert "kit" not in alone
    with pytest.raises(ValueError, match="section is 'x'"):
        updated("x", {})


def test_parts_stay_until_they_are_found_again(updated, tmp_path):
    path = tmp_path / "h200" / "sglang.json"

    def update(content):
        evidence.update(path, "compare", content, keep=("plain", "tp"))
        return json.loads(path.read_text())["compare"]

    first = update({"problems": [], "plain": {"a": 1}})
    second = update({"problems": [], "tp": {"b": 1}})
    assert second["plain"]["a"] == 1
    assert second["plain"]["command"] == first["command"]
    third = update({"problems": ["broken"], "plain": {"a": 2}})
    assert third["plain"] == {"a": 2}
    assert third["tp"]["b"] == 1
    # What comes from a run with problems does not stay, what that run kept from another does.
    fourth = update({"problems": []})
    assert "plain" not in fourth
    assert fourth["tp"] == third["tp"]
    updated("kit", {}, csrc="b" * 64)
    assert update({"problems": []}).keys() == {"date", "command", "problems"}


def test_commands_do_not_name_the_hosts_directories():
    command = ["scripts/x.py", "--out", "/a/b.json", "--quick", "--work", "/c", "--parts", "plain"]
    assert evidence.command_of(command) == "python scripts/x.py --quick --parts plain"


def test_infinite_gaps_are_json():
    found = json.dumps(workload.as_json(Difference(worst_gap=float("inf"))), allow_nan=False)
    assert json.loads(found)["worst_gap"] == "infinite"


def test_schema_misses_what_is_missing(updated):
    content = updated("bench", {"cases": [bench_case(etap=1.0)]})
    del content["device"], content["bench"]["command"]
    del content["bench"]["cases"][0]["backends"]["etap"]["gpu_us"]
    errors = " ".join(evidence.schema_errors(content))
    assert "device is missing" in errors
    assert "command is missing" in errors
    assert "etap has no gpu_us" in errors


def test_readme_tables_of_the_fp8_cache(updated):
    readme = "".join(f"<!-- table:{n} -->\n<!-- /table:{n} -->\n" for n in ("sglang-fp8", "drift"))
    assert readme_tables.render(readme, {}).count("Not measured yet.") == 2
    bench = {
        "backends": {"etap": {}, "flashmla": {}},
        "cases": [bench_case(etap=2.0, flashmla=3.0)],
    }
    updated("bench_fp8", bench)
    tokens = {"auto": 1000, "fp8_e4m3": 1990}
    drift = {"tokens": 2048, "equal": 1024, "share": 0.5, "mean_logprob_change": 0.0123}
    section = {
        "capacity": {"mem_fraction_static": 0.2, "tokens": tokens, "ratio": 1.99},
        "drift": {"servers": {"etap_fp8": {"64": drift}}, "date": "2026-11-20", "command": "x"},
    }
    content = updated("compare_fp8", section)
    assert evidence.schema_errors(content) == []
    text = readme_tables.render(readme, {"sglang": content})
    assert "| 16 x 32K | 100 | 2.00 (25 %) | 3.00 (25 %) | 1.50 |" in text
    assert "bf16 1,000, fp8 1,990: 1.99 times" in text
    assert "equal for 50 % of the generation, log-probabilities there 0.0123 apart" in text
    del content["bench_fp8"]["cases"][0]["backends"]["etap"]["gpu_us"]
    assert "bench_fp8: case 0: etap has no gpu_us" in evidence.schema_errors(content)


def test_readme_table_before_and_after_the_evidence(updated):
    readme = "<!-- table:sglang -->\n<!-- /table:sglang -->\n"
    assert "Not measured yet." in readme_tables.render(readme, {})
    bench = {
        "backends": {"etap": {}, "fa3": {}},
        "cases": [bench_case(etap=2.0, fa3=3.0), bench_case(batch=64, fa3=4.0)],
    }
    text = readme_tables.render(readme, {"sglang": updated("bench", bench)})
    assert "| 16 x 32K | 100 | 2.00 (25 %) | 3.00 (25 %) | 1.50 |" in text
    assert "| 64 x 32K | - | - | 4.00 (25 %) | - |" in text
    assert "SGLang 0.5.16" in text
