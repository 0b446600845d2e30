from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from perseus_plugin.errors import os_problem, shown, validation_problem


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.ENOLCK, errno.EACCES, errno.EAGAIN])
def test_a_system_error_names_file_and_remedy(number: int) -> None:
    text = os_problem(OSError(number, os.strerror(number), "/somewhere/file"))
    assert text.startswith(f"/somewhere/file: {os.strerror(number)} (")
    assert text.endswith(")")
    assert "Errno" not in text


def test_what_has_no_file_or_is_not_known_is_said_all_the_same(tmp_path: Path) -> None:
    assert os_problem(OSError("the socket is too long")) == "the socket is too long"
    assert os_problem(OSError()) == "OSError"
    with pytest.raises(OSError, match="missing") as error:
        (tmp_path / "missing").open()
    assert os_problem(error.value) == f"{tmp_path / 'missing'}: No such file or directory"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_name: Literal["that"] = Field(default="that", alias="schema")
    inner: Inner = Inner(count=1)
    rows: list[Inner] = []
    pair: tuple[int, int] | None = Field(default=None, json_schema_extra={"allowed": "two whole numbers, or null"})


class Rows(RootModel[list[Inner]]):
    pass


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        (Outer, '{"schema": "this"}', "schema: got \"this\"; allowed: 'that'"),
        (Outer, '{"inner": {"count": 0}}', "inner.count: got 0; allowed: greater than or equal to 1"),
        (Outer, '{"inner": {}}', "inner.count: missing; it must be given"),
        (
            Outer,
            '{"inner": {"counts": 7, "count": 1}}',
            "inner.counts: unknown key, given the value 7; did you mean 'count'? known keys: count",
        ),
        (
            Outer,
            '{"schema_name": "that"}',
            "schema_name: unknown key, given the value \"that\"; did you mean 'schema'? ",
        ),
        (
            Outer,
            '{"rows": [{"count": 1}, {"count": "x"}]}',
            'rows.1.count: got "x"; allowed: a valid integer',
        ),
        (Outer, '{"rows": [{"count": 1, "x": 2}]}', "rows.0.x: unknown key, given the value 2"),
        (Outer, '{"pair": [1, "x"]}', 'pair: got "x"; allowed: two whole numbers, or null'),
        (Outer, "[]", "got []; allowed: an object"),
        (Outer, '{"inner"', "not valid JSON: EOF while parsing an object at line 1 column 8"),
        (Rows, '[{"count": 1}, {"count": null}]', "1.count: got null; allowed: a valid integer"),
    ],
)
def test_what_is_wrong_with_data_is_one_line(model: type[BaseModel], data: str, text: str) -> None:
    with pytest.raises(ValidationError) as error:
        model.model_validate_json(data)
    assert validation_problem(error.value, model).startswith(text)
    named = validation_problem(error.value, model, "the file")
    assert named.startswith("the file")
    assert "\n" not in named


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "nan"), ("a\nb", '"a\\nb"'), ({1}, "{1}"), (["x" * 100], '["' + "x" * 75 + "...")],
)
def test_a_refused_value_is_shown_in_one_line(value: Any, text: str) -> None:
    assert shown(value) == text
