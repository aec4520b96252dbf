"""Every query of every dashboard runs in a real Prometheus that scrapes a real service under real traffic."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from scripts.dashboards import __main__ as dashboards
from scripts.dashboards.experts import DRIFT, DRIFT_ALERT, ENTROPY, HOTTEST, IDLE
from tests.checkpoints import tiny_checkpoint
from tests.deploy.monitoring import ROOT, Addresses, Prometheus
from tests.service.serving import FOR_EVER, Server, wait_until

FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
SCRAPES_S = int(PROMETHEUS["global"]["scrape_interval"].removesuffix("s"))
# Grafana's rule for a panel that is narrow in time: four scrapes.
VARIABLES = {"job": "moescope", "instance": ".+", "layer": ".+", "__rate_interval": f"{4 * SCRAPES_S}s"}
SHOWS_NOTHING_WHEN_ALL_IS_WELL = {"Alerts"}


@dataclass(frozen=True)
class Query:
    """One query of a panel. Its name is that of the test's case."""

    dashboard: str
    panel: str
    expr: str

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}"

    @property
    def substituted(self) -> str:
        return substituted(self.expr)


def substituted(query: str) -> str:
    return re.sub(r"\$(\w+)", lambda variable: VARIABLES[variable[1]], query)


def panels(dashboard: str) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARDS[dashboard]["panels"] if panel["type"] != "row"]


QUERIES = [
    Query(name, panel["title"], target["expr"])
    for name in DASHBOARDS
    for panel in panels(name)
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Addresses:
    return Addresses(tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, addresses: Addresses) -> Iterator[Prometheus]:
    prometheus = Prometheus.of_compose(tmp_path_factory.mktemp("prometheus"), addresses)
    try:
        yield prometheus.wait_until_ready()
    finally:
        prometheus.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, addresses: Addresses) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    flags = ("--checkpoint", checkpoint, "--slots", 8, "--threads", 1, "--max-new-tokens", FOR_EVER)
    server = Server(folder / "log", *flags, host=addresses.of["service"], port=8000)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def watched(prometheus: Prometheus, server: Server) -> Iterator[Prometheus]:
    """A Prometheus that has seen some traffic, which goes on: what scripts/traffic.py makes."""
    traffic = subprocess.Popen([sys.executable, "scripts/traffic.py", "--url", server.url], cwd=ROOT)
    try:
        wait_until(lambda: has_grown(prometheus, 'rate(moescope_expert_tokens_total{phase="decode"}[1m])'))
        wait_until(lambda: has_grown(prometheus, "rate(moescope_request_seconds_count[1m])"))
        # Above zero as soon as the window has tokens enough; until then it is NaN.
        wait_until(lambda: has_grown(prometheus, "moescope_expert_load_entropy_ratio"))
        for record in (each for each in RECORDS if any(each in query.expr for query in QUERIES)):
            wait_until(partial(has_grown, prometheus, record))
        yield prometheus
    finally:
        traffic.terminate()
        traffic.wait()


def has_grown(prometheus: Prometheus, expr: str) -> bool:
    return any(float(series["value"][1]) > 0 for series in prometheus.query(expr))


def rules() -> list[dict[str, Any]]:
    files = [FOLDER.parents[1] / "prometheus" / Path(name).name for name in PROMETHEUS.get("rule_files", [])]
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


RECORDS = [rule["record"] for rule in rules() if "record" in rule]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_a_panel_s_query_finds_what_traffic_should_give(watched: Prometheus, query: Query) -> None:
    series = watched.query(query.substituted)
    assert watched.query_range(query.substituted, seconds=60, step=SCRAPES_S) or not series
    if query.panel not in SHOWS_NOTHING_WHEN_ALL_IS_WELL:
        assert any(math.isfinite(float(each["value"][1])) for each in series), query.substituted


def test_a_matrix_has_a_cell_for_every_expert_of_every_layer(watched: Prometheus) -> None:
    every = {(str(layer), str(expert)) for layer, expert in itertools.product(range(3), range(4))}
    for panel in panels("experts"):
        if panel["type"] == "table":
            found = watched.query(substituted(panel["targets"][0]["expr"]))
            assert {(cell["metric"]["layer"], cell["metric"]["expert"]) for cell in found} == every, panel["title"]
            assert all(set(cell["metric"]) == {"layer", "expert"} for cell in found), panel["title"]


def test_choosing_one_layer_leaves_the_others_out(watched: Prometheus) -> None:
    for query in QUERIES:
        if "$layer" in query.expr:
            expr = query.substituted.replace('layer=~".+"', 'layer=~"(1)"')
            every, chosen = (
                {each["metric"].get("layer") for each in watched.query(asked)} for asked in (query.substituted, expr)
            )
            assert every in ({"0", "1", "2"}, {None}), query  # None where a panel is about all that are chosen
            assert chosen == every & {"1", None}, query


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_every_choice_that_is_offered_changes_every_panel(dashboard: str) -> None:
    for variable in DASHBOARDS[dashboard]["templating"]["list"][1:]:
        unmoved = {q.panel for q in QUERIES if q.dashboard == dashboard and f"${variable['name']}" not in q.expr}
        assert unmoved <= SHOWS_NOTHING_WHEN_ALL_IS_WELL, variable["name"]


