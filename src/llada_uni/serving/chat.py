"""`/v1/chat/completions`: conversations with images in and out, streamed as they come."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .chat_answers import ChatAnswer, answer_of
from .chat_request import ChatRequest
from .clients import while_connected
from .engine import Engine
from .errors import RequestError, check_model
from .gate import LATER_STATUS
from .settings import ServerSettings


def chat_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        check_model(body.model, settings)
        answer = await answer_of(engine, body, settings)
        engine.submit(answer.job)
        common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model_name}
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            return AnswerStream(answer, common, wants_usage)
        message = await while_connected(request, answer.job, _whole_message(answer))
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**common, "object": "chat.completion", "choices": [choice], "usage": answer.usage}

    return router


async def _whole_message(answer: ChatAnswer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", **answer.nothing, "refusal": None}
    async for delta in answer.deltas():
        for name, added in delta.items():
            message[name] = message[name] + added
    return message


class AnswerStream(StreamingResponse):
    """
    An answer as server-sent events in OpenAI's shape.

    Args:
        answer: Its job is cancelled when this has been sent, or cannot be: also if the client has left before the
            first event, and nobody has ever listened to the answer.
        common: What all events hold.
        wants_usage: Whether the last event is to count tokens.
    """

    def __init__(self, answer: ChatAnswer, common: dict[str, Any], wants_usage: bool):
        self.answer, self.common, self.wants_usage = answer, common, wants_usage
        self.status = 499  # the client has hung up, for all that is known before the end
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.job.cancel()
            scope[LATER_STATUS] = self.status

    async def _events(self) -> AsyncIterator[str]:
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for delta in self.answer.deltas():
                yield self._chunk(delta)
            yield self._chunk({}, self.answer.finish_reason)
            if self.wants_usage:
                yield self._event(choices=[], usage=self.answer.usage)
            self.status = 200
        except RequestError as refusal:
            yield _server_sent(refusal.body())
            self.status = refusal.status
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event(choices=[choice])

    def _event(self, **fields: Any) -> str:
        return _server_sent({**self.common, "object": "chat.completion.chunk", **fields})


def _server_sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
