"""Our streams beside Megatron's own schedule functions, for every version at hand; see `megatron_probe.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.launching import REPOSITORY
from tests.megatron_support.versions import python_path, versions

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not versions(), reason="megatron-core is not installed here, and .megatron/ has no version"),
]


@pytest.mark.parametrize("version", versions())
def test_every_instruction_and_transfer_is_where_megatron_has_it(version: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("megatron_probe.py"))],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": python_path(versions()[version], REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].split("+")[0] == version
    assert found["differences"] == []
    assert found["same"] >= 170