def test_with_too_few_tokens_for_a_judgement_no_instance_s_own_is_shown(tmp_path: Path) -> None:
    """An instance speaks from 1,000 tokens, which of many experts leave each too few."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", num_experts=16, experts_per_token=1)
    server = Server(tmp_path / "log", "--checkpoint", checkpoint, "--threads", 1)
    prometheus = None
    try:
        server.wait_until_ready()
        prometheus = Prometheus.in_seconds(tmp_path / "prometheus", f"127.0.0.1:{server.port}").wait_until_ready()
        wait_until(lambda: has_grown(prometheus, "up"))  # what has come before the first look has not grown
        for seed in range(4):
            server.answer("a" * 300, max_new_tokens=20, seed=seed)
        wait_until(lambda: has_grown(prometheus, "moescope_expert_max_load_ratio"))
        wait_until(lambda: has_grown(prometheus, "moescope:expert_mean_tokens:increase5m"))
        for query in (DRIFT, HOTTEST, ENTROPY, IDLE):
            assert not prometheus.query(substituted(query)), query
    finally:
        server.stop()
        if prometheus:
            prometheus.stop()


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_the_variables_offer_what_there_is(watched: Prometheus, dashboard: str) -> None:
    offered = {}
    for variable in DASHBOARDS[dashboard]["templating"]["list"][1:]:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", substituted(variable["query"]["query"]))
        assert query
        offered[variable["name"]] = {each["metric"][query[2]] for each in watched.query(query[1])}
        assert variable["multi"] is variable["includeAll"] is (variable["name"] != "job")
    used = {name for query in QUERIES if query.dashboard == dashboard for name in re.findall(r"\$([a-z]+)", query.expr)}
    values = {"job": {"moescope"}, "instance": {"service:8000"}, "layer": {"0", "1", "2"}}
    assert offered == {name: values[name] for name in used}


def test_every_metric_in_a_panel_or_a_rule_is_told_or_recorded(watched: Prometheus, server: Server) -> None:
    told = set(re.findall(r"^(\w+)(?:\{| )", server.client.get("/metrics").text, re.MULTILINE))
    exprs = [re.sub(r'"[^"]*"', "", expr) for expr in (*(q.expr for q in QUERIES), *(r["expr"] for r in rules()))]
    named = {name for expr in exprs for name in re.findall(r"\b(?:moescope|process)[\w:]*", expr)}
    assert len(named) > 25
    assert named <= told | set(RECORDS)


def test_the_committed_files_are_what_the_script_writes() -> None:
    check = subprocess.run(
        [sys.executable, "-m", "scripts.dashboards", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert (check.stdout, check.stderr, check.returncode) == ("", "", 0)


def test_a_stale_file_is_named_in_one_line(tmp_path: Path) -> None:
    dashboards.write(tmp_path)
    assert dashboards.stale(tmp_path) == []
    (tmp_path / "experts.json").write_text("{}")
    (tmp_path / "overview.json").unlink()
    (tmp_path / "third.json").write_text("{}")
    assert dashboards.stale(tmp_path) == ["experts.json", "overview.json", "third.json"]


def test_the_files_are_valid_for_the_types_of_grafana() -> None:
    register_default_plugins()
    for name, model in DASHBOARDS.items():
        again = json.loads(json.dumps(Dashboard.from_json(model), cls=JSONEncoder))
        assert again["panels"] == model["panels"], name
        assert again["templating"] == model["templating"], name


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_every_panel_says_how_to_read_it_and_knows_its_unit(dashboard: str) -> None:
    for panel in panels(dashboard):
        assert re.fullmatch(r"[A-Z0-9].{30,}[a-z0-9%)]\.", panel["description"]), panel["title"]
        assert panel["type"] in ("heatmap", "stat") or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_do_not_overlap_and_fill_their_rows() -> None:
    for name, model in DASHBOARDS.items():
        taken = [(x, y) for panel in model["panels"] for x, y in cells(panel["gridPos"])]
        assert len(taken) == len(set(taken)), name
        assert all(x < 24 for x, _ in taken), name
        titles = [panel["title"] for panel in model["panels"]]
        assert len(titles) == len(set(titles)), name
        assert [panel["id"] for panel in model["panels"]] == list(range(1, len(titles) + 1))


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return itertools.product(across, down)


def test_the_dashed_line_is_the_alert_s() -> None:
    (alert,) = [rule for rule in rules() if rule.get("alert") == "RoutingDrift"]
    assert f"> {DRIFT_ALERT}" in alert["expr"]


def test_each_dashboard_has_its_own_address_and_leads_to_the_others() -> None:
    assert {name: model["uid"] for name, model in DASHBOARDS.items()} == {
        "experts": "moescope-experts",
        "overview": "moescope-overview",
    }
    for model in DASHBOARDS.values():
        (link,) = model["links"]
        assert (link["type"], link["includeVars"], link["keepTime"]) == ("dashboards", True, True)
        assert link["tags"] == model["tags"]


def test_grafana_finds_its_data_and_dashboards() -> None:
    """What a provisioning file names is what compose mounts and Prometheus does."""
    provisioning = FOLDER.parent / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "moescope.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
    home = compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/experts.json"
