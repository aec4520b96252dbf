"""What docker-compose.yml starts: for this machine only, with no rights to spare, one after the other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GPU = ("docker-compose.yml", "docker-compose.gpu.yml")
ALL = ("service", "prometheus", "grafana", "traffic")

Services = dict[str, dict[str, Any]]


def rendered(*files: str, profile: str = "demo", **environment: str) -> Services:
    """The services as Compose itself understands the files."""
    compose = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if compose is None:
        pytest.skip("no docker-compose on this machine; make lint installs one")
    named = [argument for name in files or ("docker-compose.yml",) for argument in ("-f", str(ROOT / name))]
    command = [compose, *named, "--profile", profile, "config", "--format", "json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    services: Services = json.loads(answer.stdout)["services"]
    return services


@pytest.fixture(scope="module")
def services() -> Services:
    return rendered()


def test_it_starts_the_service_and_what_watches_it_and_the_client_only_when_asked(services: Services) -> None:
    assert set(services) == set(ALL)
    assert set(rendered(profile="")) == set(ALL) - {"traffic"}


def test_ports_are_published_on_this_machine_only(services: Services) -> None:
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert all(port["host_ip"] == "127.0.0.1" for ports in published.values() for port in ports)
    numbers = {name: [(port["published"], port["target"]) for port in ports] for name, ports in published.items()}
    assert numbers == {
        "service": [("8000", 8000)],
        "prometheus": [("9090", 9090)],
        "grafana": [("3000", 3000)],
        "traffic": [],
    }


def test_every_port_can_be_another() -> None:
    services = rendered(MOESCOPE_PORT="1", PROMETHEUS_PORT="2", GRAFANA_PORT="3")
    assert [services[name]["ports"][0]["published"] for name in ("service", "prometheus", "grafana")] == ["1", "2", "3"]


@pytest.mark.parametrize("name", ALL)
def test_none_has_more_rights_than_it_needs(services: Services, name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), "a user that is not root, by number"


@pytest.mark.parametrize("name", ALL)
def test_data_lie_in_named_volumes_and_files_of_ours_are_read_only(services: Services, name: str) -> None:
    for volume in services[name].get("volumes", []):
        if volume["type"] == "bind":
            assert volume["read_only"] is True
            assert Path(volume["source"]).exists(), volume["source"]
        else:
            assert (volume["type"], volume["source"]) == ("volume", name)


def test_images_are_of_one_version_each(services: Services) -> None:
    tags = {name: service["image"].rpartition(":")[2] for name, service in services.items()}
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", tag) for tag in tags.values()), tags
    assert services["traffic"]["image"] == services["service"]["image"]
    assert services["traffic"]["pull_policy"] == "never"


def test_each_starts_when_what_it_needs_is_healthy(services: Services) -> None:
    needs = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert {name: list(needed) for name, needed in needs.items()} == {
        "service": [],
        "prometheus": ["service"],
        "grafana": ["prometheus"],
        "traffic": ["service"],
    }
    assert all(each["condition"] == "service_healthy" for needed in needs.values() for each in needed.values())
    assert all(services[needed]["healthcheck"]["test"] for needs_of in needs.values() for needed in needs_of)


def test_the_client_finds_its_script_and_its_server_allows_the_name(services: Services) -> None:
    _, script, _, url = services["traffic"]["command"]
    (volume,) = services["traffic"]["volumes"]
    assert volume["target"] == script
    assert url == f"http://{services['service']['environment']['MOESCOPE_ALLOWED_HOSTS']}:8000"


def test_a_key_closes_the_service_to_all_but_the_client_and_prometheus() -> None:
    services = rendered(MOESCOPE_API_KEY="secret")
    assert services["service"]["environment"]["MOESCOPE_API_KEY"] == "secret"
    assert services["service"]["environment"]["MOESCOPE_OPEN_METRICS"] == "true"
    assert services["traffic"]["environment"]["MOESCOPE_API_KEY"] == "secret"


def test_nobody_can_log_in_to_grafana_and_everybody_here_can_look(services: Services) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_it_waits_longer_than_the_service_drains(services: Services) -> None:
    assert services["service"]["stop_grace_period"] == "40s"  # --grace-s is 30


def test_the_gpu_comes_with_the_pytorch_that_can_use_it() -> None:
    services = rendered(*GPU)
    service = services["service"]
    assert service["build"]["args"]["TORCH"] == "cuda"
    assert service["environment"]["MOESCOPE_DEVICE"] == "cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert service["image"] == services["traffic"]["image"] != rendered()["service"]["image"]
