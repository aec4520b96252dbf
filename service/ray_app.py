"""``serve run service.ray_app:app``: each replica is create_app with its own engine; docs/scale.md has the rest."""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI
from ray import serve

from service.app import create_app
from service.engine.loading import DEFAULT_SLOTS
from service.engine.thread import EnginePhase, EngineThread
from service.logs import configure_logging
from service.settings import ReplicaSettings
from service.targets import announce
from service.threads import tune_process


@serve.ingress()
class Replica:
    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray starts and ends the app's lifespan, and the engine with it; the metrics have a port of their own."""
        tune_process()
        configure_logging(self._settings.log_level)
        app = create_app(self._settings)
        self._engine: EngineThread = app.state.engine
        listener = socket.create_server((self._settings.host, 0))
        config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False)
        self._own_port = asyncio.create_task(uvicorn.Server(config).serve([listener]))
        self._withdraw = announce(self._settings.targets, listener)
        return app

    async def check_health(self) -> None:
        """Waits for the model to load, and only then does Ray send requests. Raises when it cannot generate."""
        while self._engine.phase in (EnginePhase.LOADING, EnginePhase.WARMING):
            await asyncio.sleep(0.1)
        if self._engine.phase is not EnginePhase.READY:
            raise RuntimeError(self._engine.failure or f"the engine is {self._engine.phase}")

    def __del__(self) -> None:
        self._withdraw()


def app(settings: ReplicaSettings) -> serve.Application:
    """From the environment, and from ``serve run service.ray_app:app threads=1 slots=32``."""
    slots = settings.slots or DEFAULT_SLOTS
    least, most = settings.min_replicas, settings.max_replicas or settings.min_replicas
    return serve.deployment(
        name="moescope",
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": int(settings.device == "cuda")},
        autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": slots},
        max_ongoing_requests=slots + settings.queue,
        max_queued_requests=slots + settings.queue,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        graceful_shutdown_timeout_s=settings.grace_s,
        health_check_period_s=2,
    )(Replica).bind(settings)
