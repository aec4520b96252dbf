"""What /openapi.json says beside what FastAPI finds itself: headers, events and every refusal. Answers nothing."""

from __future__ import annotations

from typing import Any, Final

from service.answers import ErrorBody
from service.errors import KINDS
from service.expert_window import LONGEST_S
from service.schemas import Body, Limits, body_schema

STATUSES_ANYWHERE: Final = (400, 408, 431, 500)
"""What any address may answer, whatever was asked."""
GENERATING: Final = (401, 409, 413, 415, 421, 422, 429, 503, 504)
"""What a request for text may be refused with, beside those."""
Answers = dict[int | str, dict[str, Any]]

_REQUEST_ID: Final = {
    "description": "this answer's id, also in the log and in an error's request_id",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
}
_RETRY_AFTER: Final = {
    "description": "seconds after which to try again",
    "schema": {"type": "integer", "minimum": 1},
}
LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "id of the last event that a stream brought before it broke: with the same body and its seed, the "
    "stream goes on after that token",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{12}:(-1|[0-9]{1,9})$"},
}
WINDOW: Final = {
    "name": "window",
    "in": "query",
    "required": False,
    "description": "how many seconds to look back; when absent, to the start",
    "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_S},
}
EVENTS: Final = {
    "itemSchema": {  # as FastAPI describes its own streams
        "type": "object",
        "description": "start (id, model, seed, params, usage.prompt_tokens, prompt_used), then token (TokenBody) for "
        "each token, then done (GenerateAnswer without id, model, params and tokens) or error (ErrorBody and code)",
        "properties": {
            "event": {"enum": ["start", "token", "done", "error"]},
            "id": {"type": "string", "pattern": "^[0-9a-f]{12}:(-1|[0-9]{1,9})$"},
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
        "required": ["event", "id", "data"],
    }
}
CHUNKS: Final = {
    "itemSchema": {
        "type": "object",
        "description": "CompletionAnswer for each token, then one with finish_reason, one with the usage if that is "
        "to be included, and [DONE]; after a chunk with an error (ErrorBody) nothing more",
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
    }
}
TEXT: Final = {"schema": {"type": "string"}}


def describe_body(kind: type[Body], limits: Limits, **example: object) -> dict[str, Any]:
    """For a body that a handler reads by itself."""
    content = {"schema": body_schema(kind, limits), "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def answers(
    *refusals: int, shape: type[ErrorBody] = ErrorBody, content: dict[str, dict[str, Any]] | None = None
) -> Answers:
    """For an operation: 200, with what its content may be beside JSON; these refusals, in their shape; and those that
    any address may give."""
    told: Answers = {200: {"headers": {"X-Request-Id": _REQUEST_ID}, "content": content or {}}}
    for status in sorted({*STATUSES_ANYWHERE, *refusals}):
        told[status] = {"model": shape if status in refusals else ErrorBody, **_refusal(status)}
    return told


def _refusal(status: int) -> dict[str, Any]:
    kinds = {code: kind for code, kind in KINDS.items() if kind.status == status}
    headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID}
    if any(kind.retry_after_s is not None for kind in kinds.values()):
        headers["Retry-After"] = _RETRY_AFTER
    return {"description": "; ".join(f"`{code}`: {kind.message}" for code, kind in kinds.items()), "headers": headers}


def whole_numbers(document: Any) -> Any:
    """The document with its integers as such: FastAPI makes floats of limits, and 2^63 as 9.223372036854776e+18 is not
    even the same number to everybody."""
    if isinstance(document, dict):
        return {name: whole_numbers(part) for name, part in document.items()}
    if isinstance(document, list):
        return [whole_numbers(part) for part in document]
    return int(document) if isinstance(document, float) and document.is_integer() else document
