"""Processes of this package, which import nothing from the job's working folder.

`python -m` looks for modules in the folder that it is started in before all others, and so does an empty or relative
entry of PYTHONPATH, which is easily there by mistake (`PYTHONPATH=$PYTHONPATH:/x`). Whatever lies there under the name
of a module that we import would run with the rights of the job. So this file is what Python is given to run: it takes
its own folder out of the way, and loads the package from where it lies itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

PACKAGE = "perseus_plugin"

_KEPT = ("PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONPLATLIBDIR", "PYTHONDONTWRITEBYTECODE")
"""Variables that say where Python and its packages are; all others are for the training script."""
_OF_ANY = ("PYTHONDONTWRITEBYTECODE",)
_SEARCHED = ("PYTHONPATH", "LD_LIBRARY_PATH")


def command(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """What runs a module of this package, as `python -m` would, with this Python or another one.

    Another one runs these same files, so that both ends are always of one version.
    """
    return [python or sys.executable, __file__, module, *arguments]


def environment(python: str | None = None) -> dict[str, str]:
    """This process's environment, without what has a process of ours import from wherever the job happens to be.

    Another Python (see `command`) gets none of what says where this one's packages are.
    """
    of_ours = _KEPT if python is None else _OF_ANY
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") or k in of_ours}
    for name in _SEARCHED if python is None else _SEARCHED[1:]:
        places = [place for place in os.environ.get(name, "").split(os.pathsep) if Path(place).is_absolute()]
        kept.pop(name, None)
        if places:
            kept[name] = os.pathsep.join(places)
    if python is not None or sys.flags.no_user_site:
        kept["PYTHONNOUSERSITE"] = "1"
    # One that imports torch has no framework to be hooked.
    return {**kept, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def ending(status: int) -> str:
    """What a process ended with, for people; `status` as `subprocess` has it."""
    if status >= 0:
        return f"status {status}"
    name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
    of_memory = ", as the kernel sends when memory runs out (its log tells), or an administrator"
    return name + (of_memory if -status == signal.SIGKILL else "")


def _run() -> None:
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 on
        del sys.path[0]  # the folder of this file: our own modules are `perseus_plugin.files`, not `files`
    import importlib.util
    import runpy

    spec = importlib.util.spec_from_file_location(PACKAGE, Path(__file__).parents[1] / "__init__.py")
    assert spec is not None  # it has an ending that Python knows
    assert spec.loader is not None
    package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
