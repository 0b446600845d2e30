"""`examples/grafana/perseus.json` asks for metrics that a job has, and is a dashboard as Grafana has them.

The models are what Grafana's own schema (`kinds/dashboard/dashboard_kind.cue`) requires and allows of what is used.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from perseus_plugin.config import PrometheusConfig
from perseus_plugin.exchange.messages import Totals
from perseus_plugin.leader.effects import Show
from perseus_plugin.leader.observed import Situated
from perseus_plugin.leader.target_figures import target_figures
from perseus_plugin.reporting.live.comparison import Compared, Effect
from perseus_plugin.reporting.live.power import Drawn
from perseus_plugin.reporting.live.prometheus import PrometheusPublisher
from perseus_plugin.reporting.live.reporter import events_of
from tests.leader.test_decide import SLOW
from tests.leader.test_decide_targets import planned
from tests.reporting.live.test_reporter import RANKS, made

parser = pytest.importorskip("prometheus_client.parser")

FILE = Path(__file__).parents[3] / "examples" / "grafana" / "perseus.json"
FACTS = {"world_size": 4, "stages": 4, "gpu": "emulated A100", "backend": "emulated", "emulated": True}
OF_PROMETHEUS = {"instance", "job"}
"""Labels that every scraped metric has."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DataSource(Part):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class GridPos(Part):
    h: Annotated[int, Field(gt=0)]
    w: Annotated[int, Field(gt=0, le=24)]
    x: Annotated[int, Field(ge=0, lt=24)]
    y: Annotated[int, Field(ge=0)]


class Target(Part):
    refId: Annotated[str, Field(pattern="^[A-Z]$")]  # noqa: N815 - Grafana's name
    datasource: DataSource
    expr: str
    legendFormat: str  # noqa: N815


class Threshold(Part):
    color: str
    value: float | None


class Thresholds(Part):
    mode: Literal["absolute", "percentage"]
    steps: list[Threshold]


class MappingResult(Part):
    text: str
    color: str
    index: int


class ValueMap(Part):
    type: Literal["value"]
    options: dict[str, MappingResult]


class Colour(Part):
    mode: Literal["thresholds", "palette-classic", "palette-saturated", "continuous-GrYlRd", "fixed"]


class Defaults(Part):
    unit: Literal["watt", "joule", "s", "percent", "none"]
    color: Colour
    mappings: list[ValueMap]
    thresholds: Thresholds
    custom: dict[str, Any] = {}


class Matcher(Part):
    id: Literal["byName"]
    options: str


class Property(Part):
    id: str
    value: Any


class Override(Part):
    matcher: Matcher
    properties: list[Property]


class FieldConfig(Part):
    defaults: Defaults
    overrides: list[Override]


class Panel(Part):
    id: int
    type: Literal["timeseries", "stat"]
    title: str
    description: str
    datasource: DataSource
    gridPos: GridPos  # noqa: N815
    fieldConfig: FieldConfig  # noqa: N815
    options: dict[str, Any]
    targets: Annotated[list[Target], Field(min_length=1)]


class Variable(Part):
    name: str
    label: str
    type: Literal["query", "adhoc", "constant", "datasource", "interval", "textbox", "custom", "system"]
    query: str | dict[str, str]
    hide: Literal[0, 1, 2]
    datasource: DataSource | None = None
    definition: str = ""
    refresh: Literal[0, 1, 2] = 0
    sort: int = 0


class Templating(Part):
    list: list[Variable]


class Range(Part):
    from_: Annotated[str, Field(alias="from", pattern="^now")]
    to: Annotated[str, Field(pattern="^now")]


