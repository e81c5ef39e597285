"""Shared by the GPU tests: fresh random data, repeatable by its seed, and recorded figures."""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Callable

import pytest

from etap_flashinfer import dispatch

SEED = int(os.environ.get("ETAP_TEST_SEED", secrets.randbits(31)))


def pytest_report_header() -> str:
    return f"GPU tests: ETAP_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def all_requests_count_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a server's graphs: more than 64 rows have the kernel that is made for long requests.

    The one for short requests is that of 64 rows.
    """
    monkeypatch.setattr(dispatch, "MIN_LONG_TILES", 0)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, from the session's: ETAP_TEST_SEED repeats a run."""
    return zlib.crc32(f"{SEED}/{request.node.nodeid}".encode()) >> 1


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Print a case's figures and append them to the file that ETAP_RECORD names."""

    def write(case: dict) -> None:
        line = json.dumps({"test": request.node.nodeid, **case})
        print(line)
        if path := os.environ.get("ETAP_RECORD"):
            with open(path, "a") as file:
                file.write(line + "\n")

    return write
