"""One JSON object per log line, with fields rather than prose. Prompts and bodies never come here."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("service")


class JsonLines(logging.Formatter):
    """Time, level and event, then the event's fields; a traceback is one of them, so a line stays a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Everything to standard error in one format; libraries only from warnings up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level.upper())


def log_event(
    event: str, level: int = logging.INFO, *, exc_info: BaseException | None = None, **fields: object
) -> None:
    """``log_event("request", id=..., status=200)``: the event is a constant, what varies is a field."""
    LOGGER.log(level, event, exc_info=exc_info, extra={"fields": fields})
