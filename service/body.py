"""Reads a request body as strictly as JSON allows: bounded, UTF-8, no name twice. Knows nothing of what it means."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import ApiError

MAX_BODY_BYTES = 65_536
BODY_S = 20.0


class DuplicateName(ValueError):
    """An object gives one of its names twice. Parsers disagree on which value counts, so neither does."""


async def read_json_object(request: Request) -> dict[str, Any]:
    """Raises ApiError: unsupported_media_type, body_too_large, request_timeout, client_closed, and what
    ``parse_json_object`` raises."""
    _check_media_type(request.headers.get("content-type", ""))
    try:
        async with asyncio.timeout(BODY_S):
            content = await _read_bounded(request)
        return parse_json_object(content)
    except TimeoutError:
        raise ApiError("request_timeout") from None
    except ClientDisconnect:
        raise ApiError("client_closed") from None


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Raises ApiError: not_json, duplicate_field, not_an_object."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_int=_bounded_int)
    except DuplicateName:
        raise ApiError("duplicate_field") from None
    except (ValueError, RecursionError):
        raise ApiError("not_json") from None
    if not isinstance(value, dict):
        raise ApiError("not_an_object")
    return value


def _check_media_type(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise ApiError("unsupported_media_type")


async def _read_bounded(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > MAX_BODY_BYTES):
        raise ApiError("body_too_large")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise ApiError("body_too_large")
    return bytes(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise DuplicateName
    return members


def _bounded_int(digits: str) -> int:
    """Python refuses to read integers of thousands of digits; 32 of them are out of every range just as well."""
    return int(digits[:32])
