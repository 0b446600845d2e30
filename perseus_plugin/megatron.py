"""The launcher: run a Megatron training script with the `--perseus` flags, script and Megatron unchanged.

torchrun ... -m perseus_plugin.megatron pretrain_gpt.py --perseus [flags of the script]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command line names as the main program."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: torchrun ... -m perseus_plugin.megatron SCRIPT.py [flags of the script]", file=sys.stderr)
        raise SystemExit(2)
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"perseus_plugin.megatron: error: SCRIPT: got {str(script)!r}; allowed: a Python file", file=sys.stderr)
        raise SystemExit(2)
    from perseus_plugin.integrations.loading import install_import_hooks

    install_import_hooks()
    del sys.argv[0]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
