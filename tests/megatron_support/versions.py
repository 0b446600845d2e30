"""Which versions of megatron-core are at hand: the environment's own, and those that `make megatron` puts beside it."""

from __future__ import annotations

import importlib.metadata
import os
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_BESIDE = REPOSITORY / ".megatron"
_INSTALLED = Path(sysconfig.get_path("purelib"))


def versions(with_training: bool = False) -> dict[str, Path]:
    """Version -> the folder that holds its `megatron` package, oldest first.

    Args:
        with_training: only versions whose package contains `megatron.training`, 0.17 and later.
    """
    found = {
        child.name: child for child in (_BESIDE.iterdir() if _BESIDE.exists() else ()) if (child / "megatron").is_dir()
    }
    try:
        installed = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        found[installed.version] = Path(str(installed.locate_file("")))
    wanted = {
        version: folder
        for version, folder in found.items()
        if not with_training or (folder / "megatron" / "training").is_dir()
    }
    return dict(sorted(wanted.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def python_path(*first: Path) -> str:
    """A PYTHONPATH on which these folders come before what is there already; where Python looks anyway is left out."""
    folders = [str(folder) for folder in first if folder != _INSTALLED]
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
