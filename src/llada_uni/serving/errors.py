"""Errors as OpenAI's clients know them."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .jobs import EngineBusy, EngineStopped
from .settings import ServerSettings


OUR_FAULT = "The server has failed to do this; its log says why."


class RequestError(Exception):
    """
    A request that is refused.

    Args:
        message: Why, for the person who wrote it.
        param: The field that is at fault.
        status: Of HTTP.
        code: For programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def refusal_of(errors: Sequence[Any]) -> RequestError:
    """What pydantic finds wrong with a request, the first of it, by the field's name."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        return RequestError(f"`{param}` is not known to this server.", param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return RequestError("The body is no JSON.")
    return RequestError(f"`{param or 'body'}`: {first['msg']}.", param)


def check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.model_name:
        raise RequestError(
            f"There is no model {name!r} here, but {settings.model_name!r}.", "model", 404, "model_not_found"
        )


def error_body(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> dict:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(
    message: str, status: int, param: str | None = None, code: str | None = None, headers: dict | None = None
) -> JSONResponse:
    return JSONResponse(error_body(message, param, code, status), status, headers)


def add_error_handlers(app: FastAPI, retry_after: int) -> None:
    """Every error leaves the app in one shape; what is nobody's fault but ours says no more than that."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return _response(error.message, error.status, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, refusal_of(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _response(str(error.detail), error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _response("The client has hung up.", 499)  # which nobody reads

    @app.exception_handler(EngineBusy)
    async def busy(request: Request, error: EngineBusy) -> JSONResponse:
        return _response(str(error), 429, code="rate_limit_exceeded", headers={"Retry-After": str(retry_after)})

    @app.exception_handler(EngineStopped)
    async def stopped(request: Request, error: EngineStopped) -> JSONResponse:
        return _response(str(error), 503, code="stopping", headers={"Retry-After": str(retry_after)})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _response(OUR_FAULT, 500, code="internal_error")
