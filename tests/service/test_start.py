"""What keeps the service from starting is one line that says what to do; what takes long is done while it answers."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from model.machine import usable_cpus
from tests.evidence import At, Evidence
from tests.service.conftest import StartServer
from tests.service.serving import ROOT, run_to_the_end

SHIPPED = ROOT / "checkpoints" / "shakespeare"


def damaged(checkpoint: Path, folder: Path, name: str, how: str) -> Path:
    shutil.copytree(checkpoint, folder)
    file = folder / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return folder


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("manifest.json", "missing"),
        ("manifest.json", "truncated"),
        ("model.safetensors", "missing"),
        ("model.safetensors", "truncated"),
        ("model.safetensors", "altered"),
        ("tokenizer.json", "altered"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line_that_names_the_file(
    checkpoint: Path, tmp_path: Path, name: str, how: str
) -> None:
    folder = damaged(checkpoint, tmp_path / "bad", name, how)
    refused = run_to_the_end("--checkpoint", folder, "--port", 0)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert str(folder / name) in line


def test_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    refused = run_to_the_end("--checkpoint", tmp_path / "nowhere", "--port", 0)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert str(tmp_path / "nowhere") in line


def test_a_busy_port_is_refused_before_anything_else_in_a_line_that_offers_another(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run_to_the_end("--checkpoint", tmp_path / "nowhere", "--port", port)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert f"--port {port + 1}" in line


@pytest.mark.parametrize("host", ["192.0.2.1", ".", "a..b", "x" * 300])
def test_an_address_of_another_machine_or_none_at_all_is_refused_in_one_line(host: str) -> None:
    refused = run_to_the_end("--host", host)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 1
    assert f"--host {host}" in line


def test_what_only_loading_finds_out_ends_the_process_with_one_line_that_says_what_to_change(
    start_server: StartServer,
) -> None:
    server = start_server("--kv-memory-mib", 1, "--slots", 4096)
    assert server.exit_code() == 1
    (line,) = server.log.splitlines()
    assert line.startswith("moescope: ")
    assert "--kv-memory-mib" in line
    assert "Traceback" not in server.log


def test_it_is_ready_two_seconds_after_its_start_but_for_what_importing_torch_takes(
    start_server: StartServer, at: At, evidence: Evidence
) -> None:
    if at.full_size:
        start_server("--checkpoint", SHIPPED).wait_until_ready().stop()  # all is compiled and in the cache
    importing, starting, used = [], [], []
    for _ in range(at(1, 7)):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        importing.append(time.monotonic() - began)
        began = time.monotonic()
        server = start_server("--checkpoint", SHIPPED, "--threads", usable_cpus()).wait_until_ready()
        starting.append(time.monotonic() - began)
        assert server.client.get("/readyz").status_code == 200
        used.append(server.cpu_seconds)
        server.stop()
    evidence("seconds from start to ready, median", median(starting))
    evidence("of which importing torch takes", median(importing))
    evidence("CPU seconds until ready, torch and all", median(used))
    if at.full_size:  # how long it takes says nothing on a busy machine
        assert median(starting) - median(importing) < 2


def test_it_answers_while_it_loads_and_ctrl_c_then_ends_it_without_an_error(start_server: StartServer) -> None:
    server = start_server().wait_until_it_listens()
    readiness = server.client.get("/readyz")
    assert readiness.status_code == 503
    assert readiness.headers["retry-after"]
    assert readiness.json()["phase"] in ("loading", "warming")
    assert readiness.json()["error"]["code"] in ("loading", "warming")
    assert server.client.get("/livez").status_code == 200
    assert server.client.get("/info").json()["device"] is None
    assert server.metrics().total("ready") == 0
    assert server.metrics().total("figures_age_seconds") == 0
    refused = server.generate()
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
    assert server.metrics().total("requests_total", outcome="rejected_unready") == 1
    server.signal(signal.SIGINT)
    assert server.exit_code() == 0
    assert '"level": "error"' not in server.log
    assert "Traceback" not in server.log
