"""Run one of SGLang's tools with its plugins loaded: ``python -m sglang_patch.run MODULE [...]``.

``sglang.benchmark.one_batch`` and its like never load plugins and so do not know ``etap``:

    python -m sglang_patch.run sglang.benchmark.one_batch --attention-backend etap --model-path ...
"""

import runpy
import sys


def main() -> int:
    """Run the module named first, with the arguments that follow it."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__")
    return 0


# Also in the processes that a tool spawns (tensor parallelism), where this is "__mp_main__".
if __name__ in ("__main__", "__mp_main__"):
    from sglang.srt.plugins import load_plugins

    load_plugins()

if __name__ == "__main__":
    sys.exit(main())
