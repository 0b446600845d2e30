"""Our streams beside Megatron's own schedule functions, for every version at hand; see `megatron_probe.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.launching import run_ranks
from tests.megatron_support.versions import versions

# What they import of torch; each is a fork of one process that has.
IMPORTS = ("torch._dynamo", "torch.testing._internal.distributed.fake_pg")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("Megatron's schedules"),
    pytest.mark.skipif(not versions(), reason="megatron-core is not installed here, and .megatron/ has no version"),
]


@pytest.mark.parametrize("version", versions())
def test_every_instruction_and_transfer_is_where_megatron_has_it(version: str, tmp_path: Path) -> None:
    probe = Path(__file__).with_name("megatron_probe.py")
    done = run_ranks(1, tmp_path, str(probe), str(versions()[version]), imports=IMPORTS).check()
    found = json.loads(done.output.splitlines()[-1])
    assert found["version"].split("+")[0] == version
    assert found["differences"] == []
    assert found["same"] >= 170
