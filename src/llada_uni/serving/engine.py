"""The engine: requests of one kind that wait together share a batch."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import PIL.Image
import torch
from transformers.image_processing_utils import BatchFeature

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.image_inputs import images_per_prompt
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch, TextRow

from ..answers import PromptTooLong, read_conversation
from .image_encoder import ImageEncoder
from .image_jobs import ImageJob, StoryJob
from .image_worker import ImageWorker
from .jobs import EngineStopped, Job, JobQueue, TextJob
from .pixels import PixelWorker
from .story_worker import StoryWorker


logger = logging.getLogger(__name__)
DIED = "The engine has died; its log says why."


class Engine:
    r"""
    Runs jobs in threads of its own: text block by block, in batches that rows join and leave; the codes of images in
    groups; answers with images one after the other; and the pixels of all images beside.

    A job gets what it would get alone, up to rounding. Jobs begin in the order in which they came; as text is made in
    turns of one block, a long answer holds up no short one.

    Args:
        pipe ([`LLaDAUniPipeline`]): Nobody else may call it while the engine runs. All of it must stay where it is, so
            without offloading: threads use its parts at the same time.
        max_rows (`int`, defaults to 32): Answers under work at once.
        max_images (`int`, defaults to 16): Images of a group.
        max_waiting (`int`, defaults to 256): Jobs that may wait, of each kind.
    """

    def __init__(self, pipe: LLaDAUniPipeline, max_rows: int = 32, max_images: int = 16, max_waiting: int = 256):
        self.model = pipe.code_generator.model
        self.max_rows = max_rows
        self.processor = pipe.code_generator.processor
        self._writing, self._encoder = threading.Lock(), ImageEncoder(self.model)
        self.texts: JobQueue[TextJob] = JobQueue(max_waiting)
        self.images: JobQueue[ImageJob] = JobQueue(max_waiting)
        self.stories: JobQueue[StoryJob] = JobQueue(max_waiting)
        self._queues: dict[type[Job], JobQueue] = {
            TextJob: self.texts, ImageJob: self.images, StoryJob: self.stories
        }  # fmt: skip
        self.num_texts_running = self.num_text_tokens = 0
        self._unfinished: dict[Future[Any], Job] = {}
        self._pixels = PixelWorker(pipe)
        # Daemons: who does not wait for `stop`, as after a second Ctrl-C, is not held up.
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (
                ("text", self._write_texts),
                ("images", ImageWorker(pipe, self.images, self._pixels, max_images).run),
                ("stories", StoryWorker(pipe, self.processor, self.stories, self._pixels).run),
                ("pixels", self._pixels.run),
            )
        ]

    def start(self) -> "Engine":
        for thread in self._threads:
            thread.start()
        return self

    def write_prompt(self, messages: list[dict[str, Any]], max_tokens: int) -> torch.Tensor:
        """
        A conversation as ids `(length,)`, images in it as their codes.

        Raises:
            PromptTooLong: if there are more than `max_tokens`; no image has been encoded then.
            ValueError, TypeError: if they are no conversation.
        """
        with self._writing:
            inputs = read_conversation(self.processor, messages, max_tokens)
        on_device: Any = inputs.to(self.model.device)  # typed as the feature extractors' class of that name
        return self._encoder.place_images(on_device)

    def write_story_prompt(self, text: str, images: list[PIL.Image.Image], max_tokens: int) -> BatchFeature:
        """
        The inputs of a [`StoryJob`].

        Raises:
            PromptTooLong, ValueError, TypeError: as `write_prompt` does.
        """
        with self._writing:
            read = images_per_prompt(images, 1, False, self.processor.image_processor)[0] if images else None
            inputs = self.processor(images=read, text=text, task="interleaved")
        length = inputs["input_ids"].shape[1]
        if length > max_tokens:
            raise PromptTooLong(f"`messages` are {length} tokens; at most {max_tokens} are taken.")
        return inputs

    def submit(self, job: Job) -> None:
        """
        Raises:
            EngineBusy: if too many jobs of its kind wait.
            EngineStopped: after [`stop`].
        """
        # By its future, of which no callback may hold the job: together they would stay until a collector comes by,
        # and with them the images that were sent.
        self._unfinished[job.result] = job
        job.result.add_done_callback(self._forget)
        try:
            self._queues[type(job)].put(job)
        except Exception:
            job.cancel()
            raise

    def _forget(self, result: Future[Any]) -> None:
        self._unfinished.pop(result, None)

    def stop(self) -> None:
        """Takes no more jobs, does those that it has, and returns when they are done."""
        self._close_queues()
        for thread in self._threads:
            if thread is self._threads[-1]:  # the decoder's: by now nobody makes codes
                self._pixels.close()
            if thread.is_alive():
                thread.join()

    def _close_queues(self, **why: str) -> None:
        for queue in self._queues.values():
            queue.close(**why)

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def num_images(self) -> int:
        """Images that have been made, those of stories among them."""
        return self._pixels.num_images

    def num_running(self, kind: type[Job]) -> int:
        """Jobs of a kind that have begun, and are waited for."""
        unfinished = sum(isinstance(job, kind) for job in list(self._unfinished.values()))
        return max(unfinished - len(self._queues[kind]), 0)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            logger.exception("The engine has died; the server answers no more.")
            self._close_queues(why=DIED)
            self._pixels.close()
            for job in list(self._unfinished.values()):
                job.fail(EngineStopped(DIED))

    # Text

    def _write_texts(self) -> None:
        batches: dict[str, ContinuousBatch] = {}
        jobs: dict[TextRow, TextJob] = {}
        while jobs or self.texts.wait():
            self._let_in(batches, jobs)
            for kind, batch in list(batches.items()):
                self._advance(batch, jobs)
                if not batch.rows:
                    del batches[kind]
            self.num_texts_running = len(jobs)

    def _let_in(self, batches: dict[str, ContinuousBatch], jobs: dict[TextRow, TextJob]) -> None:
        for job in self.texts.take(lambda job: True, self.max_rows - len(jobs)):
            try:
                batch = batches.get(job.kind) or ContinuousBatch(self.model, **job.settings)
                generator = None if job.seed is None else torch.Generator().manual_seed(job.seed)
                row = batch.add(job.input_ids, job.max_new_tokens, generator)
            except Exception as error:
                job.fail(error)
            else:
                batches[job.kind], jobs[row] = batch, job
        self.num_texts_running = len(jobs)

    def _advance(self, batch: ContinuousBatch, jobs: dict[TextRow, TextJob]) -> None:
        for row in [row for row in batch.rows if jobs[row].is_cancelled]:
            batch.remove(row)
            del jobs[row]
        try:
            advanced = batch.step()
        except Exception as error:  # such as no more memory: the others are still served
            logger.exception("A batch of text has failed.")
            for row in batch.rows:
                jobs.pop(row).fail(error)
            batch.rows.clear()
            return
        for row in advanced:
            job = jobs[row]
            self.num_text_tokens += len(row.tokens) - job.num_tokens
            job.num_tokens = len(row.tokens)
            if job.on_tokens is not None:
                job.on_tokens(list(row.tokens))
            if row.is_finished:
                del jobs[row]
                job.has_ended = row.has_ended
                job.succeed(row.tokens)
