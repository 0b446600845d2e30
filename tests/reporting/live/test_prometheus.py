"""Metrics for Prometheus: really scraped over HTTP, really written to a file, and never in the way."""

from __future__ import annotations

import logging
import math
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import PrometheusConfig, parse_config
from perseus_plugin.errors import ConfigError
from perseus_plugin.reporting.live.prometheus import PrometheusPublisher, metric_of
from tests.ports import free_port
from tests.waiting import came_true

parser = pytest.importorskip("prometheus_client.parser")

FACTS = {"world_size": 4, "gpu": "emulated A100", "emulated": True}
EVENTS = [
    ("Perseus/energy_j/full_clock", 2101.5),
    ("Perseus/energy_j/measured", 1797.75),
    ("Perseus/straggler/slow_replicas", 1.0),
]
Open = Callable[..., PrometheusPublisher]


@pytest.fixture
def opened() -> Iterator[Open]:
    made: list[PrometheusPublisher] = []

    def open_one(**config: Any) -> PrometheusPublisher:
        made.append(PrometheusPublisher(PrometheusConfig(**config), FACTS))
        return made[-1]

    yield open_one
    for publisher in made:
        publisher.close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parser.text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        assert response.status == 200
        return str(response.read().decode())


@pytest.mark.parametrize(
    ("event", "metric", "labels"),
    [
        ("Perseus/iteration_time_s/full_clock", "perseus_iteration_time_seconds", {"figure": "full_clock"}),
        ("Perseus/energy_j/measured", "perseus_energy_joules", {"figure": "measured"}),
        ("Perseus/power_w/recent", "perseus_power_watts", {"figure": "recent"}),
        ("Perseus/power_budget_w/aimed_at", "perseus_power_budget_watts", {"figure": "aimed_at"}),
        ("Perseus/saving_percent/predicted", "perseus_saving_percent", {"figure": "predicted"}),
        ("Perseus/target_in_force/full", "perseus_target_in_force", {"wish": "full"}),
        ("Perseus/target/under_way", "perseus_target_under_way", {}),
        ("Perseus/straggler/energy_saved_j", "perseus_straggler_energy_saved_joules", {}),
        ("Perseus/straggler/switches", "perseus_straggler_switches", {}),
    ],
)
def test_names_follow_the_customs_of_prometheus(event: str, metric: str, labels: dict[str, str]) -> None:
    assert metric_of(event) == (metric, labels)


def test_what_there_is_no_more_is_not_a_number(opened: Open) -> None:
    port = free_port()
    publisher = opened(port=port)
    publisher([("Perseus/power_budget_w/in_force", 900.0)])
    publisher([("Perseus/power_budget_w/in_force", math.nan)])
    assert math.isnan(samples(scraped(port))["perseus_power_budget_watts", (("figure", "in_force"),)])


def test_a_scrape_over_http_gets_the_newest_values(opened: Open) -> None:
    port = free_port()
    publisher = opened(port=port)
    publisher(EVENTS)
    publisher([("Perseus/energy_j/measured", 1790.0)])
    seen = samples(scraped(port))
    assert seen["perseus_energy_joules", (("figure", "full_clock"),)] == 2101.5
    assert seen["perseus_energy_joules", (("figure", "measured"),)] == 1790.0
    assert seen["perseus_straggler_slow_replicas", ()] == 1.0
    assert seen["perseus_job_info", (("emulated", "true"), ("gpu", "emulated A100"), ("world_size", "4"))] == 1.0
    assert seen["perseus_last_update_timestamp_seconds", ()] > 1.6e9


def test_only_this_machine_can_scrape_unless_told(opened: Open) -> None:
    publisher = opened(port=free_port())
    assert publisher._server.server_address[0] == "127.0.0.1"


def test_the_port_is_free_again_after_the_end(opened: Open) -> None:
    port = free_port()
    opened(port=port).close()
    opened(port=port)([("Perseus/energy_j/measured", 1.0)])
    assert "perseus_energy_joules" in scraped(port)


def test_the_textfile_holds_the_same_and_goes_with_the_job(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "perseus.prom"
    publisher = opened(textfile=str(path))
    assert not path.exists()
    publisher(EVENTS)
    assert samples(path.read_text())["perseus_energy_joules", (("figure", "measured"),)] == 1797.75
    publisher.close()
    assert list(tmp_path.iterdir()) == []
    publisher(EVENTS)
    assert not path.exists()


def test_a_port_in_use_is_one_warning(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        publisher = opened(port=port)
        for _ in range(3):
            publisher(EVENTS)
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another" in told.getMessage()


def test_a_port_in_use_leaves_the_textfile(opened: Open, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        opened(port=taken.getsockname()[1], textfile=str(tmp_path / "a.prom"))(EVENTS)
    assert (tmp_path / "a.prom").exists()
    assert caplog.text.count("the textfile is written all the same") == 1


def test_a_file_that_cannot_be_written_is_one_warning(
    opened: Open, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    publisher = opened(textfile=str(tmp_path / "missing" / "a.prom"))
    for _ in range(3):
        publisher(EVENTS)
    assert caplog.text.count("nothing is published from here on") == 1


def test_without_the_package_it_says_how_to_get_it(
    opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    opened(port=free_port())(EVENTS)
    assert "pip install 'perseus-plugin[prometheus]'" in caplog.text


def test_off_by_default_there_is_no_thread(opened: Open) -> None:
    before = {*threading.enumerate()}
    opened()(EVENTS)
    assert {*threading.enumerate()} <= before


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"port": 0}, "perseus.prometheus.port: got 0; allowed: a whole number from 1 to 65535, or null"),
        ({"textfile": "metrics.txt"}, 'perseus.prometheus.textfile: got "metrics.txt"; allowed: a path that ends in'),
        ({"adress": "x"}, "perseus.prometheus.adress: unknown key"),
    ],
)
def test_wrong_settings_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"prometheus": block})
    assert message in str(caught.value)


def test_idle_connections_are_few_and_keep_nobody_from_scraping(opened: Open) -> None:
    port = free_port()
    opened(port=port)(EVENTS)
    before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(60)]
    assert samples(scraped(port))
    assert came_true(lambda: threading.active_count() - before <= 17)
    for connection in idle:
        connection.close()


def test_a_scraper_s_address_may_be_of_the_newer_sort(opened: Open) -> None:
    port = free_port()
    opened(port=port, address="::1")(EVENTS)
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=60) as response:
        assert response.status == 200