class Dashboard(Part):
    uid: Annotated[str, Field(min_length=8, max_length=40)]
    title: str
    description: str
    tags: list[str]
    editable: bool
    graphTooltip: Literal[0, 1, 2]  # noqa: N815
    schemaVersion: Annotated[int, Field(ge=36, lt=2**16)]  # noqa: N815
    version: Annotated[int, Field(ge=0)]
    timezone: str
    refresh: str
    time: Range
    templating: Templating
    panels: list[Panel]


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    return Dashboard.model_validate_json(FILE.read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """The labels of every metric that a job publishes, which has been through all there is to be told of."""
    effect = Effect(0.001, 0.002, 10, 120)
    reference = Totals(iterations=30, time_s=30.0, energy_j=30.0)
    ranks = [one.model_copy(update={"totals": {**one.totals, "reference": reference}}) for one in RANKS]
    events = events_of(made(ranks, compared=Compared(effect, effect)))
    story = planned()
    events += target_figures(story.state, Drawn(700.0, 5.0, 10), 4)
    story.then(Situated(SLOW, 1000.0)).then(story.answered())
    events += [figure for show in story.of(Show) for figure in show.figures]
    file = tmp_path_factory.mktemp("metrics") / "perseus.prom"
    publisher = PrometheusPublisher(PrometheusConfig(textfile=str(file)), FACTS)
    publisher(events)
    found: dict[str, list[dict[str, str]]] = {}
    for family in parser.text_string_to_metric_families(file.read_text()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    publisher.close()
    return found


def asked(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Every metric in a query, with the labels that it asks for."""
    found = re.findall(r"(perseus_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, dict(re.findall(r'(\w+)=~?"([^"]*)"', labels))) for name, labels in found]


def test_every_query_asks_for_a_metric_that_there_is(
    dashboard: Dashboard, published: dict[str, list[dict[str, str]]]
) -> None:
    queries = [target.expr for panel in dashboard.panels for target in panel.targets]
    queries += [variable.definition for variable in dashboard.templating.list if variable.definition]
    for query in queries:
        assert asked(query), query
        for name, labels in asked(query):
            assert name in published, f"{query}: there is {sorted(published)}"
            own = {key: value for key, value in labels.items() if key not in OF_PROMETHEUS}
            assert any(own.items() <= has.items() for has in published[name]), f"{query}: {name} has {published[name]}"


def test_what_a_legend_names_is_a_label(dashboard: Dashboard, published: dict[str, list[dict[str, str]]]) -> None:
    for target in (target for panel in dashboard.panels for target in panel.targets):
        ((name, _),) = asked(target.expr)
        for label in re.findall(r"\{\{(\w+)\}\}", target.legendFormat):
            assert label in published[name][0], target.legendFormat


def test_all_that_is_published_of_power_and_targets_is_shown(
    dashboard: Dashboard, published: dict[str, list[dict[str, str]]]
) -> None:
    shown = {name for panel in dashboard.panels for target in panel.targets for name, _ in asked(target.expr)}
    assert {name for name in published if name.startswith(("perseus_power", "perseus_target"))} <= shown


def test_every_query_is_of_the_job_that_was_chosen(dashboard: Dashboard) -> None:
    assert [variable.name for variable in dashboard.templating.list] == ["datasource", "instance"]
    for target in (target for panel in dashboard.panels for target in panel.targets):
        assert all(labels.get("instance") == "$instance" for _, labels in asked(target.expr)), target.expr


def test_panels_have_ids_and_places_of_their_own(dashboard: Dashboard) -> None:
    ids = [panel.id for panel in dashboard.panels]
    assert len(set(ids)) == len(ids) > 10
    for panel in dashboard.panels:
        references = [target.refId for target in panel.targets]
        assert len(set(references)) == len(references), panel.title
        names = {target.legendFormat for target in panel.targets}
        assert {override.matcher.options for override in panel.fieldConfig.overrides} <= names, panel.title
        steps = panel.fieldConfig.defaults.thresholds.steps
        assert [step.value is None for step in steps] == [True] + [False] * (len(steps) - 1), "the first has no end"
    for one, other in itertools.combinations((panel.gridPos for panel in dashboard.panels), 2):
        apart_x = one.x + one.w <= other.x or other.x + other.w <= one.x
        assert apart_x or one.y + one.h <= other.y or other.y + other.h <= one.y, (one, other)
    assert all(panel.gridPos.x + panel.gridPos.w <= 24 for panel in dashboard.panels)


def test_it_is_kept_as_it_is_written(dashboard: Dashboard) -> None:
    text = FILE.read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
