#!/usr/bin/env python
"""Decodes a batch, compares the result with float64, and times it where there is a GPU.

On a Hopper GPU: the ETAP kernel beside stock FlashInfer. Elsewhere: the plain PyTorch reference
backend on the CPU, and the kernel is compiled (not run) if there is an nvcc.

    python scripts/quickstart.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import secrets
import shutil
import sys

import torch
from decode_bench import grid, inputs, peers

import etap_flashinfer
from etap_flashinfer import jit


def rmse_of(output: torch.Tensor, given: inputs.Inputs) -> tuple[float, float]:
    """RMSE of the first request's output, and of the exact result rounded to the output type."""
    exact = inputs.exact_output(given, 0)
    rounded = exact.to(output.dtype).double()
    own = output[: given.cell.q_len].double()
    return (own - exact).square().mean().sqrt().item(), (
        rounded - exact
    ).square().mean().sqrt().item()


def report_accuracy(name: str, output: torch.Tensor, given: inputs.Inputs) -> bool:
    """Print the comparison with float64; True if it is within the project's bound."""
    error, rounding = rmse_of(output, given)
    print(f"{name}: rmse {error:.3e} against float64 (rounding alone: {rounding:.3e})")
    return error <= 1.15 * rounding


def on_gpu(cell: grid.Cell, seed: int) -> bool:
    """Decode with ETAP and with FlashInfer fa3 on the same inputs, and time both."""
    import flashinfer.mla
    from decode_bench import timing

    calls = inputs.calls_of(cell, seed)
    pool = inputs.Pool(inputs.set_bytes(cell, seed) * calls, seed)
    given = pool.inputs(cell, seed)
    both = [
        peers.WrapperPeer("ETAP", etap_flashinfer.BatchMLAPagedAttentionWrapper, "etap"),
        peers.WrapperPeer("FlashInfer fa3", flashinfer.mla.BatchMLAPagedAttentionWrapper, "fa3"),
    ]
    captured = [timing.capture(peer.prepare(given), given.calls) for peer in both]
    times = timing.time_in_turns(captured, 15)
    for peer, _item, microseconds in zip(both, captured, times, strict=True):
        gbps = given.bytes_read / microseconds / 1e3
        print(f"{peer.name}: {microseconds:.1f} us, {gbps:.0f} GB/s")
    right = [
        report_accuracy(peer.name, item.output, given)
        for peer, item in zip(both, captured, strict=True)
    ]
    return right[0]


def on_cpu(cell: grid.Cell, seed: int) -> bool:
    """Decode with the reference backend; it is exact up to rounding too."""
    pool = inputs.Pool(inputs.set_bytes(cell, seed), seed, device="cpu")
    given = pool.inputs(cell, seed, calls=1)
    workspace = torch.empty(peers.WORKSPACE_BYTES, dtype=torch.uint8)
    wrapper = etap_flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="reference")
    wrapper.plan(*peers.plan_arguments(given))
    output = wrapper.run(
        *inputs.split_token(given.queries[0]), *inputs.split_token(given.caches[0])
    )
    return report_accuracy("reference backend on the CPU", output, given)


def compile_kernel() -> None:
    """Compile the variant that the GPU path would take, if there is an nvcc; says what it did."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    compilers = [pathlib.Path(home, "bin", "nvcc") for home in homes if home]
    if not shutil.which("nvcc") and not any(path.is_file() for path in compilers):
        print("kernel: not compiled, no nvcc found (CUDA_HOME names the CUDA toolkit)")
        return
    variant = jit.EtapMlaVariant(torch.bfloat16, 16, "tma")
    library = jit.build_etap_mla_module(variant)
    print(f"kernel: compiled {library.name} for sm_90a ({library.stat().st_size // 1024} KiB)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, help="requests, default 16 (CPU: 4)")
    parser.add_argument("--context", type=int, help="tokens of each, default 16384 (CPU: 500)")
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args()
    seed = secrets.randbits(31)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    cell = grid.Cell(
        options.batch or (16 if hopper else 4),
        options.context or (16_384 if hopper else 500),
        options.heads,
    )
    where = torch.cuda.get_device_name() if hopper else "no Hopper GPU here"
    print(f"{cell.label()}: {where}")
    right = on_gpu(cell, seed) if hopper else on_cpu(cell, seed)
    print("equal to float64 up to rounding" if right else "WRONG: not equal to float64")
    if not hopper:
        try:
            compile_kernel()
        except jit.EtapJitError as error:
            print(f"kernel: {error}", file=sys.stderr)
            return 1
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
