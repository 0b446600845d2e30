"""The reference of every configuration key, written from the model itself."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from perseus_plugin.config import BLOCK, PerseusConfig

_HEAD = """# Configuration reference

The `perseus` block of a DeepSpeed JSON config, or a separate YAML or JSON file. Unknown keys and wrong values stop
the job before training starts, with one error that names the key, the value and what is allowed.

This page is written by `perseus config`; change `perseus_plugin/config.py` instead.
"""


def config_reference() -> str:
    """The page as Markdown: a table per object of the block."""
    parts = [_HEAD]
    _describe(PerseusConfig, BLOCK, parts)
    return "\n".join(parts)


def _describe(model: type[BaseModel], path: str, parts: list[str]) -> None:
    rows = [f"## `{path}`", "", (model.__doc__ or "").strip(), "", "| key | default | allowed | meaning |"]
    rows.append("|---|---|---|---|")
    nested = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            nested.append((inner, f"{path}.{name}"))
            rows.append(f"| `{name}` | | an object | {field.description} See below. |")
        else:
            rows.append(f"| `{name}` | `{_default(field)}` | {_allowed(field)} | {field.description} |")
    parts.append("\n".join([*rows, ""]))
    for inner, inner_path in nested:
        _describe(inner, inner_path, parts)


def _default(field: FieldInfo) -> str:
    return json.dumps(field.default)


def _allowed(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    return str(extra["allowed"])
