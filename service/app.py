"""create_app(settings): the one place that builds the parts and wires them. Knows what they are, not what they do."""

from __future__ import annotations

import asyncio
import logging
import os
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import prometheus_client
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from model.checkpoint import Manifest
from service.admission import Admission
from service.card import ModelCard
from service.docs import DOCS_PATHS, add_docs, require_key
from service.engine.loading import EngineOptions, build_engine
from service.engine.thread import EngineThread
from service.errors import ApiError, answer_api_error, answer_http_exception
from service.exchange import Exchange, keep_snapshots, nudge, watch
from service.expert_window import ExpertWindow
from service.guard import METRICS_PATH, PROBES, CrossOrigin, Guard, Hosts, split_list
from service.logs import log_event
from service.metrics import MAX_EXPERT_SERIES, EngineCollector, Metrics, expert_detail, expert_series
from service.middleware import RequestScope
from service.openai import OpenAIRoutes
from service.reference import whole_numbers
from service.routes import Routes
from service.schemas import Limits
from service.settings import Settings

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "service" / "static"


def create_app(settings: Settings) -> FastAPI:
    """Checks the checkpoint and builds everything; the engine starts with the app. Raises CheckpointError.

    ``app.state.engine`` is the EngineThread, for whoever has to tell it to drain.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    card = ModelCard.read(settings.checkpoint)
    limits = Limits(settings.max_new_tokens, settings.request_timeout_s, card.config)
    prometheus_client.disable_created_metrics()  # a second series for every counter, which nobody has asked for
    metrics = Metrics()
    exchange = Exchange(metrics)
    options = _engine_options(settings, card.manifest)
    build = partial(build_engine, options)  # what takes seconds happens on the engine's thread
    engine = EngineThread(
        build,
        exchange.publish,
        max_queued=settings.queue,
        queue_timeout_s=settings.queue_timeout_s,
        grace_s=settings.grace_s,
    )
    detail = expert_detail(settings.expert_metrics, card.config)
    if settings.expert_metrics == "auto" and detail != "full":
        series = expert_series(card.config)
        log_event("expert_metrics_by_layer", logging.WARNING, series=series, at_most=MAX_EXPERT_SERIES)
    build_labels = {"version": version, "checkpoint": card.fingerprint}
    baseline = None if card.routing_baseline is None else np.array(card.routing_baseline)
    window = ExpertWindow(card.config, baseline)
    collector = EngineCollector(engine, card.config, detail, build_labels, window, settings.expert_window_s)
    metrics.registry.register(collector)
    admission = Admission(card, limits, engine, exchange, metrics, settings.queue_timeout_s)
    app = FastAPI(
        title="Moescope",
        version=version,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect's address would be made of the client's Host header
        lifespan=_lifespan(engine, exchange, window, settings.stuck_after_s),
        exception_handlers={ApiError: answer_api_error, HTTPException: answer_http_exception},
    )
    app.include_router(Routes(settings, card, engine, admission, metrics, window, version).router())
    app.include_router(OpenAIRoutes(card, admission).router())
    add_docs(app, PAGE / "docs.html")
    app.frontend("/", directory=PAGE, fallback=None)
    app.openapi_schema = whole_numbers(app.openapi())  # kept until another route is added
    _add_safety(app, settings, metrics)
    app.state.engine = engine
    return app


def _add_safety(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """What is added last sees a request first: even a bug's answer may be read by a page that may ask."""
    open_paths = PROBES | DOCS_PATHS | _page_paths() | ({METRICS_PATH} if settings.open_metrics else set())
    origins = split_list(settings.allow_origin)
    app.add_middleware(
        Guard,
        hosts=Hosts(settings.host, split_list(settings.allowed_hosts)),
        key=settings.api_key,
        open_paths=open_paths,
        has_origins=bool(origins),
        metrics=metrics,
    )
    app.add_middleware(RequestScope)
    if origins:
        app.add_middleware(CrossOrigin, origins=origins)
    if settings.api_key:
        require_key(app.openapi(), open_paths)


def _page_paths() -> frozenset[str]:
    return frozenset({"/", *(f"/{file.relative_to(PAGE).as_posix()}" for file in PAGE.rglob("*"))})


def _engine_options(settings: Settings, manifest: Manifest) -> EngineOptions:
    return EngineOptions(
        checkpoint=manifest.folder,
        fingerprint=manifest.fingerprint,
        device=settings.device,
        threads=settings.threads,
        slots=settings.slots,
        kv_memory_mib=settings.kv_memory_mib,
        prefill_chunk=settings.prefill_chunk,
        runner=settings.runner,
        fault=os.environ.get("MOESCOPE_FAULT"),  # for tests of failures on a real process
    )


def _lifespan(
    engine: EngineThread, exchange: Exchange, window: ExpertWindow, stuck_after_s: float
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        exchange.attach(asyncio.get_running_loop())
        engine.start()
        watching = asyncio.create_task(watch(engine, exchange, stuck_after_s))
        others = [asyncio.create_task(keep_snapshots(engine, window)), asyncio.create_task(nudge(exchange))]
        yield
        engine.drain()  # a second time, as a rule; the server may also stop for a reason of its own
        await watching  # which ends with the engine, or without it
        for task in others:
            task.cancel()

    return lifespan
