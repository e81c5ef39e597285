"""SGLang servers as child processes: start, ask, stop; nothing here waits without a limit."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

START = time.monotonic()
LOG_LINES = 40
STOP_SECONDS = 10.0


def log(text: str) -> None:
    """Print with the seconds since the script started."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# Below the ports that a system hands out by itself: between the choice of a port and the server's
# start, minutes later, no connection takes it. A server has more of its own up to 1,000 above.
PORTS_BEGIN = 12_000
PORTS_OF_SCRIPT = 2_000
SCRIPTS = 10
# With --dp-size, a server counts a dozen of its own up from 233 above its given one. Those of
# servers side by side must not meet, nor a port that is given.
PORTS_APART = 25
_held: list[socket.socket] = []


def own_ports() -> Iterator[int]:
    """Ports that no other of these scripts gives its servers: who holds a range's first has it.

    Raises
    ------
    ServerError
        If other scripts have all ranges.
    """
    for number in range(SCRIPTS):
        first = PORTS_BEGIN + (os.getpid() + number) % SCRIPTS * PORTS_OF_SCRIPT
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", first))
        except OSError:
            holder.close()
            continue
        _held.append(holder)  # as long as this process lives
        yield from range(first + PORTS_APART, first + PORTS_OF_SCRIPT, PORTS_APART)
        return
    raise ServerError(f"{SCRIPTS} other scripts have servers here")


_candidates = own_ports()


def free_port() -> int:
    """A port that nobody listens at, each time another one."""
    for port in _candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("no port is free")


def environment(work: pathlib.Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of a server: offline, and compiled kernels kept under ``work`` by default."""
    found = dict(os.environ)
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "MAX_JOBS": "8",
        "FLASHINFER_WORKSPACE_BASE": str(work / "cache"),
        "TVM_FFI_CACHE_DIR": str(work / "cache" / "tvm_ffi"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
    }
    for name, value in defaults.items():
        found.setdefault(name, value)
    # The scripts' own directory, for a plugin of theirs that a control loads.
    scripts = str(pathlib.Path(__file__).resolve().parents[1])
    paths = [scripts, *filter(None, found.get("PYTHONPATH", "").split(os.pathsep))]
    found["PYTHONPATH"] = os.pathsep.join(paths)
    return found | (extra or {})


class ServerError(RuntimeError):
    """A server did not start, died, or did not answer in time."""


class Server:
    """One SGLang server in a process group of its own, its output in a file.

    Parameters
    ----------
    name : str
        For messages and the log's file name.
    arguments : sequence of str
        Those of ``sglang.launch_server``, without host and port.
    work : pathlib.Path
        Directory for logs and caches.
    extra_environment : dict, optional
        Added to the environment.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        work: pathlib.Path,
        extra_environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = work / f"server.{name}.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rsplit(":", 1)[1]
        self.command = [sys.executable, "-m", "sglang.launch_server", *arguments]
        self.command += ["--host", "127.0.0.1", "--port", port]
        if "--dp-size" not in arguments:  # whose ranks would share one
            # SGLang's own choice is a port that the system may give away before it is taken.
            self.command += ["--nccl-port", str(free_port())]
        work.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "w") as output:
            output.write(" ".join(self.command) + "\n")
            output.flush()
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(work, extra_environment),
                start_new_session=True,
            )
        log(f"{name}: starting, log in {self.log_path}")

    def tail(self, lines: int = LOG_LINES) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the server generates, or raise with the end of its log."""
        while True:
            if self.process.poll() is not None:
                raise ServerError(
                    f"{self.name}: ended with status {self.process.returncode}\n{self.tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name}: not ready in time\n{self.tail()}")
            time.sleep(0.5)
        log(f"{self.name}: ready")

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """POST JSON, return the JSON that comes back (None for an empty answer)."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:500]
            raise ServerError(f"{self.name}: {path}: status {error.code}: {reason}") from error
        except (urllib.error.URLError, OSError) as error:
            raise ServerError(f"{self.name}: {path}: {error}\n{self.tail()}") from error
        return json.loads(text) if text.strip() else None

    @contextmanager
    def stream(
        self, path: str, body: dict[str, Any], timeout: float
    ) -> Iterator[Iterator[dict[str, Any]]]:
        """POST JSON, yield the events that come back; leaving early closes the connection.

        ``timeout`` is that of each single read. An event that says an error raises ServerError.
        """
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps({**body, "stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )

        def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                text = line.removeprefix(b"data:").strip()
                if text == b"[DONE]":
                    return
                event = json.loads(text)
                if "error" in event:
                    raise ServerError(f"{self.name}: {path}: {event['error']}")
                yield event
            raise ServerError(f"{self.name}: {path}: the stream ended before it was done")

        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield events(answer)

    def status(self, path: str, timeout: float) -> int:
        """GET, return the HTTP status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)

    def shut_down(self, seconds: float) -> float:
        """Ask the server to end as an operator does, SIGTERM to its first process only.

        Returns
        -------
        float
            Seconds until no process of its group was left.

        Raises
        ------
        ServerError
            If one was still there after ``seconds``.
        """
        start = time.monotonic()
        with suppress(ProcessLookupError):
            self.process.terminate()
        while time.monotonic() < start + seconds:
            self.process.poll()  # reaps it
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return time.monotonic() - start
            time.sleep(0.2)
        raise ServerError(f"{self.name}: still there {seconds:.0f} s after SIGTERM\n{self.tail()}")

    def stop(self) -> None:
        """End the whole process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        # Schedulers may outlive the parent that answered SIGTERM.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def running(servers: Sequence[Server], deadline: float) -> Iterator[dict[str, Server]]:
    """Wait for servers that are starting; yield those that are ready, stop all at the end."""
    ready: dict[str, Server] = {}
    try:
        for server in servers:
            try:
                server.wait_until_ready(deadline)
            except ServerError as error:
                log(f"FAILED TO START: {error}")
            else:
                ready[server.name] = server
        yield ready
    finally:
        stop_all(servers)
        log("servers stopped")


def stop_all(servers: Sequence[Server]) -> None:
    """End servers, all at once: each takes seconds."""
    for server in servers:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGTERM)
    for server in servers:
        server.stop()
