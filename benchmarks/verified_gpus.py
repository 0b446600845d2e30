"""A table of what `perseus verify` found on GPUs, a column per file, for `docs/evidence.md`.

python benchmarks/verified_gpus.py docs/evidence/*.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from perseus_plugin.cli.verification.page import number, percent
from perseus_plugin.reporting.verification import Estimator, Spread, Verification, load_verification


def figures(found: Verification) -> dict[str, str]:
    """The rows of one file."""
    machine = found.machine
    rows = {
        "GPU": machine.gpu + (" (a model, no GPU)" if machine.emulated and "emulated" not in machine.gpu else ""),
        "measured on": found.date.partition("T")[0],
        "driver, torch": f"{machine.driver or '-'}, {machine.software.get('torch', '-')}",
        "clocks": "set" if found.set_clocks else "only read",
        **{f"reading the {name} (µs): median, 95 %": pair(spread) for name, spread in found.calls_us.items()},
    }
    if (seen := found.boundaries) is not None:
        rows |= {
            "recorded time of a boundary (µs): error, 95 %": pair(seen.error_us),
            "acted on after (µs): Python idle, 95 %": pair(seen.late_us),
            "... Python queues kernels, 95 %": pair(seen.late_queueing_us),
            "... Python computes, 95 %": pair(seen.late_busy_us),
            "event clock against the host's (ppm)": number(seen.drift_ppm, 0),
        }
    if (cost := found.hooks) is not None:
        rows |= {
            "hooks per instruction, training thread (µs): median, 95 %": pair(cost.call_us),
            f"... longer where the GPU is busy, of {cost.instruction_ms:.0f} ms (µs)": (
                f"{cost.gpu_bound_us:+.0f} ± {cost.gpu_bound_se_us:.0f}"
            ),
            "... longer where the CPU is the bottleneck (µs)": f"{cost.host_bound_us:+.0f}",
        }
    if (graphs := found.graphs) is not None:
        rows |= {
            "replays of a CUDA graph: vary by (standard deviation)": f"{graphs.jitter_percent:.3f} %",
            f"... where the GPU is in one of {graphs.replay_ms.median:.0f} ms (µs): error, 95 %": pair(graphs.where_us),
            "... launching one (µs): median, 95 %": pair(graphs.call_us),
            "... longer while another process reads the GPU": (
                f"{graphs.read_percent:+.3f} ± {graphs.read_se_percent:.3f} %"
            ),
        }
    if (counter := found.counter) is not None:
        rows |= {
            "energy counter (ms): period, window, lag": ", ".join(
                number(value, 0) for value in (counter.period_ms, counter.window_ms, counter.lag_ms)
            )
        }
    for name, tested in (("below the power limit", found.estimator), ("at the power limit", found.at_the_limit)):
        if tested is not None:
            rows |= errors(name, tested)
    rows |= {
        f"waiting, {one.how} (W, MHz)": f"{number(one.power_w, 0)}, {number(one.clock_mhz, 0)}" for one in found.waiting
    }
    seen_ms = [one.latency_ms for one in found.switches if one.latency_ms is not None]
    if seen_ms:
        rows["clock changes (ms): median, slowest pair"] = (
            f"{sorted(one.median for one in seen_ms)[len(seen_ms) // 2]:.1f}, {max(one.median for one in seen_ms):.1f}"
        )
    return rows | {
        f"waiting at {one.clock_mhz} MHz (W): as in the pattern, no work": (
            f"{number(one.power_w, 0)}, {number(one.idle_w, 0)}"
        )
        for one in found.waiting_at
    }


def errors(name: str, tested: Estimator) -> dict[str, str]:
    """The estimator against steady runs."""
    kinds = ", ".join(percent(one.error_percent) for one in tested.kinds)
    return {
        f"energy of {', '.join(one.kind for one in tested.kinds)} {name}: off by": kinds,
        f"waiting {name} (W): estimated, steady": (
            f"{number(tested.waiting_w, 0)} ± {number(tested.waiting_se_w, 0)}, {number(tested.steady_waiting_w, 0)}"
        ),
    }


def pair(spread: Spread) -> str:
    """Median and 95 %."""
    return f"{spread.median:,.0f}, {spread.p95:,.0f}"


def table(files: Sequence[Path]) -> str:
    """The whole table, as Markdown."""
    columns = [figures(load_verification(file)) for file in files]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [f"| {name} | {' | '.join(column.get(name, '-') for column in columns)} |" for name in names]
    return "\n".join([lines[0], "|---" * (1 + len(columns)) + "|", *lines[1:]]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    print(table(parser.parse_args().files), end="")
