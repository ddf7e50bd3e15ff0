"""The engine: requests of one kind that wait together share a batch."""

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch

from diffusers_llada_uni import LLaDAUniPipeline
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch, TextRow

from ..answers import write_prompt
from .jobs import EngineStopped, ImageJob, JobQueue, TextJob


logger = logging.getLogger(__name__)


class Engine:
    r"""
    Runs jobs in threads of its own: text block by block, in batches that rows join and leave; images in groups.

    A job gets what it would get alone, up to rounding. Jobs begin in the order in which they came; as text is made in
    turns of one block, a long answer holds up no short one.

    Args:
        pipe ([`LLaDAUniPipeline`]): Nobody else may call it while the engine runs.
        max_rows (`int`, defaults to 32): Answers under work at once.
        max_images (`int`, defaults to 16): Images of a group.
        max_waiting (`int`, defaults to 256): Jobs that may wait, of text and of images each.
    """

    def __init__(self, pipe: LLaDAUniPipeline, max_rows: int = 32, max_images: int = 16, max_waiting: int = 256):
        self.model = pipe.code_generator.model
        self.pipe, self.max_rows, self.max_images = pipe, max_rows, max_images
        # The pipeline's own stays with the thread of images: a tokenizer holds the padding of the call it is in.
        self.processor = copy.deepcopy(pipe.code_generator.processor)
        self._writing = threading.Lock()
        self.texts: JobQueue[TextJob] = JobQueue(max_waiting)
        self.images: JobQueue[ImageJob] = JobQueue(max_waiting)
        self.num_texts_running = self.num_images_running = self.num_text_tokens = self.num_images = 0
        self._unfinished: set[TextJob | ImageJob] = set()
        # Daemons: who does not wait for `stop`, as after a second Ctrl-C, is not held up.
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
            for name, work in (("text", self._write_texts), ("images", self._draw_images))
        ]

    def start(self) -> "Engine":
        for thread in self._threads:
            thread.start()
        return self

    def write_prompt(self, messages: list[dict[str, Any]], max_tokens: int) -> torch.Tensor:
        """Of [`~llada_uni.answers.write_prompt`], one conversation at a time."""
        with self._writing:
            return write_prompt(self.model, self.processor, messages, max_tokens)

    def submit(self, job: TextJob | ImageJob) -> None:
        """
        Raises:
            EngineBusy: if too many jobs wait.
            EngineStopped: after [`stop`].
        """
        self._unfinished.add(job)
        job.result.add_done_callback(lambda _: self._unfinished.discard(job))
        try:
            if isinstance(job, TextJob):
                self.texts.put(job)
            else:
                self.images.put(job)
        except Exception:
            job.cancel()
            raise

    def stop(self) -> None:
        """Takes no more jobs, does those that it has, and returns when they are done."""
        self.texts.close()
        self.images.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            logger.exception("The engine has died; the server answers no more.")
            self.texts.close()
            self.images.close()
            for job in list(self._unfinished):
                job.fail(EngineStopped("The engine has died."))

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

    # Images

    def _draw_images(self) -> None:
        while self.images.wait():
            group = self._next_group()
            self.num_images_running = sum(len(job.seeds) for job in group)
            self._draw_group(group)
            self.num_images_running = 0

    def _next_group(self) -> list[ImageJob]:
        """The job that has waited longest, and those of its kind beside which there is room."""
        kind, room = "", self.max_images

        def fits(job: ImageJob) -> bool:
            nonlocal kind, room
            # One that asks for more than there is ever room for is a group of its own.
            if kind and (job.kind != kind or len(job.seeds) > room):
                return False
            kind, room = job.kind, room - len(job.seeds)
            return True

        return self.images.take(fits, self.max_images)

    def _draw_group(self, group: list[ImageJob]) -> None:
        group = [job for job in group if not job.is_cancelled]
        if not group:
            return
        try:
            images = self._draw(group)
        except Exception as error:
            if len(group) > 1:  # one is at fault, or there are too many: each alone
                for job in group:
                    self._draw_group([job])
                return
            if not isinstance(error, (ValueError, TypeError)):
                logger.exception("An image has failed.")
            group[0].fail(error)
            return
        self.num_images += len(images)
        for job in group:
            job.succeed([images.pop(0) for _ in job.seeds])

    def _draw(self, group: list[ImageJob]) -> list[PIL.Image.Image]:
        rows = [(job, seed) for job in group for seed in job.seeds]
        images: list[PIL.Image.Image] = []
        for first in range(0, len(rows), self.max_images):
            batch = rows[first : first + self.max_images]
            sources: dict[str, Any] = {}
            if group[0].images:
                sources["image"] = [job.images for job, _ in batch]
            if group[0].mask is not None:
                sources["mask_image"] = [job.mask for job, _ in batch]
            generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
            prompts = [job.prompt for job, _ in batch]
            images += self.pipe(prompts, generator=generators, **sources, **group[0].settings).images
        return images
