"""The routes, one sentence each. Their words: schemas, answers; their streams: streaming; their refusals: errors."""

from __future__ import annotations

import asyncio
import platform
import re
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.admission import Admission, Admitted, abandon_on_disconnect, spell
from service.answers import (
    BatchInvariance,
    DefaultsInfo,
    DetokenizeAnswer,
    Experts,
    GenerateAnswer,
    Health,
    Info,
    LimitsInfo,
    NotReady,
    TokenizeAnswer,
    Versions,
)
from service.body import read_json_object
from service.card import ModelCard
from service.engine.thread import EnginePhase, EngineThread
from service.errors import ApiError
from service.exchange import Abandoned, refresh_figures
from service.expert_report import ExpertReport
from service.expert_window import LONGEST_S, ExpertWindow
from service.metrics import Metrics, expert_detail
from service.reference import EVENTS, GENERATING, LAST_EVENT_ID, TEXT, WINDOW, answers, describe_body
from service.schemas import MAX_PROMPT_CHARACTERS, AnyTextBody, DetokenizeBody, GenerateBody, TokenizeBody, parse_body
from service.settings import Settings
from service.streaming import Dialect, EventStream, Transcript, collect, raise_if_refused


async def respond(
    request: Request, admission: Admission, admitted: Admitted[AnyTextBody], dialect: Dialect
) -> Response:
    """Tell what the engine writes as it comes, or all at the end. What was admitted is given back in any case."""
    stream = admitted.stream
    watcher = asyncio.create_task(abandon_on_disconnect(request, stream))

    def give_back() -> None:
        watcher.cancel()
        admission.give_back(stream)

    try:
        first = await stream.next_events()
        raise_if_refused(first[0])
        if admitted.body.stream:
            return EventStream(dialect, stream, first, give_back)
        answer = JSONResponse(await collect(dialect, stream, first))
    except Abandoned:
        give_back()
        raise ApiError("client_closed") from None
    except BaseException:
        give_back()
        raise
    give_back()
    return answer


def _window_of(request: Request) -> int | None:
    """The seconds that are asked for, once and as a whole number. Raises ApiError out_of_range."""
    asked = request.query_params.getlist("window")
    if not asked:
        return None
    seconds = int(asked[0]) if re.fullmatch("[0-9]{1,3}", asked[0]) else 0
    if len(asked) > 1 or not 1 <= seconds <= LONGEST_S:
        reason = f"window must be a whole number of seconds from 1 to {LONGEST_S}"
        raise ApiError("out_of_range", reason, param="window")
    return seconds


