from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from perseus_plugin.integrations.torch_pipelining import turning_on


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What our module registers with a torchtitan that is none."""
    found: dict[str, Any] = {}

    class MetricsProcessor:
        class Config:
            """As torchtitan's."""

    def override(*, target: type, description: str) -> Callable[[Any], Any]:
        def decorator(function: Any) -> Any:
            found.update(target=target, name=f"{function.__module__}.{function.__name__}", function=function)
            return function

        return decorator

    for name, content in {
        "torchtitan": {},
        "torchtitan.components": {},
        "torchtitan.components.metrics": {"MetricsProcessor": MetricsProcessor},
        "torchtitan.config": {"override": override},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(turning_on, "_given", [])
    importlib.import_module("perseus_plugin.integrations.torchtitan")
    yield found
    del sys.modules["perseus_plugin.integrations.torchtitan"]


def test_the_override_turns_it_on_and_replaces_nothing(registered: dict[str, Any]) -> None:
    settings = registered["target"]()
    assert registered["name"] == "perseus_plugin.integrations.torchtitan.perseus"
    assert registered["function"](settings, config="perseus.yaml") is settings
    assert turning_on._given == ["perseus.yaml"]
