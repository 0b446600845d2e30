"""Values that go through the store as one short string: many of them cost whoever passes them on next to nothing."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.files import parse_json

_MOST_BYTES = 1 << 24  # that one may hold


def packed(value: Any) -> str:
    """A JSON-serialisable value as text."""
    data = json.dumps(value, separators=(",", ":")).encode()
    return base64.b64encode(zlib.compress(data)).decode()


def unpacked(text: Any) -> Any:
    """Inverse of `packed`, whoever has written it.

    Raises:
        ExchangeError: it is no such text.
    """
    try:
        unpack = zlib.decompressobj()
        data = unpack.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
        if not unpack.eof:
            raise ValueError(f"it does not end within {_MOST_BYTES} bytes")
        return parse_json(data)
    except (TypeError, ValueError, zlib.error) as error:
        raise ExchangeError(f"a packed value in the job's store is not valid JSON: {error}") from error
