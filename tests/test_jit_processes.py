"""First use by several processes, processes that are killed, caches that can't be written.

The processes are real, and so are FlashInfer's JIT, its locks, ninja, the linker and the loading.
The subject is who builds, waits and loads, so nvcc is a script that in a moment compiles a small
C++ module with the entry points of a kernel.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jit_first_use import VARIANT, patches, use

from etap_flashinfer import aot, jit

# Processes start with FlashInfer imported, but without the threads of this one, with which a fork
# may hang.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "flashinfer.jit"])
TIMEOUT = 120

MODULE = """\
extern "C" int __tvm_ffi_run(void*, void const*, int, void*) { return 0; }
extern "C" int __tvm_ffi_workspace_bytes(void*, void const*, int, void*) { return 0; }
extern "C" int __tvm_ffi_kept_bytes(void*, void const*, int, void*) { return 0; }
"""
# Notes that it was called, does what a test asks for in between, and compiles MODULE.
NVCC = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi
while [ $# -gt 0 ]; do
  case "$1" in -o) object="$2"; shift ;; -MF) dependencies="$2"; shift ;; esac
  shift
done
echo started >> {log}
echo "$object:" > "$dependencies"
{body}
c++ -fPIC -c {module} -o "$object"
"""


class Cache:
    """An empty JIT cache, and a compiler for it."""

    def __init__(self, root: Path):
        self.root = root
        self.log = root / "nvcc.log"
        self.sources = root / "generated"
        self.libraries = root / "cached_ops"
        self.library = self.libraries / VARIANT.name / f"{VARIANT.name}.so"
        self.compiler = root / "cuda" / "bin" / "nvcc"
        self.compiler.parent.mkdir(parents=True)
        (root / "cuda" / "lib64").mkdir()
        (root / "cuda" / "lib64" / "libcudart.a").write_text("!<arch>\n")
        (root / "module.cc").write_text(MODULE)
        self.write_compiler("")

    def write_compiler(self, body: str) -> None:
        text = NVCC.format(log=self.log, body=body, module=self.root / "module.cc")
        self.compiler.write_text(text)
        self.compiler.chmod(0o755)

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def wait_for_compilation(self) -> None:
        """Return when a compiler has begun."""
        deadline = time.monotonic() + TIMEOUT
        while self.compilations() == 0:
            assert time.monotonic() < deadline, "no compiler was started"
            time.sleep(0.01)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    # Not pytest's directory, which another user, as whom one test runs, can't enter.
    root = Path(tempfile.mkdtemp(prefix="etap_jit_"))
    root.chmod(0o755)
    shutil.copytree(jit.csrc_dir(), root / "csrc")
    result = Cache(root)
    for owner, name, value in patches(root, result.sources):
        monkeypatch.setattr(owner, name, value)
    for variable in ("FLASHINFER_CUDA_ARCH_LIST", "FLASHINFER_NVCC", "CXX", jit.AOT_DIR_ENV):
        monkeypatch.delenv(variable, raising=False)
    cpp_ext = jit._flashinfer_jit().cpp_ext
    cpp_ext.get_cuda_version.cache_clear()
    yield result
    cpp_ext.get_cuda_version.cache_clear()
    shutil.rmtree(root)


class FirstUse:
    """A process that takes the kernel's module as the wrapper does."""

    def __init__(self, cache: Cache, how: str = ""):
        self.connection, theirs = SERVER.Pipe(duplex=False)
        arguments = (theirs, cache.root, cache.sources, dict(os.environ), how)
        self.process = SERVER.Process(target=use, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self) -> str:
        """ "works", the message of the EtapJitError, or how else the process ended."""
        try:
            assert self.connection.poll(TIMEOUT), "the process hangs"
            return self.connection.recv()
        except EOFError:
            self.process.join(TIMEOUT)
            return f"ended with {self.process.exitcode}"


def test_eight_processes_on_an_empty_cache(cache: Cache) -> None:
    cache.write_compiler("sleep 0.5")
    processes = [FirstUse(cache) for _ in range(8)]
    assert [process.outcome() for process in processes] == ["works"] * 8
    assert cache.compilations() == 1
    assert list(cache.root.rglob("*.so")) == [cache.library]


@pytest.mark.parametrize("whole_group", [True, False], ids=("with its compiler", "alone"))
def test_killed_while_compiling(cache: Cache, whole_group: bool) -> None:
    """A compiler left behind goes on, and writes to where the next process works."""
    cache.write_compiler('head -c 100 /dev/urandom > "$object"\nsleep 1')
    killed = FirstUse(cache, "group")
    cache.wait_for_compilation()
    waiting = FirstUse(cache)
    kill = os.killpg if whole_group else os.kill
    kill(killed.process.pid, signal.SIGKILL)
    assert killed.outcome() == "ended with -9"
    assert waiting.outcome() == "works"
    assert FirstUse(cache).outcome() == "works"


