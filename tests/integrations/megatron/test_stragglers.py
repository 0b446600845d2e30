"""Megatron's own detector: what it gathers on rank 0 reaches the session."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.integrations.base import tell
from perseus_plugin.integrations.in_memory import InMemorySession
from perseus_plugin.integrations.megatron.stragglers import MegatronDetector, listen

REPOSITORY = Path(__file__).parents[3]


REAL = """
import sys, types
from tests.megatron_support.cuda_on_cpu import install
install()
import torch.distributed
from megatron.core import utils
from perseus_plugin.integrations.megatron.stragglers import listen

took = []
from perseus_plugin.session.running import runs

class Session:
    closed = False
    external_figures = took.append

session = Session()
runs(session)
listen(utils)
listen(utils)
detector = utils.StragglerDetector()
detector.rank, detector.world, detector._off = 0, 4, False

def gather(own, object_gather_list, dst):
    object_gather_list[:] = [{**own, "rank": rank, "flops": flops} for rank, flops in enumerate((400.0, 200.0, 400.0))]

torch.distributed.gather_object, torch.distributed.barrier = gather, lambda: None
gathered = detector._min_max(10.0, 1.0, 50.0, 300.0, 99.0, 1410.0, 400.0)
assert gathered.min_elapsed()[0] == 10.0, "the detector has what it had"
(figures,) = took
assert figures.kinds == ("forward",) and not figures.comparable
print(figures.source, sorted(figures.relative_time.items()))
"""


def test_the_real_detectors_figures_reach_the_session() -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    done = subprocess.run([sys.executable, "-c", REAL], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"megatron {[(0, 1 / 400), (1, 1 / 200), (2, 1 / 400)]}\n"


def test_other_ranks_and_closed_sessions_take_nothing(session: InMemorySession) -> None:
    assert not tell(MegatronDetector(), None)
    assert not tell(MegatronDetector(), types.SimpleNamespace(aflops=None))
    session.closed = True
    assert not tell(MegatronDetector(), types.SimpleNamespace(aflops=[lambda: (1.0, 0, "")]))
    assert not session.took


def test_what_is_not_understood_costs_a_warning(session: InMemorySession, caplog: pytest.LogCaptureFixture) -> None:
    class StragglerDetector:
        def _min_max(self) -> Any:
            return types.SimpleNamespace(aflops=["fast"])

    listen(types.SimpleNamespace(StragglerDetector=StragglerDetector))  # type: ignore[arg-type]
    assert StragglerDetector()._min_max().aflops == ["fast"]
    assert "--log-straggler was not understood; training goes on" in caplog.text
