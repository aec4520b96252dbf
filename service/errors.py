"""Everything that can be refused or can go wrong on the wire: one table from code to status, and one shape for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


@dataclass(frozen=True)
class Kind:
    status: int
    type: str
    message: str
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


KINDS: Mapping[str, Kind] = {
    "not_json": Kind(400, "invalid_request", "the body is not JSON in UTF-8"),
    "bad_request": Kind(400, "invalid_request", "the request cannot be understood"),
    "unauthorized": Kind(
        401,
        "unauthorized",
        "this needs the server's key: send the header Authorization: Bearer KEY",
        headers={"WWW-Authenticate": "Bearer"},
    ),
    "not_found": Kind(404, "invalid_request", "there is nothing at this address; /openapi.json lists what there is"),
    "model_not_found": Kind(404, "invalid_request", "there is no such model here; GET /v1/models lists what there is"),
    "no_chat": Kind(
        404,
        "invalid_request",
        "this model continues text and has no chat template, so there is no chat here; use /v1/completions",
    ),
    "method_not_allowed": Kind(405, "invalid_request", "this address does not answer that method"),
    "request_timeout": Kind(
        408, "invalid_request", "the request did not arrive in time", headers={"Connection": "close"}
    ),
    "body_too_large": Kind(413, "invalid_request", "the body is larger than 65,536 bytes"),
    "unsupported_media_type": Kind(
        415, "invalid_request", "the body must be JSON and say so: send the header Content-Type: application/json"
    ),
    "host_not_allowed": Kind(
        421, "invalid_request", "this server is not known by the name in the Host header; --allowed-hosts adds names"
    ),
    "not_an_object": Kind(422, "invalid_request", "the body must be a JSON object"),
    "unknown_field": Kind(422, "invalid_request", "the body has a field that is not known"),
    "duplicate_field": Kind(422, "invalid_request", "the body gives a field twice"),
    "missing_field": Kind(422, "invalid_request", "a required field is missing"),
    "wrong_type": Kind(422, "invalid_request", "a field has the wrong type"),
    "out_of_range": Kind(422, "invalid_request", "a field is out of its range"),
    "unsupported_value": Kind(422, "invalid_request", "only the neutral value of a field is implemented"),
    "not_finite": Kind(422, "invalid_request", "a number is not finite"),
    "invalid_unicode": Kind(422, "invalid_request", "a text has half a surrogate pair and is no valid Unicode"),
    "prompt_too_long": Kind(422, "invalid_request", "the prompt is too long"),
    "unknown_characters": Kind(422, "invalid_request", "the prompt has characters that the vocabulary lacks"),
    "headers_too_large": Kind(431, "invalid_request", "the address and headers are more than this server reads"),
    "client_closed": Kind(499, "cancelled", "the client went away"),
    "internal": Kind(500, "internal", "something went wrong here; the log has it under this request id"),
    "non_finite": Kind(500, "internal", "the model computed something that is not a number; this request was ended"),
    "bad_event_id": Kind(
        422,
        "invalid_request",
        "Last-Event-ID must be the id of an event of this very stream: digits of a fingerprint,"
        " a colon and an index below max_new_tokens",
    ),
    "seed_needed": Kind(422, "invalid_request", "a stream goes on only with the seed that its start event told"),
    "other_fingerprint": Kind(
        409,
        "conflict",
        "this server would write another text: its model, runner or threads are others than before",
    ),
    "queue_full": Kind(429, "overloaded", "as many requests are waiting as can be served in time", retry_after_s=1),
    "loading": Kind(503, "unavailable", "the model is being loaded", retry_after_s=2),
    "warming": Kind(503, "unavailable", "the model is being warmed up", retry_after_s=2),
    "draining": Kind(503, "unavailable", "the server is shutting down", retry_after_s=5),
    "shutdown": Kind(503, "unavailable", "the server shut down before this request was done", retry_after_s=5),
    "failed": Kind(503, "unavailable", "the engine has failed and the server is about to exit", retry_after_s=10),
    "timeout": Kind(504, "timeout", "the request's time was over before its first new token"),
    "queue_timeout": Kind(504, "timeout", "no slot became free in the time that a request may wait", retry_after_s=5),
    "stalled": Kind(499, "cancelled", "the client read too slowly; this request was ended"),
}

_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """A request cannot be answered. ``code`` is a key of KINDS; a message never repeats what the client sent."""

    def __init__(
        self, code: str, message: str | None = None, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        kind = KINDS[code]
        super().__init__(message or kind.message)
        self.code = code
        self.kind = kind
        self.message = message or kind.message
        self.param = param
        self.retry_after_s = kind.retry_after_s if retry_after_s is None else math.ceil(retry_after_s)

    def describe(self, request_id: str) -> dict[str, Any]:
        """The one error shape, without its outer ``error``."""
        return {
            "type": self.kind.type,
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "request_id": request_id,
        }

    def response(self, request_id: str, **beside: object) -> JSONResponse:
        headers = dict(self.kind.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse({"error": self.describe(request_id), **beside}, self.kind.status, headers)


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response(request.state.request_id)


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    fallback = "internal" if error.status_code >= 500 else "bad_request"
    response = ApiError(_CODE_OF_STATUS.get(error.status_code, fallback)).response(request.state.request_id)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        allowed = response.headers.get("Allow", "GET")  # the page's files do not say so themselves
        response.headers["Allow"] = allowed.replace("GET", "GET, HEAD")
    return response
