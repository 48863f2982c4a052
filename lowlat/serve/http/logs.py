"""Structured logging: one JSON object per line on stderr, with the request id.

Prompts, responses, API keys and query strings are never logged.
"""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar

LOGGER = logging.getLogger("lowlat.serve")
REQUEST_ID: ContextVar[str | None] = ContextVar("lowlat_request_id", default=None)
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """A record as one JSON line: time (UTC), level, message, request_id, fields of `log`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line.update(record.__dict__.get(_FIELDS, {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log(level: int, message: str, *, error: BaseException | None = None, **fields: object) -> None:
    """Log `message` with `fields` (JSON types); `error` adds its traceback."""
    LOGGER.log(level, message, exc_info=error, extra={_FIELDS: fields})


def choose_request_id(given: str | None) -> str:
    """The client's X-Request-Id if it consists of letters, digits and `._-`, else a new id."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}"


def configure(level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr as JSON, those of uvicorn from ERROR up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Below ERROR, uvicorn logs every malformed request and every startup and shutdown step.
    logging.getLogger("uvicorn").setLevel(max(level, logging.ERROR))
