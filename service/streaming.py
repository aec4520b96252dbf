"""Engine events become server-sent events or one JSON body. Knows the wire's words; has never heard of threads."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from model.tokenizer import Tokenizer
from service.engine.sequence import DrawnToken, Ended, Event, FinishReason
from service.errors import ApiError
from service.exchange import TokenStream

PING_S: Final = 15.0
PING: Final = b": ping\n\n"
SSE_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_ERROR_OF_REASON: Final = {
    FinishReason.SHUTDOWN: "shutdown",
    FinishReason.INTERNAL: "internal",
    FinishReason.NON_FINITE: "non_finite",
    FinishReason.CANCELLED: "client_closed",
}
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Generation:
    """What an answer says of its request, whatever comes of it."""

    id: str
    model: str
    seed: int
    params: dict[str, Any]
    num_prompt_tokens: int
    prompt_used: str | None

    def head(self) -> dict[str, Any]:
        folded = {} if self.prompt_used is None else {"prompt_used": self.prompt_used}
        return {"id": self.id, "model": self.model, "seed": self.seed, "params": self.params, **folded}


class TextDecoder:
    """Token ids to text, one at a time. The place for ids that are only part of a character, should there be any."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._texts = tokenizer.tokens

    def push(self, token_id: int) -> str:
        return self._texts[token_id]


class Transcript:
    """One answer as it grows: its text so far, and every event in the words of the wire."""

    def __init__(self, generation: Generation, decoder: TextDecoder) -> None:
        self._generation = generation
        self._decoder = decoder
        self._pieces: list[str] = []

    def token(self, drawn: DrawnToken) -> dict[str, Any]:
        text = self._decoder.push(drawn.token_id)
        self._pieces.append(text)
        body: dict[str, Any] = {"index": drawn.index, "text": text, "token_id": drawn.token_id}
        if drawn.routed_experts is not None and drawn.expert_weights is not None:
            body["routed_experts"] = drawn.routed_experts
            body["expert_weights"] = [[round(weight, 6) for weight in layer] for layer in drawn.expert_weights]
        return body

    def done(self, ended: Ended) -> dict[str, Any]:
        return {
            "finish_reason": ended.reason,
            "text": "".join(self._pieces),
            "usage": {
                "prompt_tokens": ended.prompt_tokens,
                "generated_tokens": ended.generated_tokens,
                "total_tokens": ended.prompt_tokens + ended.generated_tokens,
            },
            "timings": _timings(ended),
            "seed": self._generation.seed,
            "routing": {"tokens": ended.routed_tokens, "counts": ended.expert_counts},
        }

    def start_event(self) -> bytes:
        usage = {"prompt_tokens": self._generation.num_prompt_tokens}
        return sse("start", {**self._generation.head(), "usage": usage})

    def event(self, event: Event) -> bytes:
        if isinstance(event, DrawnToken):
            return sse("token", self.token(event))
        if (error := error_of(event)) is None:
            return sse("done", self.done(event))
        return sse("error", {"error": error.describe(self._generation.id), "code": error.code})


def error_of(ended: Ended) -> ApiError | None:
    """None when the sequence ended as a sequence should."""
    code = _ERROR_OF_REASON.get(ended.reason)
    return None if code is None else ApiError(code)


def raise_if_refused(first: Event) -> None:
    """A sequence that ends before its first token gets a real status. Raises ApiError."""
    if isinstance(first, Ended):
        raise error_of(first) or ApiError("timeout")


def sse(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {_encode(data)}\n\n".encode()


async def stream_events(transcript: Transcript, stream: TokenStream, first: list[Event]) -> AsyncIterator[bytes]:
    """Everything that is ready leaves in one write: a slow client costs fewer writes, not a longer queue."""
    chunk, events = transcript.start_event(), first
    while True:
        chunk += b"".join(map(transcript.event, events)) or PING
        yield chunk
        if isinstance(events[-1] if events else None, Ended):
            return
        chunk, events = b"", await stream.next_events(PING_S)


async def collect(
    generation: Generation, transcript: Transcript, stream: TokenStream, first: list[Event], *, with_tokens: bool
) -> dict[str, Any]:
    """The answer to ``"stream": false``. Raises ApiError when the sequence did not end as it should."""
    tokens: list[dict[str, Any]] = []
    events = first
    while True:
        tokens += [transcript.token(event) for event in events if isinstance(event, DrawnToken)]
        if isinstance(last := events[-1], Ended):
            break
        events = await stream.next_events()
    if error := error_of(last):
        raise error
    return {**generation.head(), **transcript.done(last), **({"tokens": tokens} if with_tokens else {})}


class EventStream(StreamingResponse):
    """A streaming response that gives back what it holds however it ends, even if it never begins."""

    def __init__(self, content: AsyncIterator[bytes], give_back: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers=SSE_HEADERS)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_back()


def _timings(ended: Ended) -> dict[str, float | None]:
    writing_s = ended.total_s - (ended.ttft_s or 0.0)
    later = ended.generated_tokens - 1  # the first took the prompt's time
    return {
        "queue_s": _rounded(ended.queue_s),
        "ttft_s": _rounded(ended.ttft_s),
        "total_s": _rounded(ended.total_s),
        "tokens_per_s": _rounded(later / writing_s if later > 0 and writing_s > 0 else None),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
