"""Errors as OpenAI's clients know them."""

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .jobs import EngineBusy, EngineStopped
from .settings import ServerSettings


logger = logging.getLogger(__name__)

# Arguments of the pipeline that requests call otherwise.
FIELDS = {
    "height": "size",
    "width": "size",
    "grid": "size",
    "mask_image": "mask",
    "max_new_tokens": "max_tokens",
    "input_ids": "messages",
}


class RequestError(Exception):
    """
    A request that is refused, or has failed.

    Args:
        message: Why, for the person who wrote it.
        param: The field that is at fault.
        status: Of HTTP.
        code: For programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers)


def refusal_of(errors: Sequence[Any], known: Iterable[str] = ()) -> RequestError:
    """
    What pydantic finds wrong with a request, the first of it, by the field's name. A field that is not known comes
    before all else: it may be one that is missing, misspelt.

    Args:
        errors: Of pydantic.
        known: Fields of the request itself, not of what it holds.
    """
    # Of a field that may be a text or a list, both are found wrong: what was meant is what was sent.
    meant = [error for error in errors if not (error["loc"][-1:] == ("str",) and isinstance(error["input"], list))]
    first = next((error for error in meant if error["type"] == "extra_forbidden"), (meant or errors)[0])
    param = _path(first["loc"]) or None
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(param), list(known), 1) if "." not in str(param) else []
        hint = f" Did you mean `{near[0]}`?" if near else ""
        return RequestError(f"`{param}` is not known to this server.{hint}", param, code="unknown_parameter")
    if first["type"] == "literal_error":
        return RequestError(f"`{param}` may be {first['ctx']['expected']} here, got {first['input']!r:.100}.", param)
    if first["type"] == "missing":
        return RequestError(f"`{param or 'body'}` is missing.", param)
    if first["type"] == "json_invalid":
        return RequestError("The body is no JSON.")
    return RequestError(f"`{param or 'body'}`: {first['msg']}.", param)


def _path(location: Sequence[str | int]) -> str:
    """Where an error is, without what pydantic calls the alternatives of a message's content."""
    parts = [part for part in location if part != "body"]
    if parts[:1] == ["messages"] and parts[2:3] == ["content"]:
        del parts[3:4]  # whether it is a text or a list of parts
        del parts[4:5]  # behind the number of a part its kind
    return ".".join(map(str, parts))


def refusal_of_failure(error: Exception, words: str = "messages") -> RequestError:
    """
    What a client is told of a request that was accepted, and has failed. What is nobody's fault but ours goes into the
    log, and the client hears no more than that.

    Args:
        error: Of the job. A ValueError or TypeError is the model's or the pipeline's refusal, and begins with the
            name of an argument.
        words: The field that the prompt came in.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineBusy):
        return RequestError(str(error), status=429, code="rate_limit_exceeded")
    if isinstance(error, EngineStopped):
        return RequestError(str(error), status=503, code="stopping")
    if isinstance(error, (ValueError, TypeError)):
        named = re.match(r"`(\w+)`", str(error))
        fields = {**FIELDS, "prompt": words, "text": words}
        return RequestError(str(error), fields.get(named[1], named[1]) if named else None)
    logger.error("A request has failed.", exc_info=error)
    return _our_fault()


def _our_fault() -> RequestError:
    return RequestError("The server has failed to do this; its log says why.", status=500, code="internal_error")


def check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.model_name:
        raise RequestError(
            f"There is no model {name!r} here, but {settings.model_name!r}.", "model", 404, "model_not_found"
        )


def add_error_handlers(app: FastAPI, retry_after: int) -> None:
    """Every error leaves the app in one shape."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = refusal_of_failure(error)
        may_come_again = refusal.status in (429, 503)
        return refusal.response(**({"Retry-After": str(retry_after)} if may_come_again else {}))

    for kind in (RequestError, EngineBusy, EngineStopped):
        app.add_exception_handler(kind, refused)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _our_fault().response()  # uvicorn logs it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("content-type", ""):
            return RequestError("The body must be JSON, with `Content-Type: application/json`.", status=415).response()
        field = request.scope["route"].body_field
        known = getattr(field and field.field_info.annotation, "model_fields", ())
        return refusal_of(error.errors(), known).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message, path = str(error.detail), request.scope["path"]
        if error.status_code == 404:
            hint = f" Did you mean /v1{path}?" if f"/v1{path}" in app.openapi()["paths"] else ""
            message = f"There is no {path:.100} here.{hint}"
        return RequestError(message, status=error.status_code).response(**(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return RequestError("The client has hung up.", status=499).response()  # which nobody reads
