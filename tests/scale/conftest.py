"""One cluster of two replicas for all tests, and the same service as one process to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import tiny_checkpoint
from tests.scale.cluster import Cluster
from tests.service.serving import FOR_EVER, Server

SLOTS, QUEUE = 48, 8
RUNNER = "torch"  # the native step has written so small a model's texts before anybody could kill a replica


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    targets = tmp_path_factory.mktemp("prometheus") / "targets"
    settings: dict[str, object] = {
        "runner": RUNNER,
        "threads": 1,
        "slots": SLOTS,
        "queue": QUEUE,
        "max_new_tokens": FOR_EVER,
        "min_replicas": 2,
    }
    settings["queue_timeout_s"] = 3600  # nobody is refused because others write for ever
    cluster = Cluster(targets, checkpoint=str(checkpoint), **settings)
    try:
        yield cluster.wait_for_replicas(2)
        cluster.interrupt()
        assert not cluster.replicas, "an orderly end leaves Prometheus nobody to look for"
    finally:
        cluster.stop()


@pytest.fixture
def replicas(cluster: Cluster) -> Cluster:
    """The cluster with both replicas there, whatever the test before did to them."""
    return cluster.wait_for_replicas(2)


@pytest.fixture(scope="session")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("plain") / "log"
    flags = (
        "--checkpoint",
        checkpoint,
        "--runner",
        RUNNER,
        "--threads",
        1,
        "--slots",
        SLOTS,
        "--max-new-tokens",
        FOR_EVER,
    )
    server = Server(log, *flags)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()
