"""`/v1/chat/completions`: conversations with images, streamed block by block."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ..answers import Answer, PromptTooLong
from .clients import while_connected
from .engine import Engine
from .errors import OUR_FAULT, RequestError, check_model, error_body
from .image_inputs import image_of_url
from .jobs import TextJob
from .settings import ServerSettings


class Strict(BaseModel):
    """What is not known is refused by name, and not ignored."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(Strict):
    """OpenAI's request, as far as this model has what it asks for, and more settings of generation."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    num_steps_per_block: int | None = Field(None, ge=1, le=1024)

    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def generation_settings(self) -> dict[str, Any]:
        """Fields of `BlockDiffusionGenerationConfig`. As for OpenAI, a temperature of 0 is greedy; so is none."""
        settings: dict[str, Any] = {}
        for name in ("threshold", "num_steps_per_block"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature}
            for name in ("top_p", "top_k"):
                if getattr(self, name) is not None:
                    settings[name] = getattr(self, name)
        return settings


def read_messages(messages: list[Message], settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages as the processor takes them, their images read."""
    num_images = 0
    conversation: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            conversation.append({"role": role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            num_images += 1
            if num_images > settings.max_images:
                raise RequestError(f"`messages` hold more than {settings.max_images} images.", "messages")
            param = f"messages.{index}.content.{place}.image_url"
            parts.append({"type": "image", "image": image_of_url(part.image_url.url, param, settings)})
        conversation.append({"role": role, "content": parts})
    return conversation


def read_prompt(engine: Engine, body: ChatRequest, settings: ServerSettings) -> torch.Tensor:
    """The conversation as ids `(length,)`, images in it as their codes."""
    conversation = read_messages(body.messages, settings)
    try:
        return engine.write_prompt(conversation, settings.max_prompt_tokens)
    except PromptTooLong as error:
        raise RequestError(str(error), "messages", code="context_length_exceeded") from error
    except (ValueError, TypeError) as error:
        raise RequestError(str(error), "messages") from error


def chat_router(engine: Engine, settings: ServerSettings) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        check_model(body.model, settings)
        wanted = body.max_completion_tokens or body.max_tokens
        if wanted is not None and wanted > settings.max_new_tokens:
            raise RequestError(f"`max_tokens` may be {settings.max_new_tokens} at most, got {wanted}.", "max_tokens")
        input_ids = await asyncio.to_thread(read_prompt, engine, body, settings)
        limit = engine.model.config.get_text_config().max_position_embeddings - len(input_ids)
        if limit < (wanted or 1):
            raise RequestError(
                f"`messages` are {len(input_ids)} tokens, which leave room for {max(limit, 0)} new ones.",
                "messages",
                code="context_length_exceeded",
            )
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[list[int] | None]()

        def on_tokens(tokens: list[int] | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has been made to stop at once
                loop.call_soon_threadsafe(updates.put_nowait, tokens)

        job = TextJob(
            input_ids,
            wanted or min(settings.max_new_tokens, limit),
            body.seed,
            on_tokens,
            settings=body.generation_settings(),
        )
        job.result.add_done_callback(lambda _: on_tokens(None))
        engine.submit(job)
        answer = Answer(engine.processor.tokenizer, body.stop_strings())
        stream = _deltas(job, answer, updates)
        common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model_name}
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(job, answer, stream, common, wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            await while_connected(request, _to_the_end(stream))
        except (ValueError, TypeError) as error:  # the model refuses by the setting's name
            raise RequestError(str(error)) from error
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(job, answer)}
        return {**common, "object": "chat.completion", "choices": [choice], "usage": _usage(job)}

    return router


async def _deltas(job: TextJob, answer: Answer, updates: "asyncio.Queue[list[int] | None]") -> AsyncIterator[str]:
    """What is added to the answer, until it is done. Who stops listening ends the job."""
    try:
        while not answer.is_stopped:
            tokens = await updates.get()
            if tokens is None:
                yield answer.take(job.result.result(), is_finished=True)
                return
            yield answer.take(tokens, is_finished=False)
    finally:
        job.cancel()


async def _to_the_end(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


def _finish_reason(job: TextJob, answer: Answer) -> str:
    return "stop" if answer.is_stopped or job.has_ended else "length"


def _usage(job: TextJob) -> dict[str, int]:
    prompt, completion = len(job.input_ids), job.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(
    job: TextJob, answer: Answer, stream: AsyncIterator[str], common: dict[str, Any], wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's shape."""

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _sse({**common, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    try:
        async for text in stream:
            if text:
                yield event({"content": text})
        yield event({}, _finish_reason(job, answer))
        if wants_usage:
            yield _sse({**common, "object": "chat.completion.chunk", "choices": [], "usage": _usage(job)})
    except Exception as error:
        is_theirs = isinstance(error, (ValueError, TypeError))
        yield _sse(error_body(str(error)) if is_theirs else error_body(OUR_FAULT, status=500))
    finally:
        job.cancel()
    yield "data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
