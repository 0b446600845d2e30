"""The `--perseus` flags in Megatron's own argument parser.

Both ways in lead here: the import hook, which wraps `add_megatron_arguments`, and the one-line patch of Megatron's
`arguments.py` (see `patches/`). Importing this module imports neither torch nor Megatron.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.base import is_first_of_machine, rank_in_front, say_could_not_start, wrap_once

if TYPE_CHECKING:
    from perseus_plugin.config import PerseusConfig

_FLAG = "--perseus"

# Flag -> where it goes in the block, whether it is a number, and its help.
_SETTINGS: Mapping[str, tuple[tuple[str, ...], bool, str, str]] = {
    "--perseus-slowdown": (
        ("slowdown",),
        True,
        "SHARE",
        "Share by which an iteration may be longer than at full clocks: 0.05 or 5%%. Default: 0.",
    ),
    "--perseus-power-budget": (
        ("power_budget_w",),
        True,
        "WATTS",
        "Average power that the GPUs of the job may draw: 900 or 180kW. Default: no limit.",
    ),
    "--perseus-output": (
        ("output_dir",),
        False,
        "FOLDER",
        "Where summary.json, profile.csv and plan.json go. Default: perseus_out.",
    ),
    "--perseus-backend": (
        ("gpu", "backend"),
        False,
        "NAME",
        "Who sets the clocks: auto, a backend such as nvml or zeusd, or off to observe only. Default: auto.",
    ),
    "--perseus-profile": (
        ("profiling", "load"),
        False,
        "FILE.csv",
        "Use this profile instead of measuring one; needs --perseus-blocking-power.",
    ),
    "--perseus-blocking-power": (
        ("profiling", "blocking_power_w"),
        True,
        "WATTS",
        "Power of a GPU that waits for a peer; needed with --perseus-profile.",
    ),
}


def patch_arguments_module(module: ModuleType) -> None:
    """Have a freshly imported `megatron.training.arguments` know the flags. Idempotent."""

    def around(stock: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: add_arguments(stock(*args, **kwargs))

    wrap_once(module, "add_megatron_arguments", around)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser, and have it act on them once it has parsed.

    With `--perseus` given and the settings in order, Megatron's schedules are hooked (see `adapter.install`). Settings
    that are wrong end the program with one line, from the first rank of each machine. Idempotent.
    """
    if _FLAG in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(
        "perseus", "Less GPU energy at the same speed for pipeline-parallel training (perseus-plugin)."
    )
    group.add_argument(_FLAG, action="store_true", help="Profile the job, plan SM clocks, and follow the plan.")
    group.add_argument(
        f"{_FLAG}-config",
        metavar="FILE",
        help="YAML or JSON file with the settings of the perseus block; other perseus flags take precedence.",
    )
    for flag, (_, _, metavar, text) in _SETTINGS.items():
        group.add_argument(flag, metavar=metavar, help=text)
    there = vars(parser).get("parse_known_args")  # another tool's, on this parser

    @functools.wraps(parser.parse_known_args)  # parse_args calls it too
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        beneath = there or type(parser).parse_known_args.__get__(parser)  # the class's as it is then
        namespace, rest = beneath(*args, **kwargs)
        _act_on(namespace, parser.prog)
        return namespace, rest

    vars(parser)["parse_known_args"] = parse_known_args
    return parser


def config_of(arguments: argparse.Namespace) -> PerseusConfig | None:
    """The configuration that the flags make; None without `--perseus`, or where the file has it disabled.

    Raises:
        ConfigError: a flag or the file's content is wrong, or a perseus flag is given without `--perseus`.
    """
    given = {flag: value for flag in _SETTINGS if (value := getattr(arguments, _attribute(flag), None)) is not None}
    file = getattr(arguments, _attribute(f"{_FLAG}-config"), None)
    if not getattr(arguments, _attribute(_FLAG), False):
        if given or file is not None:
            first = next(iter(given), f"{_FLAG}-config")
            raise ConfigError(f"{first}: needs {_FLAG}, without which perseus stays off")
        return None
    from perseus_plugin.config import load_config, parse_config

    # What the flags give is put into the file's block before it is checked as a whole.
    block: dict[str, Any] = {} if file is None else load_config(file).model_dump(exclude_unset=True)
    for flag, value in given.items():
        path, is_number, _, _ = _SETTINGS[flag]
        section = block
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = _number(value) if is_number else value
    config = parse_config(block)
    return config if config.enabled else None


def _number(value: str) -> float | str:
    """As a file would have it; words such as `10%` are the configuration's to read."""
    try:
        return float(value)
    except ValueError:
        return value


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _act_on(arguments: argparse.Namespace, program: str) -> None:
    try:
        config = config_of(arguments)
        if config is None:
            return
        from perseus_plugin.integrations.megatron.adapter import install

        install(config, arguments)
    except ConfigError as error:
        _leave(f"{program}: error: {error}")
    except Exception:
        if is_first_of_machine():
            say_could_not_start(rank_in_front())  # a fault of ours, or an incomplete installation


def _leave(message: str) -> NoReturn:
    """End the program as argparse does, without the pages of usage that Megatron has, and from one rank per machine.

    Not from rank 0 alone: a file may be missing, or wrong, on another machine.
    """
    import sys

    if is_first_of_machine():
        print(f"{rank_in_front()}{message}", file=sys.stderr)
    raise SystemExit(2)
