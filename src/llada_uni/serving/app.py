"""The HTTP app: where an answer comes from."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .chat import chat_router
from .engine import Engine
from .errors import add_error_handlers, check_model
from .gate import Gate
from .images import image_router
from .metrics import Metrics
from .settings import ServerSettings


def create_app(engine: Engine, settings: ServerSettings | None = None) -> Gate:
    """
    The app of a server; the engine starts and stops with it.

    Args:
        engine ([`Engine`]): Not started.
        settings ([`ServerSettings`], *optional*): What it allows.
    """
    settings = settings or ServerSettings()
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    app = FastAPI(title="llada-uni", lifespan=lifespan, redoc_url=None, max_body_size=settings.max_body_bytes)
    add_error_handlers(app, settings.retry_after)
    app.include_router(chat_router(engine, settings))
    app.include_router(image_router(engine, settings))
    created = int(time.time())
    card = {"id": settings.model_name, "object": "model", "created": created, "owned_by": "llada-uni"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        check_model(name, settings)
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        if not engine.is_alive:
            return JSONResponse({"status": "the engine has died"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Gate(app, settings, metrics)
