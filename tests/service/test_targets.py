"""A server's entry for Prometheus: there while it serves, gone when it ends, and nobody's after a kill."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from service.targets import TargetsRefused, announce
from tests.service.conftest import StartServer
from tests.service.serving import FOR_EVER, run_to_the_end, wait_until


def targets(folder: Path) -> list[str]:
    return [
        target
        for path in folder.glob("*.json")
        for group in json.loads(path.read_text())
        for target in group["targets"]
    ]


def test_a_server_names_itself_until_it_ends(start_server: StartServer, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    one, two = (start_server("--targets", folder).wait_until_ready() for _ in range(2))
    assert sorted(targets(folder)) == sorted(f"127.0.0.1:{each.port}" for each in (one, two))
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    one.signal(signal.SIGTERM)
    assert one.exit_code() == 0
    assert targets(folder) == [f"127.0.0.1:{two.port}"]


@pytest.mark.parametrize(("when", "code"), [("it loads", 0), ("it is told twice", 143), ("its engine has died", 70)])
def test_it_goes_however_the_process_ends(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, code: int
) -> None:
    folder = tmp_path / "targets"
    monkeypatch.setenv("MOESCOPE_FAULT", "die:100" if code == 70 else "die:1000000")
    server = start_server("--targets", folder, "--grace-s", 1000).wait_until_it_listens()
    wait_until(lambda: server.client.get("/livez").status_code == 200)
    assert len(targets(folder)) == 1
    if when == "it loads":
        assert server.client.get("/readyz").status_code == 503
    else:
        reader = server.wait_until_ready().send(max_new_tokens=FOR_EVER)
    if when == "it is told twice":
        server.wait_for(requests_running=1)
        server.signal(signal.SIGTERM)
        server.wait_for(ready=0)
    if when != "its engine has died":
        server.signal(signal.SIGTERM)
    assert server.exit_code() == code
    if when != "it loads":
        reader.close()
    assert targets(folder) == []


def test_what_a_killed_server_left_goes_with_the_next_and_nobody_else_s(
    start_server: StartServer, tmp_path: Path
) -> None:
    folder = tmp_path / "targets"
    killed, other = (start_server("--targets", folder).wait_until_ready() for _ in range(2))
    others = [f"{name}-1-2" for name in ("another-machine", f"{socket.gethostname()}-1", f"{socket.gethostname()}-b")]
    for name in others:
        (folder / f"{name}.json").write_text(json.dumps([{"targets": [name]}]))
    killed.process.kill()
    killed.process.wait()
    assert len(targets(folder)) == 2 + len(others)
    following = start_server("--targets", folder).wait_until_ready()
    assert set(targets(folder)) == {*others, *(f"127.0.0.1:{each.port}" for each in (other, following))}


def test_what_was_never_finished_goes_too_once_nobody_can_be_writing_it(tmp_path: Path) -> None:
    old, fresh = (tmp_path / f"{socket.gethostname()}-{pid}-8000.new" for pid in (1, 2))
    for path in (old, fresh):
        path.touch()
    os.utime(old, (0, 0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announce(tmp_path, listener)()
    assert set(tmp_path.iterdir()) == {fresh}


@pytest.mark.parametrize(
    ("host", "told"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", socket.gethostname()), ("::1", "[::1]")]
)
def test_the_address_is_one_that_prometheus_can_ask(host: str, told: str, tmp_path: Path) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        withdraw = announce(tmp_path, listener)
        assert targets(tmp_path) == [f"{told}:{listener.getsockname()[1]}"]
        withdraw()
        assert targets(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(TargetsRefused, match=r"^--targets .*file"):
        announce(file, listener)
    run = run_to_the_end("--port", "0", "--checkpoint", checkpoint, "--targets", file)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith("moescope: --targets ")
