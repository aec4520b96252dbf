"""The manifest is valid, asks for what the service answers, and agrees with the image. It has not met a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.checkpoints import tiny_checkpoint
from tests.deploy.monitoring import COMPOSE, ROOT
from tests.service.serving import Server

MANIFEST = ROOT / "deploy" / "kubernetes" / "moescope.yaml"
PARTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
OF_KEDA = "ScaledObject"


def part(kind: str) -> dict[str, Any]:
    (found,) = [each for each in PARTS if each["kind"] == kind]
    return found


def container() -> dict[str, Any]:
    (only,) = part("Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(namespace: str = "default") -> dict[str, str]:
    """As Kubernetes sets it: a value may name variables that stand before it."""
    told: dict[str, str] = {}
    for each in container()["env"]:
        value = each["value"] if "value" in each else {"metadata.namespace": namespace}[field_of(each)]
        told[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: told.get(name[1], name[0]), value)
    return told


def field_of(variable: dict[str, Any]) -> str:
    return str(variable["valueFrom"]["fieldRef"]["fieldPath"])


def setting(name: str) -> Any:
    return Settings.model_fields[name].default


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On loopback, where a pod's address is nobody's name: probes and scrapes call it by that all the same."""
    folder = tmp_path_factory.mktemp("kubernetes")
    server = Server(folder / "log", "--checkpoint", tiny_checkpoint(folder / "tiny"), "--threads", 1)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@pytest.mark.parametrize("version", ["1.32", kubernetes_validate.latest_version()])
def test_it_is_valid_for_kubernetes(version: str) -> None:
    known = [each for each in PARTS if each["kind"] != OF_KEDA]
    assert [each["kind"] for each in known] == ["Deployment", "Service", "PodDisruptionBudget"]
    for each in known:
        kubernetes_validate.validate(each, version, strict=True)


def test_a_slip_would_be_noticed() -> None:
    slip = part("Deployment")
    slip["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(slip, kubernetes_validate.latest_version(), strict=True)
    del slip["spec"]["template"]["spec"]["containers"][0]["readynessProbe"]


def test_probes_and_scrapes_ask_for_what_the_service_answers(server: Server) -> None:
    (port,) = container()["ports"]
    assert port["containerPort"] == setting("port")
    paths = [container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert {each["port"] for each in paths} == {port["name"]}
    annotations = part("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    for path in (*(each["path"] for each in paths), annotations["prometheus.io/path"]):
        assert server.client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200, path


def test_everything_selects_the_same_pods() -> None:
    labels = part("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selected in (
        part("Deployment")["spec"]["selector"]["matchLabels"],
        part("Service")["spec"]["selector"],
        part("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selected == labels
    assert part("Service")["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]
    assert part(OF_KEDA)["spec"]["scaleTargetRef"] == {"name": part("Deployment")["metadata"]["name"]}


def test_there_is_time_for_the_streams_to_end() -> None:
    pod = part("Deployment")["spec"]["template"]["spec"]
    _, pause = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(pause) + setting("grace_s") + 5


def test_image_user_and_settings_are_those_that_there_are() -> None:
    assert container()["image"] == COMPOSE["services"]["service"]["image"]
    user = part("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert COMPOSE["services"]["service"]["user"] == f"{user}:{user}"
    ours = {name.removeprefix("MOESCOPE_").lower() for name in environment() if name.startswith("MOESCOPE_")}
    assert ours <= set(Settings.model_fields)
    assert environment()["MOESCOPE_THREADS"] == container()["resources"]["limits"]["cpu"]


def test_kubernetes_sets_no_variable_of_ours_by_the_name_of_the_service() -> None:
    """For a service called moescope it would set MOESCOPE_PORT=tcp://10.96.3.7:8000 in every pod, which is no port."""
    assert part("Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_whoever_asks_by_a_name_of_the_service_is_let_in(tmp_path: Path) -> None:
    name, (port,) = part("Service")["metadata"]["name"], part("Service")["spec"]["ports"]
    flags = ("--checkpoint", tiny_checkpoint(tmp_path / "tiny"), "--threads", 1)
    server = Server(tmp_path / "log", *flags, "--allowed-hosts", environment("prod")["MOESCOPE_ALLOWED_HOSTS"])
    try:
        server.wait_until_ready()
        for called in ("", ".prod", ".prod.svc", ".prod.svc.cluster.local"):
            host = f"{name}{called}:{port['port']}"
            assert server.client.get("/info", headers={"Host": host}).status_code == 200, host
        assert server.client.get("/info", headers={"Host": f"{name}.evil.example"}).status_code == 421
    finally:
        server.stop()


def test_it_scales_on_a_metric_that_there_is(server: Server) -> None:
    queries = [each["metadata"]["query"] for each in part(OF_KEDA)["spec"]["triggers"]]
    named = {name for query in queries for name in re.findall(r"moescope_(\w+)", query)}
    assert named == {"requests_running", "requests_queued"}
    assert not any("job=" in query for query in queries), "whose Prometheus scrapes by annotations chooses the job"
    assert all(server.metrics().total(name) == 0 for name in named)