class Routes:
    """The handlers with what they need; ``router()`` puts them at their addresses."""

    def __init__(
        self,
        settings: Settings,
        card: ModelCard,
        engine: EngineThread,
        admission: Admission,
        metrics: Metrics,
        window: ExpertWindow,
        version: str,
    ) -> None:
        self._settings = settings
        self._card = card
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._window = window
        self._version = version

    def router(self) -> APIRouter:
        router = APIRouter()
        limits = self._admission.limits
        router.add_api_route(
            "/generate",
            self.generate,
            methods=["POST"],
            response_model=GenerateAnswer,
            responses=answers(*GENERATING, content={"text/event-stream": EVENTS}),
            openapi_extra={
                "parameters": [LAST_EVENT_ID],
                **describe_body(GenerateBody, limits, prompt="ROMEO:", max_new_tokens=64),
            },
        )
        reading = answers(401, 413, 415, 421, 422)
        router.add_api_route(
            "/tokenize",
            self.tokenize,
            methods=["POST"],
            response_model_exclude_none=True,
            responses=reading,
            openapi_extra=describe_body(TokenizeBody, limits, prompt="ROMEO:"),
        )
        router.add_api_route(
            "/detokenize",
            self.detokenize,
            methods=["POST"],
            responses=reading,
            openapi_extra=describe_body(DetokenizeBody, limits, tokens=[0, 1, 2]),
        )
        router.add_api_route("/info", self.info, responses=answers(401, 421))
        router.add_api_route(
            "/experts",
            self.experts,
            responses=answers(401, 421, 422),
            openapi_extra={"parameters": [WINDOW]},
        )
        router.add_api_route(
            "/experts/report",
            self.expert_report,
            responses=answers(401, 421),
        )
        probe = answers(503, shape=NotReady)
        router.add_api_route("/livez", self.livez, response_model=Health, responses=probe)
        router.add_api_route("/readyz", self.readyz, response_model=Health, responses=probe)
        formats = {"text/plain": TEXT, "application/openmetrics-text": TEXT}
        router.add_api_route("/metrics", self.metrics, response_class=Response, responses=answers(401, content=formats))
        return router

    async def generate(self, request: Request) -> Response:
        """Continue a prompt: server-sent events as the tokens come, or one JSON body with ``"stream": false``."""
        admitted = await self._admission.admit(request, partial(parse_body, GenerateBody))
        transcript = Transcript(admitted.generation, with_tokens=admitted.body.tells_tokens)
        return await respond(request, self._admission, admitted, transcript)

    async def tokenize(self, request: Request) -> TokenizeAnswer:
        """The tokens that spell a text; answers while the model is still being loaded."""
        body = parse_body(TokenizeBody, await read_json_object(request), self._admission.limits)
        ids, used = spell(self._card.tokenizer, body.prompt, body.unknown_characters)
        return TokenizeAnswer(count=len(ids), tokens=list(ids), prompt_used=used)

    async def detokenize(self, request: Request) -> DetokenizeAnswer:
        """The text that tokens spell; answers while the model is still being loaded."""
        body = parse_body(DetokenizeBody, await read_json_object(request), self._admission.limits)
        return DetokenizeAnswer(prompt=self._card.tokenizer.decode(body.tokens))

    async def info(self) -> Info:
        """What is served, where, and within which limits."""
        limits, engine = self._admission.limits, self._engine.info
        return Info(
            model=self._card.describe(),
            vocabulary=self._card.tokenizer.tokens,
            limits=LimitsInfo(
                prompt_characters=MAX_PROMPT_CHARACTERS,
                max_new_tokens=limits.max_new_tokens,
                timeout_s=limits.timeout_s,
            ),
            defaults=DefaultsInfo.model_validate(limits.defaults()),
            phase=self._engine.phase,
            device=engine and engine.device,
            threads=self._settings.threads,
            runner=engine and engine.runner,
            slots=engine.num_slots if engine else self._settings.slots,
            batch_invariance=engine
            and BatchInvariance(holds=engine.row_multiple is not None, row_multiple=engine.row_multiple),
            fingerprint=engine and engine.fingerprint,
            checkpoint=self._card.fingerprint,
            expert_metrics=expert_detail(self._settings.expert_metrics, self._card.config),
            versions=Versions(
                moescope=self._version, torch=engine and engine.torch_version, python=platform.python_version()
            ),
        )

    async def experts(self, request: Request) -> Experts:
        """What the experts did in the last ``window`` seconds, or since the start; nothing yet while loading."""
        seconds = _window_of(request)
        await refresh_figures(self._engine)
        load = self._window.load(self._engine.last_figures, seconds)
        return Experts.of(load, self._card.config.experts_per_token, self._window.baseline)

    async def expert_report(self) -> ExpertReport:
        """What each expert likes and what silencing it costs, as the checkpoint's own report has it."""
        return self._card.expert_report

    async def livez(self, request: Request) -> Response:
        """200 while the process does its work; 503 once only a restart helps."""
        return self._health(request, good=frozenset(EnginePhase) - {EnginePhase.FAILED})

    async def readyz(self, request: Request) -> Response:
        """200 while text can be generated."""
        return self._health(request, good=frozenset({EnginePhase.READY}))

    def _health(self, request: Request, *, good: frozenset[EnginePhase]) -> JSONResponse:
        phase = self._engine.phase  # read once: it changes on another thread
        health = Health(phase=phase, elapsed_s=round(self._engine.phase_elapsed_s, 3)).model_dump()
        return JSONResponse(health) if phase in good else ApiError(phase).response(request.state.request_id, **health)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics; while loading with zeros for what has not happened yet."""
        await refresh_figures(self._engine)
        content, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})
