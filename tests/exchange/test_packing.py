from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.exchange.packing import packed, unpacked


def test_what_is_packed_is_found_again_and_is_short() -> None:
    value = {"clocks_mhz": [1410, 1200] * 500, "catch_up": None}
    text = packed(value)
    assert unpacked(json.loads(json.dumps(text))) == value
    assert len(text) < len(json.dumps(value)) / 20


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        {},
        "",
        "no base64!",
        base64.b64encode(b"not packed").decode(),
        base64.b64encode(zlib.compress(b"{not JSON")).decode(),
        packed({"a": 1})[:12],
        base64.b64encode(zlib.compress(b"0" * (1 << 25))).decode(),
    ],
    ids=lambda text: str(text)[:12],
)
def test_what_is_not_packed_is_one_error(text: Any) -> None:
    with pytest.raises(ExchangeError, match="a packed value in the job's store is not valid JSON: "):
        unpacked(text)
