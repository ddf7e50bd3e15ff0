"""What clients ask of the engine, and how they hear of it."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import PIL.Image
import torch


class EngineBusy(Exception):
    """As many requests wait as may; come again later."""


class EngineStopped(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Job:
    """
    Attributes:
        settings: Jobs of equal settings share a batch.
        result: What the engine made of it, or why it could not.
        is_cancelled: Nobody waits for the result any more.
    """

    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)
    result: Future = field(default_factory=Future, init=False)
    is_cancelled: bool = field(default=False, init=False)

    @property
    def kind(self) -> str:
        """Equal for jobs that can share a batch."""
        return json.dumps(self.settings, sort_keys=True)

    def cancel(self) -> None:
        """A client has hung up. Text leaves its batch at the end of a block; images are finished for the others."""
        self.is_cancelled = True
        self.result.cancel()


@dataclass(eq=False)
class TextJob(Job):
    """
    Text after a prompt. Its result is the list of new ids, the end token left out.

    Attributes:
        input_ids: `(length,)`; images in it as their codes.
        max_new_tokens: Most tokens.
        settings: Further fields of `BlockDiffusionGenerationConfig`.
        seed: Makes sampled text repeatable.
        on_tokens: Called in the engine's thread with all new ids so far, after every block.
        num_tokens: New tokens so far, for who counts them.
    """

    input_ids: torch.Tensor
    max_new_tokens: int
    seed: int | None = None
    on_tokens: Callable[[list[int]], None] | None = None
    num_tokens: int = field(default=0, init=False)


@dataclass(eq=False)
class ImageJob(Job):
    """
    Images of one prompt. Its result is the list of them.

    Attributes:
        prompt: What to draw, or how to change `images`.
        settings: Of the pipeline's call, other than `prompt`, `image`, `mask_image` and `generator`.
        seeds: One for each image that is wanted.
        images: Sources to edit.
        mask: Where the first of `images` is to be made anew.
    """

    prompt: str
    seeds: list[int] = field(default_factory=lambda: [0])
    images: list[PIL.Image.Image] = field(default_factory=list)
    mask: PIL.Image.Image | None = None

    @property
    def kind(self) -> str:
        return f"{bool(self.images)} {self.mask is not None} {super().kind}"


AnyJob = TypeVar("AnyJob", bound=Job)


class JobQueue(Generic[AnyJob]):
    """
    Jobs that wait, in the order in which they came; for several threads.

    Args:
        max_waiting: Jobs that may wait.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self.condition = threading.Condition()
        self._jobs: list[AnyJob] = []
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: AnyJob) -> None:
        """
        Raises:
            EngineStopped: after [`close`].
            EngineBusy: if too many wait.
        """
        with self.condition:
            if self.is_closed:
                raise EngineStopped("The server is being stopped.")
            self._jobs = [waiting for waiting in self._jobs if not waiting.is_cancelled]
            if len(self._jobs) >= self.max_waiting:
                raise EngineBusy(f"{self.max_waiting} requests wait already.")
            self._jobs.append(job)
            self.condition.notify_all()

    def take(self, wanted: Callable[[AnyJob], bool], limit: int) -> list[AnyJob]:
        """The first jobs that are wanted, at most `limit`; they wait no more."""
        with self.condition:
            taken: list[AnyJob] = []
            left: list[AnyJob] = []
            for job in self._jobs:
                if job.is_cancelled:
                    continue
                if len(taken) < limit and wanted(job):
                    taken.append(job)
                else:
                    left.append(job)
            self._jobs = left
            return taken

    def first(self) -> AnyJob | None:
        """The job that has waited longest; it goes on waiting."""
        with self.condition:
            return next((job for job in self._jobs if not job.is_cancelled), None)

    def wait(self, timeout: float | None = None) -> None:
        """Until there is a job, or the queue is closed."""
        with self.condition:
            if not self._jobs and not self.is_closed:
                self.condition.wait(timeout)

    def close(self) -> None:
        """Takes no more jobs; those that wait are still to be done."""
        with self.condition:
            self.is_closed = True
            self.condition.notify_all()
