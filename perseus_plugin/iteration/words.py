"""What people write for watts and shares, on a command line, in a configuration or over a socket."""

from __future__ import annotations

import re

from perseus_plugin.errors import PlanError, shown

_UNITS_W = {"": 1.0, "w": 1.0, "kw": 1e3, "mw": 1e6, "gw": 1e9}
_WATTS = re.compile(r"\s*(\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([kKMG]?[wW]?)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%?)\s*")


def parse_watts(told: object, what: str = "power") -> float:
    """Watts from a number, or from words such as `180kW`, `900 W`, `1.2 MW`.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(told, (int, float)) and not isinstance(told, bool):
        return float(told)
    found = _WATTS.fullmatch(told) if isinstance(told, str) else None
    if found is None or found[2].lower() not in _UNITS_W:
        raise PlanError(f'{what}: got {shown(told)}; allowed: watts, such as 900, "900 W" or "180kW"')
    return float(found[1]) * _UNITS_W[found[2].lower()]


def parse_share(told: object, what: str = "share") -> float:
    """A share from a number, or from words such as `0.1` or `10 %`.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(told, (int, float)) and not isinstance(told, bool):
        return float(told)
    found = _SHARE.fullmatch(told) if isinstance(told, str) else None
    if found is None:
        raise PlanError(f'{what}: got {shown(told)}; allowed: a share, such as 0.1 or "10 %"')
    return float(found[1]) / (100 if found[2] else 1)
