"""The thread that makes the codes of images: requests of one kind that wait together share a batch."""

import logging
from typing import Any

import torch

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_decoding import CodeDecodingSettings
from diffusers_llada_uni.code_generation import DEFAULT_GUIDANCE_SCALE, CodeGenerationSettings, PromptGroup
from diffusers_llada_uni.image_inputs import images_per_prompt, masks_per_prompt
from diffusers_llada_uni.prompt_inputs import check_prompt, check_task

from .image_jobs import CodesOfImage, ImageJob
from .jobs import JobQueue
from .pixels import PixelWorker


logger = logging.getLogger(__name__)


class NobodyWaits(Exception):
    """All clients of a batch have left."""


class ImageWorker:
    """
    Makes codes in groups, and hands them to the decoder's thread; the next group's are made while it decodes.

    Args:
        pipe ([`LLaDAUniPipeline`]): Its processor is this worker's alone.
        jobs: What is to be drawn.
        pixels: The decoder's thread.
        max_images (`int`): Most images of a group.
    """

    def __init__(self, pipe: LLaDAUniPipeline, jobs: JobQueue[ImageJob], pixels: PixelWorker, max_images: int):
        self.pipe, self.jobs, self.pixels, self.max_images = pipe, jobs, pixels, max_images

    def run(self) -> None:
        """Until the queue is closed, and empty."""
        while self.jobs.wait():
            self._draw(self._next_group())

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

        return self.jobs.take(fits, self.max_images)

    def _draw(self, group: list[ImageJob]) -> None:
        group = [job for job in group if not job.is_done]
        rows = [(job, place) for job in group for place in range(len(job.seeds))]
        try:
            for first in range(0, len(rows), self.max_images):
                self._draw_rows(rows[first : first + self.max_images])
        except NobodyWaits:
            pass
        except Exception as error:
            if len(group) > 1:  # one is at fault, or there are too many
                logger.warning("A batch of %d requests has failed, and is done one by one: %s", len(group), error)
                for job in group:
                    self._draw([job])
            else:
                group[0].fail(error)

    @torch.no_grad()
    def _draw_rows(self, rows: list[tuple[ImageJob, int]]) -> None:
        """The images of these places of jobs of one kind."""
        jobs = [job for job, _ in rows]
        generators = [torch.Generator().manual_seed(job.seeds[place]) for job, place in rows]
        groups, generation, decoding = self._write_prompts(jobs)

        def check_for_clients(done: int, total: int) -> None:
            if all(job.is_done for job in jobs):
                raise NobodyWaits

        made: list[list[CodesOfImage]] = []
        for group in groups:
            of_group = [generators[row] for row in group.rows]
            codes = self.pipe.code_generator.generate(group, generation, of_group, check_for_clients)
            made.append([CodesOfImage(*rows[row], codes[i], generators[row]) for i, row in enumerate(group.rows)])
        for images in made:
            self.pixels.put(images, decoding)

    def _write_prompts(
        self, jobs: list[ImageJob]
    ) -> tuple[list[PromptGroup], CodeGenerationSettings, CodeDecodingSettings]:
        """
        Prompts of one kind, one for each row; and how codes and pixels are made of them.

        Raises:
            ValueError, TypeError: as the pipeline's call does, by the name of its argument.
        """
        coder, decoder = self.pipe.code_generator, self.pipe.code_decoder
        settings: dict[str, Any] = dict(jobs[0].settings)
        has_images, has_masks = bool(jobs[0].images), jobs[0].mask is not None
        height, width = settings.pop("height", None), settings.pop("width", None)
        texts = check_prompt([job.prompt for job in jobs])
        check_task(jobs[0].images or None, jobs[0].mask, (height, width), False, 0.0, {})
        decoding = decoder.settle(num_inference_steps=settings.pop("num_inference_steps", None))
        default = self.pipe.config["editing_guidance_scale"] if has_images else DEFAULT_GUIDANCE_SCALE
        generation = CodeGenerationSettings(**{"guidance_scale": default, **settings})
        grid = None if has_images and height is None else coder.grid_of(height, width)
        if has_images:
            reader = coder.processor.image_processor
            images = []
            for job in jobs:
                if all(other.is_done for other in jobs):
                    raise NobodyWaits
                images += images_per_prompt([job.images], 1, True, reader)
            masks = masks_per_prompt([job.mask for job in jobs], images, reader) if has_masks else None
            groups = coder.write_edit_prompts(texts, images, masks, grid)
        else:
            assert grid is not None
            groups = coder.write_prompts(texts, grid)
        for group in groups:
            decoder.check_grid(group.grid, decoding)
        return groups, generation, decoding
