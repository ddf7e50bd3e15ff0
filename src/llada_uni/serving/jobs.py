"""What clients ask of the engine, and how they hear of it."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

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
        result: What the engine made of it, or why it could not; cancelled if nobody waits for it any more.
    """

    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)
    result: Future = field(default_factory=Future, init=False)

    @property
    def kind(self) -> str:
        """Equal for jobs that can share a batch."""
        return json.dumps(self.settings, sort_keys=True)

    def cancel(self) -> None:
        """
        A client has hung up. Text leaves its batch at the end of a block, and so does a group of images once all its
        clients have left; a story ends after the image that it is at.
        """
        self.result.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self.result.cancelled()

    def succeed(self, result: Any) -> None:
        with suppress(InvalidStateError):  # cancelled, perhaps at this moment
            self.result.set_result(result)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.result.set_exception(error)


@dataclass(eq=False)
class TextJob(Job):
    """
    Text after a prompt. Its result is the list of new ids, up to and with the first end token.

    Attributes:
        input_ids: `(length,)`; images in it as their codes.
        max_new_tokens: Most tokens.
        settings: Further fields of `BlockDiffusionGenerationConfig`.
        seed: Makes sampled text repeatable.
        on_tokens: Called in the engine's thread with all new ids so far, after every block.
        num_tokens: New tokens so far, for who counts them.
        has_ended: Whether an end token has ended it, and not `max_new_tokens`.
    """

    input_ids: torch.Tensor
    max_new_tokens: int
    seed: int | None = None
    on_tokens: Callable[[list[int]], None] | None = None
    num_tokens: int = field(default=0, init=False)
    has_ended: bool = field(default=False, init=False)


AnyJob = TypeVar("AnyJob", bound=Job)


class JobQueue(Generic[AnyJob]):
    """
    Jobs that wait, in the order in which they came; for several threads.

    Args:
        max_waiting: Jobs that may wait.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._jobs: list[AnyJob] = []
        self._closed: str | None = None  # why

    def __len__(self) -> int:
        """Jobs that wait, cancelled ones left out."""
        with self._changed:
            self._jobs = [job for job in self._jobs if not job.is_cancelled]
            return len(self._jobs)

    def put(self, job: AnyJob) -> None:
        """
        Raises:
            EngineStopped: after [`close`].
            EngineBusy: if too many wait.
        """
        with self._changed:
            if self._closed is not None:
                raise EngineStopped(self._closed)
            if len(self) >= self.max_waiting:
                raise EngineBusy(f"{self.max_waiting} requests wait already.")
            self._jobs.append(job)
            self._changed.notify_all()

    def take(self, wanted: Callable[[AnyJob], bool], limit: int) -> list[AnyJob]:
        """The first jobs that are wanted, at most `limit`; they wait no more."""
        with self._changed:
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

    def wait(self) -> bool:
        """Until there is a job; `False` if none will come, as the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self) or self._closed is not None)
            return len(self) > 0

    def close(self, why: str = "The server is being stopped.") -> None:
        """Takes no more jobs, which are told why; those that wait are still to be done."""
        with self._changed:
            self._closed = why
            self._changed.notify_all()
