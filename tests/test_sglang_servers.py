"""Ports of the servers that the SGLang scripts start."""

import socket

import pytest
from sglang_eval import servers


@pytest.fixture
def candidates(monkeypatch):
    """Fresh ones, from a place where nobody listens as a rule."""
    first = servers.PORTS_BEGIN - 1_000
    monkeypatch.setattr(servers, "_candidates", iter(range(first, servers.PORTS_BEGIN)))


def test_ports_differ_and_a_taken_one_is_left_out(candidates):
    first = servers.free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", first + 1))
        other.listen()
        assert servers.free_port() > first + 1


@pytest.mark.parametrize("arguments", [(), ("--dp-size", "2")])
def test_a_server_gets_its_ports(candidates, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(servers.subprocess, "Popen", lambda command, **_: None)
    command = servers.Server("name", arguments, tmp_path).command
    given = {option: command[command.index(option) + 1] for option in command if "port" in option}
    expected = {"--port"} if arguments else {"--port", "--nccl-port"}  # its ranks would share one
    assert given.keys() == expected
    assert len(set(given.values())) == len(given)


def test_all_ports_are_below_those_that_the_system_hands_out():
    last = servers.PORTS_BEGIN + servers.SCRIPTS * servers.PORTS_OF_SCRIPT
    assert last <= 32_768  # Linux's default


def test_ports_that_a_server_with_dp_counts_up_are_its_own(held):
    given = list(servers.own_ports())
    counted = [port + 233 + i for port in given for i in range(12)]
    assert len({*given, *counted}) == len(given) + len(counted)


def test_says_so_if_no_port_is_free(monkeypatch):
    monkeypatch.setattr(servers, "_candidates", iter(()))
    with pytest.raises(servers.ServerError, match="no port is free"):
        servers.free_port()


@pytest.fixture
def held(monkeypatch):
    """Ranges that the test's scripts have, given back at its end; below those of real ones."""
    monkeypatch.setattr(servers, "PORTS_BEGIN", 10_000)
    monkeypatch.setattr(servers, "PORTS_OF_SCRIPT", 20 * servers.PORTS_APART)
    monkeypatch.setattr(servers, "SCRIPTS", 4)
    holders: list[socket.socket] = []
    monkeypatch.setattr(servers, "_held", holders)
    yield holders
    for holder in holders:
        holder.close()


def test_scripts_at_the_same_time_have_other_ports(held):
    ranges = [list(servers.own_ports()) for _ in range(4)]
    assert [len(ports) for ports in ranges] == [19] * 4
    assert len({port for ports in ranges for port in ports}) == 4 * 19
    with pytest.raises(servers.ServerError, match="4 other scripts"):
        next(servers.own_ports())
    held.pop(1).close()
    assert list(servers.own_ports()) == ranges[1]
