"""Before all else: the key, and the body's length and time. After all else: what is counted."""

import asyncio
import hmac
import time

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError
from .metrics import Metrics
from .settings import ServerSettings


OPEN_PATHS = ("/health", "/metrics")  # that no key is asked for
# Where a response leaves the status to count, if it learns of it after it has sent another.
LATER_STATUS = "llada_uni.status"


class Gate:
    """
    The app's outermost part.

    Args:
        app: What stands behind.
        settings: `api_key`, `max_body_bytes`, `max_body_seconds`.
        metrics: Told of every request.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, has_body = time.perf_counter(), 500, False
        body_deadline = asyncio.get_running_loop().time() + self.settings.max_body_seconds

        async def timed_receive() -> Message:
            nonlocal has_body
            if has_body:
                return await receive()
            try:
                async with asyncio.timeout_at(body_deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"The body may take {self.settings.max_body_seconds:g} s at most.") from error
            has_body = not message.get("more_body", False)
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (self.app if refusal is None else refusal)(scope, timed_receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count(route, scope.get(LATER_STATUS, status), time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, key, limit = dict(scope["headers"]), self.settings.api_key, self.settings.max_body_bytes
        sent = headers.get(b"authorization", b"")
        if not (key is None or scope["path"] in OPEN_PATHS or hmac.compare_digest(sent, f"Bearer {key}".encode())):
            return RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key").response()
        # A body that does not say its length is FastAPI's to cut off, at `max_body_size`.
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            return RequestError(f"The body may be {limit} bytes long at most.", None, 413, "body_too_long").response()
        return None
