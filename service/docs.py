"""The API reference at /docs: Swagger UI's files as its package brings them, in a page of ours. Asks no other host."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import FileResponse
from swagger_ui_bundle import swagger_ui_path  # type: ignore[import-untyped]

DOCS: Final = "/docs"
SWAGGER_FILES: Final = ("swagger-ui.css", "swagger-ui-bundle.js")  # the package brings an index and maps as well
DOCS_PATHS: Final = frozenset({DOCS, *(f"{DOCS}/{name}" for name in SWAGGER_FILES)})
# A megabyte that changes with its package only.
CACHED: Final = {"Cache-Control": "max-age=86400"}


def add_docs(app: FastAPI, page: Path) -> None:
    _add_file(app, DOCS, page)
    for name in SWAGGER_FILES:
        _add_file(app, f"{DOCS}/{name}", Path(swagger_ui_path) / name, CACHED)


def _add_file(app: FastAPI, path: str, file: Path, headers: dict[str, str] | None = None) -> None:
    app.add_route(path, lambda _: FileResponse(file, headers=headers), include_in_schema=False)


def require_key(schema: dict[str, Any], open_paths: Set[str]) -> None:
    """Adds to an OpenAPI schema which operations need the key, so that clients made from it send one."""
    schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in schema["paths"].keys() - open_paths:
        for operation in schema["paths"][path].values():
            operation["security"] = [{"key": []}]