def test_killed_between_linking_and_loading(cache: Cache) -> None:
    """Without the note that it was finished, even a good library is built again."""
    assert FirstUse(cache).outcome() == "works"
    cache.library.with_suffix(".sha256").unlink()
    assert FirstUse(cache).outcome() == "works"
    assert cache.compilations() == 2
    assert FirstUse(cache).outcome() == "works"
    assert cache.compilations() == 2


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_library_cut_off_on_disk(cache: Cache, kept: float) -> None:
    """As a crash leaves it: ninja's log calls it finished, and loading it could end with SIGBUS."""
    assert FirstUse(cache).outcome() == "works"
    content = cache.library.read_bytes()
    times = cache.library.stat()
    cache.library.write_bytes(content[: int(kept * len(content))])
    os.utime(cache.library, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FirstUse(cache).outcome() == "works"
    assert cache.library.stat().st_size == len(content)


def test_sources_cut_off(cache: Cache) -> None:
    assert FirstUse(cache).outcome() == "works"
    source = cache.sources / VARIANT.name / "etap_mla_binding.cu"
    text = source.read_text()
    source.write_text(text[:1000])
    assert FirstUse(cache).outcome() == "works"
    assert source.read_text() == text


def test_disk_full_while_compiling(cache: Cache) -> None:
    """The build fails with the compiler's words; with room again, the next one works."""
    full = 'head -c 100 /dev/urandom > "$object"\n'
    full += "echo 'fatal error: error writing to x.o: No space left on device'; exit 1"
    cache.write_compiler(full)
    message = FirstUse(cache).outcome()
    assert "No space left on device" in message
    assert VARIANT.name in message
    cache.write_compiler("")
    assert FirstUse(cache).outcome() == "works"


def test_disk_full_while_linking(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    linker = cache.root / "linker"
    linker.write_text(
        "#!/bin/sh\nfor last; do :; done\nhead -c 9000 /dev/urandom > $last\n"
        "echo 'ld: final link failed: No space left on device'; exit 1\n"
    )
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    assert "No space left on device" in FirstUse(cache).outcome()
    monkeypatch.delenv("CXX")
    assert FirstUse(cache).outcome() == "works"


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 64 KiB, less than the sources take, where this process may mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_disk_full_while_writing_sources(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = cache.root / "disk"
    with small_disk(disk), monkeypatch.context() as patch:
        patch.setattr(cache, "sources", disk)
        message = FirstUse(cache).outcome()
    assert "No space left on device" in message
    assert "FLASHINFER_WORKSPACE_BASE puts it elsewhere" in message
    assert FirstUse(cache).outcome() == "works"


@pytest.mark.parametrize("is_built", [False, True], ids=("empty", "built"))
def test_read_only_cache(cache: Cache, is_built: bool) -> None:
    for directory in (cache.sources, cache.libraries):
        directory.mkdir()
    if is_built:
        assert FirstUse(cache).outcome() == "works"
    subprocess.run(["chmod", "-R", "a-w", cache.sources, cache.libraries], check=True)
    message = FirstUse(cache, "nobody").outcome()
    subprocess.run(["chmod", "-R", "u+w", cache.sources, cache.libraries], check=True)
    assert "Permission denied" in message
    assert "FLASHINFER_WORKSPACE_BASE puts it elsewhere" in message
    assert FirstUse(cache).outcome() == "works"


def test_flashinfer_cannot_write_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = (
        "from etap_flashinfer import jit\n"
        "try:\n    jit.gen_etap_mla_module(jit.ALL_VARIANTS[0])\n"
        "except jit.EtapJitError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "file")}
    environment["PYTHONPATH"] = str(Path(jit.__file__).parents[1])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Set FLASHINFER_WORKSPACE_BASE to a directory that is writable" in done.stdout


# --- ahead of time --------------------------------------------------------------------------------


@pytest.fixture
def aot_dir(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one module that works, set in the environment."""
    directory = cache.root / "aot"
    directory.mkdir()
    aot._install(jit.build_etap_mla_module(VARIANT), directory)
    aot._write_manifest(directory, [VARIANT], {"nvcc": "13.0.88"})
    monkeypatch.setenv(jit.AOT_DIR_ENV, str(directory))
    assert FirstUse(cache).outcome() == "works"
    return directory


def test_aot_library_cut_off(cache: Cache, aot_dir: Path) -> None:
    library = aot_dir / f"{VARIANT.name}.so"
    library.write_bytes(library.read_bytes()[:5000])
    message = FirstUse(cache).outcome()
    assert "is not the library that manifest.json names" in message
    assert "python -m etap_flashinfer.aot" in message


def test_aot_directory_on_a_full_disk(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The command says so and leaves nothing that would be taken for a module."""
    disk = cache.root / "disk"
    library = cache.root / "large.so"
    library.write_bytes(bytes(200_000))
    monkeypatch.setattr(
        aot, "build_all", lambda variants, directory, *_: aot._install(library, directory)
    )
    with small_disk(disk):
        assert aot.main(["--out", str(disk), "--variants", VARIANT.short_name]) == 1
        assert list(disk.iterdir()) == []
    assert "No space left on device" in capsys.readouterr().err
