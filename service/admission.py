"""From a request's bytes to a sequence in the engine, or to the reason why not. Knows contract and vocabulary."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from fastapi import Request

from model.tokenizer import Tokenizer, UnknownCharacters
from service.body import read_json_object
from service.card import ModelCard
from service.engine.sequence import SamplingParams, Sequence
from service.engine.thread import EngineThread, NotServing, QueueFull
from service.errors import ApiError
from service.exchange import Exchange, TokenStream
from service.metrics import Metrics
from service.schemas import MAX_PROMPT_CHARACTERS, AnyTextBody, GenerateBody, Limits, TextBody
from service.streaming import Generation

START_OF_TEXT = "\n"
MAX_UNREAD_TOKENS = 1024


@dataclass(frozen=True)
class Admitted(Generic[AnyTextBody]):
    """A request that the engine has taken. Whoever holds it gives its stream back."""

    body: AnyTextBody
    generation: Generation
    stream: TokenStream


class Admission:
    """The one way in, and for each stream that got in the one way out."""

    def __init__(
        self,
        card: ModelCard,
        limits: Limits,
        engine: EngineThread,
        exchange: Exchange,
        metrics: Metrics,
        queue_timeout_s: float,
    ) -> None:
        self.limits = limits
        self._card = card
        self._engine = engine
        self._exchange = exchange
        self._metrics = metrics
        self._queue_timeout_s = queue_timeout_s

    async def admit(
        self, request: Request, parse: Callable[[dict[str, Any], Limits], AnyTextBody]
    ) -> Admitted[AnyTextBody]:
        """Raises ApiError, also what ``parse`` raises; every request is counted here or at its end, once."""
        body: AnyTextBody | None = None
        try:
            body = parse(await read_json_object(request), self.limits)
            last_index = self._last_index(request.headers.get("last-event-id"), body)
            return self._submit(body, request.state.request_id, last_index)
        except ApiError as error:
            self._metrics.record_refusal(error.kind.type, stream=body is not None and body.stream)
            raise

    def give_back(self, stream: TokenStream) -> None:
        """Idempotent; a sequence that has ended needs nothing."""
        if not stream.has_ended:
            self._engine.cancel(stream.sequence)

    def _last_index(self, event_id: str | None, body: TextBody) -> int:
        """The index of the last token that the client has, or -1. Raises ApiError when no stream here goes on so."""
        if event_id is None or not isinstance(body, GenerateBody):  # others have no ids
            return -1
        phase = self._engine.phase  # before the other, which is there once this is ready
        if self._engine.info is None:
            raise ApiError(phase)
        found = re.fullmatch(r"([0-9a-f]{12}):(-1|[0-9]{1,9})", event_id)
        if found is None or not body.stream or int(found[2]) >= body.max_new_tokens:
            raise ApiError("bad_event_id", param="Last-Event-ID")
        if body.seed is None:
            raise ApiError("seed_needed", param="seed")
        if found[1] != self._engine.info.fingerprint:
            raise ApiError("other_fingerprint", param="Last-Event-ID")
        return int(found[2])

    def _submit(self, body: AnyTextBody, request_id: str, last_index: int) -> Admitted[AnyTextBody]:
        prompt_ids, prompt_used = self._spell(body)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        texts, info, speller = self._card.tokenizer.tokens, self._engine.info, self._card.tokenizer.speller()
        sequence = Sequence(
            prompt_ids,
            _sampling(body, seed),
            body.return_routed_experts,
            deadline_s=self.limits.timeout_s if body.timeout_s is None else body.timeout_s,
            queue_deadline_s=self._queue_timeout_s,
            num_logprobs=body.logprobs,
            max_unread=MAX_UNREAD_TOKENS,
            spell=speller,
            spell_rest=speller.finish,
        )
        generation = Generation(
            request_id,
            self._card.manifest.name,
            seed,
            body.params(),
            len(prompt_ids),
            prompt_used,
            texts,
            info.fingerprint if info else "",
            last_index,
        )
        try:
            stream = self._exchange.open(self._engine, sequence, request_id, streams=body.stream)
        except QueueFull as full:
            raise ApiError("queue_full", retry_after_s=full.retry_after_s) from None
        except NotServing as refusal:
            raise ApiError(refusal.phase) from None
        return Admitted(body, generation, stream)

    def _spell(self, body: TextBody) -> tuple[tuple[int, ...], str | None]:
        if isinstance(body.prompt, list) and body.prompt:
            return tuple(body.prompt), None
        text = body.prompt if isinstance(body.prompt, str) else ""
        return spell(self._card.tokenizer, text, body.unknown_characters, when_empty=START_OF_TEXT)


def spell(
    tokenizer: Tokenizer, prompt: str, unknown_characters: str, *, when_empty: str = ""
) -> tuple[tuple[int, ...], str | None]:
    """A text's ids and, if it was to be folded, the text they spell. Raises ApiError."""
    folds = unknown_characters == "fold"
    text = (tokenizer.fold(prompt) if folds else prompt) or when_empty
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ApiError("prompt_too_long", "prompt is too long once it is folded", param="prompt")
    try:
        return tuple(tokenizer.encode(text)), text if folds else None
    except UnknownCharacters as error:
        raise ApiError("unknown_characters", str(error), param="prompt") from None


async def abandon_on_disconnect(request: Request, stream: TokenStream) -> None:
    """Abandons the stream when the client goes away. The body has to be read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.abandon()


def _sampling(body: TextBody, seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=body.max_new_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        seed=seed,
        stop=tuple(body.stop),
        disabled_experts=tuple(sorted({(layer, expert) for layer, expert in body.disabled_experts})),
    )
