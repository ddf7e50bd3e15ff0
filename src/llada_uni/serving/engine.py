"""The engine: requests of one kind that wait together share a batch."""

import logging
import threading
from typing import Any

import torch

from diffusers_llada_uni import LLaDAUniPipeline
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch, TextRow

from .jobs import ImageJob, Job, JobQueue, TextJob


logger = logging.getLogger(__name__)


class Engine:
    r"""
    Runs jobs in threads of its own: text block by block, in batches that rows join and leave; images in groups.

    A job gets what it would get alone. Jobs begin in the order in which they came; as text is made in turns of one
    block, a long answer holds up no short one.

    Args:
        pipe ([`LLaDAUniPipeline`]): Nobody else may call it while the engine runs.
        max_rows (`int`, defaults to 32): Answers under work at once.
        max_images (`int`, defaults to 16): Images of a group.
        max_waiting (`int`, defaults to 256): Jobs that may wait, of text and of images each.
    """

    def __init__(self, pipe: LLaDAUniPipeline, max_rows: int = 32, max_images: int = 16, max_waiting: int = 256):
        self.model = pipe.code_generator.model
        self.pipe, self.max_rows, self.max_images = pipe, max_rows, max_images
        self.texts: JobQueue[TextJob] = JobQueue(max_waiting)
        self.images: JobQueue[ImageJob] = JobQueue(max_waiting)
        self.num_texts_running = self.num_images_running = self.num_text_tokens = self.num_images = 0
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name)
            for name, work in (("text", self._write_texts), ("images", self._draw_images))
        ]

    def start(self) -> "Engine":
        for thread in self._threads:
            thread.start()
        return self

    def submit(self, job: TextJob | ImageJob) -> None:
        """
        Raises:
            EngineBusy: if too many jobs wait.
            EngineStopped: after [`stop`].
        """
        if isinstance(job, TextJob):
            self.texts.put(job)
        else:
            self.images.put(job)

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

    def _run(self, work: Any) -> None:
        try:
            work()
        except BaseException:
            logger.exception("The engine has died; the server answers no more.")
            raise

    # Text

    def _write_texts(self) -> None:
        batches: dict[str, ContinuousBatch] = {}
        jobs: dict[TextRow, TextJob] = {}
        while True:
            self._let_in(batches, jobs)
            self.num_texts_running = len(jobs)
            if not jobs:
                if self.texts.is_closed and not len(self.texts):
                    return
                self.texts.wait()
                continue
            for kind, batch in list(batches.items()):
                self._advance(batch, jobs)
                if not batch.rows:
                    del batches[kind]

    def _let_in(self, batches: dict[str, ContinuousBatch], jobs: dict[TextRow, TextJob]) -> None:
        for job in self.texts.take(lambda job: True, self.max_rows - len(jobs)):
            try:
                if job.kind not in batches:
                    batches[job.kind] = ContinuousBatch(self.model, **job.settings)
                generator = None if job.seed is None else torch.Generator().manual_seed(job.seed)
                row = batches[job.kind].add(job.input_ids, job.max_new_tokens, generator)
            except Exception as error:
                _fail([job], error)
            else:
                jobs[row] = job

    def _advance(self, batch: ContinuousBatch, jobs: dict[TextRow, TextJob]) -> None:
        for row in [row for row in batch.rows if jobs[row].is_cancelled]:
            batch.remove(row)
            del jobs[row]
        try:
            advanced = batch.step()
        except Exception as error:  # such as no more memory: the others are still served
            logger.exception("A batch of text has failed.")
            _fail([jobs.pop(row) for row in batch.rows], error)
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
                _succeed(job, row.tokens)

    # Images

    def _draw_images(self) -> None:
        while True:
            first = self.images.first()
            if first is None:
                if self.images.is_closed:
                    return
                self.images.wait()
                continue
            kind, room = first.kind, self.max_images

            def fits(job: ImageJob, kind: str = kind) -> bool:
                nonlocal room
                # One that asks for more than a group may have is a group of its own.
                if job.kind != kind or (len(job.seeds) > room and room < self.max_images):
                    return False
                room -= len(job.seeds)
                return True

            group = self.images.take(fits, self.max_images)
            self.num_images_running = sum(len(job.seeds) for job in group)
            try:
                images = self._draw(group)
            except Exception as error:
                if not isinstance(error, (ValueError, TypeError)):
                    logger.exception("A group of images has failed.")
                _fail(group, error)
            else:
                self.num_images += len(images)
                for job in group:
                    _succeed(job, [images.pop(0) for _ in job.seeds])
            self.num_images_running = 0

    def _draw(self, group: list[ImageJob]) -> list:
        rows = [(job, seed) for job in group for seed in job.seeds]
        sources: dict[str, Any] = {}
        if group[0].images:
            sources["image"] = [job.images for job, _ in rows]
        if group[0].mask is not None:
            sources["mask_image"] = [job.mask for job, _ in rows]
        generators = [torch.Generator().manual_seed(seed) for _, seed in rows]
        return list(
            self.pipe([job.prompt for job, _ in rows], generator=generators, **sources, **group[0].settings).images
        )


def _succeed(job: Job, result: Any) -> None:
    if not job.is_cancelled:
        job.result.set_result(result)


def _fail(jobs: list[Any], error: Exception) -> None:
    for job in jobs:
        if not job.is_cancelled:
            job.result.set_exception(error)
