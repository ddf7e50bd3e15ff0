"""The two kinds of answers to a conversation, as they come: text, block by block; text and images, part by part."""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import PIL.Image
from jinja2 import TemplateError

from ..answers import Answer, PromptTooLong
from .chat_request import ChatRequest, read_messages
from .clients import Updates
from .engine import Engine
from .errors import RequestError, refusal_of_failure
from .image_inputs import encode_image, read_size
from .image_jobs import StoryJob
from .jobs import Job, TextJob
from .settings import ServerSettings


Delta = dict[str, Any]


class ChatAnswer(ABC):
    """
    An answer under way. It is made in the event loop, of a job that the engine has not got yet.

    Attributes:
        job: What the engine works at.
        nothing: What [`deltas`] add to: empty strings and lists.
    """

    job: Job
    nothing: Delta = {"content": ""}

    def __init__(self, job: Job, num_prompt_tokens: int):
        self.job, self.num_prompt_tokens = job, num_prompt_tokens
        self.updates: Updates[Any] = Updates()
        job.result.add_done_callback(lambda _: self.updates.put(None))

    async def deltas(self) -> AsyncIterator[Delta]:
        """
        What is added to the message, until it is done; who stops listening ends the job.

        Raises:
            RequestError: for whatever has befallen the job.
        """
        try:
            async for delta in self._deltas():
                yield delta
        except Exception as error:
            raise refusal_of_failure(error) from error
        finally:
            self.job.cancel()

    @abstractmethod
    def _deltas(self) -> AsyncIterator[Delta]: ...

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """New tokens so far."""

    @property
    @abstractmethod
    def finish_reason(self) -> str:
        """`"stop"` or `"length"`."""

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.num_prompt_tokens, self.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class TextAnswer(ChatAnswer):
    """Text, in pieces of a block."""

    job: TextJob

    def __init__(self, job: TextJob, answer: Answer):
        super().__init__(job, len(job.input_ids))
        self.answer = answer
        job.on_tokens = self.updates.put

    async def _deltas(self) -> AsyncIterator[Delta]:
        is_finished = False
        while not (is_finished or self.answer.is_stopped):
            tokens = await self.updates.get()
            is_finished = tokens is None
            if text := self.answer.take(self.job.result.result() if is_finished else tokens, is_finished):
                yield {"content": text}

    @property
    def num_tokens(self) -> int:
        return self.job.num_tokens

    @property
    def finish_reason(self) -> str:
        return "stop" if self.answer.is_stopped or self.job.has_ended else "length"


class StoryAnswer(ChatAnswer):
    """Text and images in turn, the images as others give them: as `images` beside `content`."""

    job: StoryJob
    nothing = {"content": "", "images": []}

    def __init__(self, job: StoryJob):
        super().__init__(job, job.inputs["input_ids"].shape[1])
        job.on_part = self.updates.put

    async def _deltas(self) -> AsyncIterator[Delta]:
        num_characters = num_images = 0
        while (part := await self.updates.get()) is not None:
            if isinstance(part, str):
                num_characters += len(part)
                yield {"content": part}
            else:
                yield {"images": [await asyncio.to_thread(_image_part, part, num_images, num_characters)]}
                num_images += 1
        self.job.result.result()  # may say why there is no more

    @property
    def num_tokens(self) -> int:
        return self.job.num_tokens

    @property
    def finish_reason(self) -> str:
        return "stop" if self.job.has_ended else "length"


def _image_part(image: PIL.Image.Image, index: int, text_offset: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{encode_image(image)}"
    return {"type": "image_url", "image_url": {"url": url}, "index": index, "text_offset": text_offset}


async def answer_of(engine: Engine, body: ChatRequest, settings: ServerSettings) -> ChatAnswer:
    """
    The answer that a request asks for; the engine has not heard of it yet.

    Raises:
        RequestError: for what the model cannot read, or is more than this server takes.
    """
    body.check(settings)
    try:
        if body.wants_images:
            return StoryAnswer(await asyncio.to_thread(_story_job, engine, body, settings))
        job = await asyncio.to_thread(_text_job, engine, body, settings)
        return TextAnswer(job, Answer(engine.processor.tokenizer, body.stop_strings()))
    except PromptTooLong as error:
        raise _too_long(str(error)) from error
    except (ValueError, TypeError, TemplateError) as error:  # the template refuses roles out of their order
        raise RequestError(str(error), "messages") from error


def _text_job(engine: Engine, body: ChatRequest, settings: ServerSettings) -> TextJob:
    input_ids = engine.write_prompt(read_messages(body.messages, settings), settings.max_prompt_tokens)
    limit, wanted = _room(engine, len(input_ids)), body.wanted_tokens
    if limit < (wanted or 1):
        raise _too_long(f"`messages` are {len(input_ids)} tokens, which leave room for {max(limit, 0)} new ones.")
    max_new_tokens = wanted or min(settings.max_new_tokens, limit)
    return TextJob(input_ids, max_new_tokens, body.seed, settings=body.generation_settings())


def _story_job(engine: Engine, body: ChatRequest, settings: ServerSettings) -> StoryJob:
    (message,) = read_messages(body.messages, settings)
    content, images = message["content"], []
    if not isinstance(content, str):
        images = [part["image"] for part in content if part["type"] == "image"]
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not content.strip():
        raise RequestError("`messages` must say what to tell.", "messages")
    inputs = engine.write_story_prompt(content, images, settings.max_prompt_tokens)
    length = inputs["input_ids"].shape[1]
    if _room(engine, length) < 1:
        raise _too_long(f"`messages` are {length} tokens, which leave no room for new ones.")
    return StoryJob(
        inputs,
        body.wanted_tokens or settings.max_new_tokens,
        body.max_images or min(4, settings.max_images),
        settings.max_side,
        random.getrandbits(62) if body.seed is None else body.seed,
        read_size(body.size, settings),
        settings=body.generation_settings(),
    )


def _room(engine: Engine, num_prompt_tokens: int) -> int:
    return engine.model.config.get_text_config().max_position_embeddings - num_prompt_tokens


def _too_long(message: str) -> RequestError:
    return RequestError(message, "messages", code="context_length_exceeded")
