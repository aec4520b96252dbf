"""The dialect that OpenAI's clients speak: its names, defaults and chunks, for the same text on the same road.

Knows the wire's words only. Ranges, queue, deadlines and refusals are those of /generate.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.admission import Admission
from service.body import MAX_BODY_BYTES
from service.card import ModelCard
from service.engine.sequence import DrawnToken, Ended, Event, FinishReason
from service.errors import ApiError
from service.reference import CHUNKS, GENERATING, answers, describe_body
from service.routes import respond
from service.schemas import Limits, StopString, Text, TextBody, TokenIds, parse_body
from service.streaming import Generation, data_event, encode_json, error_of, weights_of

DEFAULT_TOKENS: Final = 16
DONE: Final = b"data: [DONE]\n\n"
# There is no word for a deadline, and a client may check the word: a text that was cut off is what "length" comes
# nearest to, and end_reason says what it was.
_FINISH_REASON: Final = {FinishReason.EOS: "stop", FinishReason.TIMEOUT: "length"}


def _the_only_one(value: object) -> object:
    """OpenAI takes a list of prompts as well; a list of one is as good as the one."""
    if not (isinstance(value, list) and value and isinstance(value[0], str | list)):
        return value
    if len(value) > 1:
        raise PydanticCustomError("out_of_range", "must be one prompt per request")
    return value[0]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _neutral(value: Any) -> Any:
    return Field(value, json_schema_extra={"const": value}, description="only this value is implemented")


# Whatever is longer has not got this far; without a limit pydantic would not see half a surrogate pair.
_AnyString = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
_One = Field(min_length=1, max_length=1)
_Stops = Annotated[list[StopString], Field(max_length=4)]
Prompt = Annotated[
    Annotated[Text, Tag("text")] | Annotated[TokenIds, Tag("ids")],
    Discriminator(lambda value: "ids" if isinstance(value, list) else "text"),
    BeforeValidator(
        _the_only_one,
        json_schema_input_type=Text | TokenIds | Annotated[list[Text], _One] | Annotated[list[TokenIds], _One],
    ),
]


class CompletionBody(TextBody):
    """What to complete, in OpenAI's words, and in ours what OpenAI has no word for."""

    prompt: Prompt = Field(description="text or token ids to continue; empty starts from a newline")
    max_new_tokens: int = Field(DEFAULT_TOKENS, ge=1, alias="max_tokens", description="most tokens to draw")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy; otherwise 0.01 to 2")
    stop: Annotated[_Stops, BeforeValidator(_listed, json_schema_input_type=StopString | _Stops)] = Field(
        [], description="the text ends before the first of these strings, which is not part of it"
    )
    stream: bool = Field(False, description="chunks as server-sent events, or one JSON body at the end")
    model: _AnyString = Field(description="the name of the model served, as GET /v1/models tells it")
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = Field(
        {},
        description="include_usage: a last chunk tells the usage; include_obfuscation: only false is implemented",
        json_schema_extra={"properties": {"include_obfuscation": {"enum": [False, None]}}},
    )
    n: int = _neutral(1)
    best_of: int = _neutral(1)
    presence_penalty: float = _neutral(0)
    frequency_penalty: float = _neutral(0)
    logit_bias: dict[str, float] = _neutral({})
    echo: bool = _neutral(False)
    suffix: str = _neutral("")
    user: _AnyString | None = Field(None, description="has no effect")

    @field_validator("n", "best_of", "presence_penalty", "frequency_penalty", "logit_bias", "echo", "suffix")
    @classmethod
    def _is_neutral(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        neutral = cls.model_fields[info.field_name].default
        if value != neutral:
            told = {"neutral": '""' if neutral == "" else str(neutral).lower()}
            raise PydanticCustomError("unsupported_value", "is implemented at its neutral value only: {neutral}", told)
        return value

    @field_validator("stream_options")
    @classmethod
    def _hides_nothing(cls, value: dict[str, bool | None]) -> dict[str, bool | None]:
        if value.get("include_obfuscation"):
            raise PydanticCustomError("unsupported_value", "has include_obfuscation at its neutral value only: false")
        return value

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options.get("include_usage"))


def parse_completion(served: str, raw: dict[str, Any], limits: Limits) -> CompletionBody:
    """Raises ApiError, also for a model that is not the one served."""
    body = parse_body(CompletionBody, raw, limits)
    if body.model != served:
        raise ApiError("model_not_found", param="model")
    return body


