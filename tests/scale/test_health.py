"""What Ray asks of a replica: it is healthy when it can write, not before, and not after. Ray need not run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.thread import EnginePhase
from service.settings import ReplicaSettings
from tests.scale.cluster import replicas_in

pytestmark = pytest.mark.ray


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # which is the fault
def test_a_replica_is_healthy_while_its_engine_can_write(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (make test-ray does it)")
    from service.ray_app import Replica

    monkeypatch.setenv("MOESCOPE_FAULT", "die:20")
    settings = ReplicaSettings(checkpoint=checkpoint, threads=1, slots=2, targets=tmp_path)

    async def live() -> None:
        replica: Any = object.__new__(Replica)
        await replica.__init__(settings)
        app = await replica.__serve_build_asgi_app__()
        async with app.router.lifespan_context(app), asyncio.timeout(60):
            phases = [app.state.engine.phase]
            await replica.check_health()
            assert [*phases, app.state.engine.phase] == [EnginePhase.LOADING, EnginePhase.READY]
            (own,) = replicas_in(tmp_path)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{own.port}", timeout=60) as client:
                answer = await client.post("/generate", json={"prompt": "", "max_new_tokens": 100})
                assert answer.text.count("event: error") == 1
            with pytest.raises(RuntimeError, match="died"):
                await replica.check_health()
        replica._withdraw()
        assert replicas_in(tmp_path) == []

    asyncio.run(live())


def test_the_limits_of_a_deployment_are_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (make test-ray does it)")
    from service.ray_app import app

    monkeypatch.setenv("MOESCOPE_QUEUE", "7")
    settings = ReplicaSettings(slots=5, threads=3, grace_s=11, min_replicas=2, max_replicas=4)
    deployment = app(settings)._bound_deployment
    assert deployment.max_ongoing_requests == 5 + 7
    assert deployment.ray_actor_options["num_cpus"] == 3
    config = deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == 11
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 5)
    assert app(ReplicaSettings())._bound_deployment._deployment_config.autoscaling_config.max_replicas == 1
