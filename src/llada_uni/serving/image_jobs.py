"""What clients ask of the images' threads, and how they hear of it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from transformers.image_processing_utils import BatchFeature

from .jobs import Job


@dataclass(eq=False)
class PartsJob(Job):
    """
    A job whose result is a list of parts, which may be made in any order, and by several threads.

    Attributes:
        on_part: Called with every part, in their order, as soon as those before it are there; in the thread that made
            the last of them.
        num_parts: How many there will be; `None` while that is not known.
    """

    on_part: Callable[[Any], None] | None = field(default=None, kw_only=True)
    num_parts: int | None = field(default=None, init=False)
    _parts: list[Any] = field(default_factory=list, init=False)
    _early: dict[int, Any] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False)

    @property
    def is_done(self) -> bool:
        """Whether nobody waits for more of it: all is there, it has failed, or the client has left."""
        return self.result.done()

    def take(self, place: int, part: Any) -> None:
        """A part that is ready, and its place among all."""
        with self._lock:
            self._early[place] = part
            while len(self._parts) in self._early:
                part = self._early.pop(len(self._parts))
                if self.on_part is not None and not self.is_done:
                    self.on_part(part)
                self._parts.append(part)  # counts once it is told: another thread may end the job by that count
        self._finish()

    def end_after(self, num_parts: int) -> None:
        """No part will come beyond these."""
        self.num_parts = num_parts
        self._finish()

    def _finish(self) -> None:
        if len(self._parts) == self.num_parts:
            self.succeed(self._parts)


@dataclass(eq=False)
class ImageJob(PartsJob):
    """
    Images of one prompt. Its result is the list of them.

    Attributes:
        prompt: What to draw, or how to change `images`.
        settings: Of the pipeline's call: `height`, `width`, `guidance_scale`, `num_inference_steps`,
            `num_steps_per_block`, `generation_kwargs`.
        seeds: One for each image that is wanted.
        images: Sources to edit.
        mask: Where the first of `images` is to be made anew.
    """

    prompt: str
    seeds: list[int] = field(default_factory=lambda: [0])
    images: list[PIL.Image.Image] = field(default_factory=list)
    mask: PIL.Image.Image | None = None

    def __post_init__(self) -> None:
        self.num_parts = len(self.seeds)

    @property
    def kind(self) -> str:
        return f"{bool(self.images)} {self.mask is not None} {super().kind}"


@dataclass(eq=False)
class StoryJob(PartsJob):
    """
    Text and images in turn. Its result is the list of them, text as strings.

    Attributes:
        inputs: Of the processor, for the task "interleaved", on the model's device.
        max_new_tokens: Most tokens of text, all stretches of it together.
        max_images: Most images.
        max_side: Longest side that an image may have, in pixels.
        seed: Makes it repeatable.
        size: Height and width in pixels of every image. Default: what the model chooses.
        settings: `guidance_scale`, `num_inference_steps`, `num_image_steps_per_block`, and further fields of
            `BlockDiffusionGenerationConfig`.
        num_tokens: New tokens so far, the codes of images and what frames them among them.
        has_ended: Whether the model has ended it, and no limit has.
    """

    inputs: BatchFeature
    max_new_tokens: int
    max_images: int
    max_side: int
    seed: int
    size: tuple[int, int] | None = None
    num_tokens: int = field(default=0, init=False)
    has_ended: bool = field(default=False, init=False)


@dataclass(eq=False)
class CodesOfImage:
    """
    An image whose codes are there, and whose pixels are not.

    Attributes:
        job, place: Who waits for it, and its place among the job's parts.
        codes: `(H, W)`.
        generator: For the decoder's noise.
    """

    job: PartsJob
    place: int
    codes: torch.Tensor
    generator: torch.Generator
