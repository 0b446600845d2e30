"""Build the simulated NVML and run programs against it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SONAME = "libnvidia-ml.so.1"
SOURCES = ("nvml.c", "state.c")


def build(folder: Path) -> Path:
    """Compile the library into `folder`; skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) here")
    here = Path(__file__).parent
    library = folder / SONAME
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-Wl,-soname,{SONAME}"]
    subprocess.run([compiler, *flags, "-o", library, *(here / source for source in SOURCES), "-lpthread"], check=True)
    return library


def environment(library: Path, gpus: Sequence[Path]) -> dict[str, str]:
    """Ours, with the simulated NVML in the place of the driver's."""
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
        "PERSEUS_SIMULATED_GPUS": os.pathsep.join(str(gpu) for gpu in gpus),
    }


@pytest.fixture(scope="session")
def simulated_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library. Import this fixture into the conftest of the tests that use it."""
    return build(tmp_path_factory.mktemp("nvml"))
