"""One model for many visitors: conversations share its batches, images take turns."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import PIL.Image
import torch

from diffusers_llada_uni import LLaDAUniPipeline

from ..answers import Answer
from ..serving.clients import Updates
from ..serving.engine import Engine
from ..serving.image_jobs import StoryJob
from ..serving.jobs import Job, TextJob


# What work on images calls with news for its visitor, and at every block with none: it raises `VisitorGone`.
Report = Callable[[Any], None]
_END = object()


class VisitorGone(Exception):
    """Nobody waits for this work any more: it is to end where it is."""


class ModelTurns:
    r"""
    Conversations and stories are the engine's; answers share its batches. Of images it tells when they are finished; a
    page shows how they come about, so they are made here, in one thread in place of the engine's own, one visitor's
    after the other's. Once its visitor has gone, work ends at the next block, a story at its next part.

    Args:
        pipe ([`LLaDAUniPipeline`]): Nobody else may call it.
    """

    def __init__(self, pipe: LLaDAUniPipeline):
        self.pipe = pipe
        self.engine = Engine(pipe).start()
        self.max_positions: int = self.engine.model.config.get_text_config().max_position_embeddings
        self._images, self._is_stopped = ThreadPoolExecutor(1, "images"), threading.Event()
        self._jobs: WeakSet[Job] = WeakSet()

    def stop(self) -> None:
        """Ends all work as if its visitors had gone, and returns when it has ended."""
        self._is_stopped.set()
        for job in list(self._jobs):
            job.cancel()
        self._images.shutdown(cancel_futures=True)
        self.engine.stop()

    async def on_images(self, work: Callable[[LLaDAUniPipeline, Report], None]) -> AsyncIterator[Any]:
        """
        Does work on images when its turn has come.

        Args:
            work: Called with the pipeline and with what it reports to.

        Yields:
            What it reports. Who takes no more of it ends the work at its next report.

        Raises:
            Whatever `work` raises.
        """
        updates, is_gone = Updates[Any](), threading.Event()

        def report(update: Any) -> None:
            if is_gone.is_set() or self._is_stopped.is_set():
                raise VisitorGone
            if update is not None:
                updates.put(update)

        turn: Future[None] = self._images.submit(self._work, work, report)
        turn.add_done_callback(lambda _: updates.put(_END))
        try:
            while (update := await updates.get()) is not _END:
                yield update
            with suppress(CancelledError):  # by `stop`
                turn.result()
        finally:
            is_gone.set()
            turn.cancel()

    @torch.no_grad()
    def _work(self, work: Callable[[LLaDAUniPipeline, Report], None], report: Report) -> None:
        with suppress(VisitorGone):
            report(None)
            work(self.pipe, report)

    async def answer(
        self, messages: list[dict[str, Any]], max_new_tokens: int, seed: int | None = None, **settings: Any
    ) -> AsyncIterator[str]:
        """
        Answers a conversation.

        Args:
            messages: See the pipeline's `chat`.
            max_new_tokens: Most tokens; fewer where the model's positions end.
            seed: Makes sampled text repeatable.
            **settings: Further fields of `BlockDiffusionGenerationConfig`.

        Yields:
            The text so far, after every block. Who takes no more of it ends the answer.

        Raises:
            ValueError, TypeError: if `messages` are no conversation, or are too long.
            EngineBusy: if too many conversations wait.
        """
        input_ids = await asyncio.to_thread(self.engine.write_prompt, messages, self.max_positions - 1)
        updates = Updates[list[int] | None]()
        room = min(max_new_tokens, self.max_positions - len(input_ids))
        job = TextJob(input_ids, room, seed, updates.put, settings=settings)
        job.result.add_done_callback(lambda _: updates.put(None))
        answer = Answer(self.engine.processor.tokenizer)
        try:
            self._jobs.add(job)
            self.engine.submit(job)
            while (tokens := await updates.get()) is not None:
                answer.take(tokens, is_finished=False)
                yield answer.text
            answer.take(job.result.result(), is_finished=True)
            yield answer.text
        finally:
            job.cancel()

    async def tell(
        self, prompt: str, max_images: int, max_side: int, seed: int, **settings: Any
    ) -> AsyncIterator[str | PIL.Image.Image]:
        """
        Tells a story.

        Args:
            prompt: What to tell.
            max_images: Most images.
            max_side: Longest side that an image may have, in pixels.
            seed: Makes it repeatable.
            **settings: Of [`~llada_uni.serving.image_jobs.StoryJob`].

        Yields:
            Text and images, as they are finished. Who takes no more of them ends the story.

        Raises:
            ValueError, TypeError: for a prompt that is too long.
            EngineBusy: if too many stories wait.
        """
        limit = self.max_positions - 1
        inputs = await asyncio.to_thread(self.engine.write_story_prompt, prompt, [], limit)
        updates = Updates[str | PIL.Image.Image | None]()
        job = StoryJob(inputs, limit, max_images, max_side, seed, settings=settings, on_part=updates.put)
        job.result.add_done_callback(lambda _: updates.put(None))
        try:
            self._jobs.add(job)
            self.engine.submit(job)
            while (part := await updates.get()) is not None:
                yield part
            job.result.result()  # may say why there is no more
        finally:
            job.cancel()
