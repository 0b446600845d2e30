"""nvidia-resiliency-ext: the real package's report goes to the session as the detector made it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from perseus_plugin.integrations.resiliency import SOURCE, patch_straggler_module, take_report
from perseus_plugin.straggler_external import ExternalFigures


class FakeSession:
    def __init__(self) -> None:
        self.closed = False
        self.took: list[ExternalFigures] = []

    def external_figures(self, figures: ExternalFigures) -> None:
        self.took.append(figures)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    session = FakeSession()
    monkeypatch.setitem(sys.modules, "perseus_plugin.session", types.SimpleNamespace(live_sessions={session}))  # type: ignore[arg-type]
    return session


def real_report(scores: dict[int, float]) -> Any:
    reporting = pytest.importorskip("nvidia_resiliency_ext.straggler.reporting", exc_type=ImportError)
    return reporting.Report(scores, {}, {}, {}, {}, {}, {}, 0.0, True, None)


def test_scores_become_relative_times(session: FakeSession) -> None:
    assert take_report(real_report({0: 1.0, 1: 0.8, 2: 0.5}))
    (figures,) = session.took
    assert figures == ExternalFigures(SOURCE, {0: 1.0, 1: 1.25, 2: 2.0}, comparable=True)


def test_a_report_without_scores_of_others_is_not_taken(session: FakeSession) -> None:
    for report in (None, types.SimpleNamespace(gpu_relative_perf_scores={}), real_report({3: 0.5})):
        assert not take_report(report)
    session.closed = True
    assert not take_report(real_report({0: 1.0, 1: 0.8}))
    assert not session.took


def test_the_real_detector_passes_its_reports_on_and_returns_them(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    straggler = pytest.importorskip("nvidia_resiliency_ext.straggler.straggler", exc_type=ImportError)
    made = real_report({0: 1.0, 1: 0.8})
    stock = straggler.Detector.generate_report

    def generate_report(cls: type) -> Any:
        return made

    monkeypatch.setattr(straggler.Detector, "generate_report", classmethod(generate_report))
    monkeypatch.setattr(straggler.Detector, "_perseus_patched", False, raising=False)
    del straggler.Detector._perseus_patched
    patch_straggler_module(straggler)
    patch_straggler_module(straggler)
    assert straggler.Detector.generate_report() is made
    assert len(session.took) == 1, "patched once"
    assert callable(stock)


def test_a_report_that_is_not_understood_costs_a_warning(
    session: FakeSession, caplog: pytest.LogCaptureFixture
) -> None:
    class Detector:
        @classmethod
        def generate_report(cls) -> Any:
            return types.SimpleNamespace(gpu_relative_perf_scores={0: "fast", 1: "slow"})

    patch_straggler_module(types.SimpleNamespace(Detector=Detector))  # type: ignore[arg-type]
    assert Detector.generate_report().gpu_relative_perf_scores == {0: "fast", 1: "slow"}
    assert "was not understood; training goes on" in caplog.text
    assert not session.took
