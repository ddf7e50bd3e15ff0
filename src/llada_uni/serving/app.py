"""The HTTP app: who may ask, how much, and where an answer comes from."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from .chat import chat_router
from .engine import Engine
from .errors import add_error_handlers, check_model, error_body
from .images import image_router
from .settings import ServerSettings


OPEN_PATHS = ("/health", "/metrics")  # that no key is asked for


class Gate:
    """
    Before all else: the key, and the length of the body and how long it may take to come. After all else: what
    Prometheus counts.

    Args:
        app: What stands behind.
        settings: `api_key`, `max_body_bytes`, `max_body_seconds`.
        seconds, requests: Of Prometheus.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, seconds: Histogram, requests: Counter):
        self.app, self.settings, self.seconds, self.requests = app, settings, seconds, requests

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
            self.requests.labels(route, status).inc()
            self.seconds.labels(route).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, key, limit = dict(scope["headers"]), self.settings.api_key, self.settings.max_body_bytes
        sent = headers.get(b"authorization", b"")
        if not (key is None or scope["path"] in OPEN_PATHS or hmac.compare_digest(sent, f"Bearer {key}".encode())):
            return JSONResponse(error_body("The API key is missing or wrong.", code="invalid_api_key"), 401)
        # A body that does not say its length is FastAPI's to cut off, at `max_body_size`.
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            return JSONResponse(error_body(f"The body may be {limit} bytes long at most.", code="body_too_long"), 413)
        return None


def create_app(engine: Engine, settings: ServerSettings | None = None) -> Gate:
    """
    The app of a server; the engine starts and stops with it.

    Args:
        engine ([`Engine`]): Not started.
        settings ([`ServerSettings`], *optional*): What it allows.
    """
    settings = settings or ServerSettings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="llada-uni", lifespan=lifespan, redoc_url=None, max_body_size=settings.max_body_bytes)
    registry = CollectorRegistry()
    requests = Counter("llada_uni_requests", "Requests answered", ["route", "status"], registry=registry)
    seconds = Histogram("llada_uni_request_seconds", "Time of a request", ["route"], registry=registry)
    for name, text, value in (
        ("llada_uni_texts_waiting", "Conversations that wait", lambda: len(engine.texts)),
        ("llada_uni_images_waiting", "Image requests that wait", lambda: len(engine.images)),
        ("llada_uni_texts_running", "Conversations under work", lambda: engine.num_texts_running),
        ("llada_uni_images_running", "Images under work", lambda: engine.num_images_running),
        ("llada_uni_text_tokens", "Tokens of text so far", lambda: engine.num_text_tokens),
        ("llada_uni_images", "Images so far", lambda: engine.num_images),
    ):
        Gauge(name, text, registry=registry).set_function(value)
    add_error_handlers(app, settings.retry_after)
    app.include_router(chat_router(engine, settings))
    app.include_router(image_router(engine, settings))
    created = int(time.time())
    card = {"id": settings.model_name, "object": "model", "created": created, "owned_by": "llada-uni"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, settings)
        return card

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        if not engine.is_alive:
            return JSONResponse({"status": "the engine has died"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Gate(app, settings, seconds, requests)
