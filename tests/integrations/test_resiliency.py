"""nvidia-resiliency-ext: the real package's report goes to the session as the detector made it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.integrations.base import tell
from perseus_plugin.integrations.in_memory import InMemorySession
from perseus_plugin.integrations.resiliency import ResiliencyDetector, patch_straggler_module
from perseus_plugin.stragglers.external import ExternalFigures

REPOSITORY = Path(__file__).parents[2]


def report(scores: dict[int, float]) -> Any:
    return types.SimpleNamespace(gpu_relative_perf_scores=scores)


REAL = """
import sys, types
took = []
from perseus_plugin.session.running import runs

class Session:
    closed = False
    external_figures = took.append

session = Session()
runs(session)

import torch
from perseus_plugin.integrations.loading import install_import_hooks
install_import_hooks()
from nvidia_resiliency_ext.straggler import straggler
from nvidia_resiliency_ext.straggler.reporting import Report

made = Report({0: 1.0, 1: 0.8, 2: 0.5}, {}, {}, {}, {}, {}, {}, 0.0, True, None)

class Reporter:
    def generate_report(self, *arguments, **named):
        return made

torch.cuda.synchronize = lambda: None
detector = straggler.Detector
detector.initialized, detector.reporter = True, Reporter()
detector._get_section_summaries = classmethod(lambda cls: {})
detector._get_kernel_summaries = classmethod(lambda cls: {})
detector._reset_sections_elapseds = classmethod(lambda cls: None)
detector.cupti_manager = types.SimpleNamespace(reset_results=lambda: None)
assert detector.generate_report() is made, "the job gets what it would get"
(figures,) = took
print(figures.source, figures.comparable, sorted(figures.relative_time.items()))
"""


def test_the_real_detectors_report_reaches_the_session() -> None:
    folder = REPOSITORY / ".resiliency"
    if not (folder / "nvidia_resiliency_ext").is_dir():
        pytest.skip("nvidia-resiliency-ext is not installed: make megatron")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder)])}
    done = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nvidia-resiliency-ext True {[(0, 1.0), (1, 1.25), (2, 2.0)]}\n"


def test_scores_become_relative_times(session: InMemorySession) -> None:
    assert tell(ResiliencyDetector(), report({0: 1.0, 1: 0.8, 2: 0.5}))
    (figures,) = session.took
    assert figures == ExternalFigures("nvidia-resiliency-ext", {0: 1.0, 1: 1.25, 2: 2.0}, comparable=True)


def test_a_report_without_scores_of_others_is_not_taken(session: InMemorySession) -> None:
    for told in (None, report({}), report({3: 0.5})):
        assert not tell(ResiliencyDetector(), told)
    session.closed = True
    assert not tell(ResiliencyDetector(), report({0: 1.0, 1: 0.8}))
    assert not session.took


def test_it_is_patched_once(session: InMemorySession) -> None:
    class Detector:
        @classmethod
        def generate_report(cls) -> Any:
            return report({0: 1.0, 1: 0.8})

    module: Any = types.SimpleNamespace(Detector=Detector)
    patch_straggler_module(module)
    patch_straggler_module(module)
    Detector.generate_report()
    assert len(session.took) == 1


def test_a_report_that_is_not_understood_costs_a_warning(
    session: InMemorySession, caplog: pytest.LogCaptureFixture
) -> None:
    class Detector:
        @classmethod
        def generate_report(cls) -> Any:
            return types.SimpleNamespace(gpu_relative_perf_scores={0: "fast", 1: "slow"})

    patch_straggler_module(types.SimpleNamespace(Detector=Detector))  # type: ignore[arg-type]
    assert Detector.generate_report().gpu_relative_perf_scores == {0: "fast", 1: "slow"}
    assert "was not understood; training goes on" in caplog.text
    assert not session.took