class CompletionLogprobs(BaseModel):
    """One entry per token. top_logprobs has the drawn token too, text_offset counts from the start of this answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """end_reason is the word of /generate: a timeout is told here, and is a "length" to OpenAI's clients.

    routed_experts and expert_weights are [token][layer][experts_per_token], there when asked for; in a stream each
    chunk has those of its own token.
    """

    index: Literal[0]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    end_reason: Literal["stop", "length", "eos", "timeout"] | None
    routed_experts: list[list[list[int]]] | None = None
    expert_weights: list[list[list[float]]] | None = None


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(BaseModel):
    """The answer to ``"stream": false``, and each chunk of a stream: the last but for usage has the finish_reason."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int = Field(description="the same body with this seed gives the same text")
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    prompt_used: str | None = Field(None, description="what was read, if unknown characters were to be folded")


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when its files were written here, in seconds since 1970")
    owned_by: Literal["moescope"] = "moescope"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Completion:
    """One answer in OpenAI's words, whole or in chunks."""

    def __init__(self, generation: Generation, body: CompletionBody) -> None:
        self._generation = generation
        self._body = body
        self._length = 0
        self._head = {
            "id": f"cmpl-{generation.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generation.model,
            "system_fingerprint": generation.fingerprint,
            "seed": generation.seed,
        }
        self._around_text = None if body.tells_tokens else self._cut_a_chunk()

    def start_event(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        if isinstance(event, DrawnToken):
            if self._around_text:
                return encode_json(event.text).encode().join(self._around_text)
            return data_event(self._chunk([self._choice([event])]))
        if (error := error_of(event)) is not None:
            return data_event({"error": error.describe(self._generation.id)})
        last = data_event({**self._chunk([self._choice([], event)]), **self._folded()})
        usage = data_event({**self._head, "choices": [], "usage": _usage(event)}) if self._body.includes_usage else b""
        return last + usage + DONE

    def answer(self, drawn: list[DrawnToken], ended: Ended) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(drawn, ended)], "usage": _usage(ended), **self._folded()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **({"usage": None} if self._body.includes_usage else {})}

    def _cut_a_chunk(self) -> list[bytes]:
        """What stands before and after the text: between chunks nothing else changes. 0.5 instead of 10 us a token."""
        no_text = "\0"  # which no name has
        return data_event(self._chunk([self._choice([DrawnToken(0, 0, no_text)])])).split(encode_json(no_text).encode())

    def _folded(self) -> dict[str, str]:
        used = self._generation.prompt_used
        return {} if used is None else {"prompt_used": used}

    def _choice(self, drawn: list[DrawnToken], ended: Ended | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": "".join(token.text for token in drawn),
            "logprobs": self._logprobs(drawn) if self._body.logprobs is not None and drawn else None,
            "finish_reason": ended and _FINISH_REASON.get(ended.reason, ended.reason),
            "end_reason": ended and ended.reason,
        }
        if self._body.return_routed_experts:
            choice["routed_experts"] = [token.routed_experts for token in drawn]
            choice["expert_weights"] = [weights_of(token) for token in drawn]
        return choice

    def _logprobs(self, drawn: list[DrawnToken]) -> dict[str, list[Any]]:
        offsets = []
        for token in drawn:
            offsets.append(self._length)
            self._length += len(token.text)
        return {
            "tokens": [token.text for token in drawn],
            "token_logprobs": [token.logprob for token in drawn],
            "top_logprobs": [self._likeliest(token) for token in drawn],
            "text_offset": offsets,
        }

    def _likeliest(self, token: DrawnToken) -> dict[str, float | None]:
        texts = self._generation.token_texts
        likeliest = {texts[token_id]: logprob for token_id, logprob in token.top_logprobs or ()}
        return {**likeliest, texts[token.token_id]: token.logprob}


def _usage(ended: Ended) -> dict[str, int]:
    prompt, drawn = ended.prompt_tokens, ended.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


class OpenAIRoutes:
    """The handlers with what they need; ``router()`` puts them at their addresses."""

    def __init__(self, card: ModelCard, admission: Admission) -> None:
        self._admission = admission
        self._model = ModelEntry(id=card.manifest.name, created=card.written_at)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        router.add_api_route(
            "/completions",
            self.complete,
            methods=["POST"],
            response_model=CompletionAnswer,
            responses=answers(404, *GENERATING, content={"text/event-stream": CHUNKS}),
            openapi_extra=describe_body(
                CompletionBody, self._admission.limits, model=self._model.id, prompt="ROMEO:", max_tokens=64
            ),
        )
        router.add_api_route("/models", self.models, responses=answers(401, 421))
        one = answers(401, 404, 421, 422)  # or FastAPI adds a 422 of its own, in another shape
        router.add_api_route("/models/{model}", self.model, responses=one)
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], include_in_schema=False)
        return router

    async def complete(self, request: Request) -> Response:
        """Continue a prompt as OpenAI's clients ask for it: chunks as the tokens come, or one JSON body."""
        admitted = await self._admission.admit(request, partial(parse_completion, self._model.id))
        return await respond(request, self._admission, admitted, Completion(admitted.generation, admitted.body))

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[self._model])

    async def model(self, model: str) -> ModelEntry:
        """The model of this name, if it is served."""
        if model != self._model.id:
            raise ApiError("model_not_found", param="model")
        return self._model

    async def chat(self) -> Response:
        """There is no chat, and this says why."""
        raise ApiError("no_chat")
