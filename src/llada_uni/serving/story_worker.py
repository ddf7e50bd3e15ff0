"""The thread of answers with images: text and images in turn, each told as soon as it is there."""

from collections.abc import Iterator
from typing import Any

import torch

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_generation import DEFAULT_GUIDANCE_SCALE, CodeGenerationSettings
from transformers_llada_uni import LLaDAUniProcessor
from transformers_llada_uni.image_places import HEADER_LENGTH

from .image_jobs import CodesOfImage, StoryJob
from .jobs import JobQueue
from .pixels import PixelWorker


FRAME_LENGTH = HEADER_LENGTH + 1  # tokens that frame an image's codes: the header, and `<|/image|>` behind them


class StoryWorker:
    """
    Tells one story after the other, part by part; while the decoder's thread makes an image of codes, the text after
    it is written.

    Args:
        pipe ([`LLaDAUniPipeline`]): The pipeline.
        processor ([`LLaDAUniProcessor`]): Takes apart what the model has written.
        jobs: What is to be told.
        pixels: The decoder's thread.
    """

    def __init__(
        self, pipe: LLaDAUniPipeline, processor: LLaDAUniProcessor, jobs: JobQueue[StoryJob], pixels: PixelWorker
    ):
        self.pipe, self.processor, self.jobs, self.pixels = pipe, processor, jobs, pixels

    def run(self) -> None:
        """Until the queue is closed, and empty."""
        while self.jobs.wait():
            for job in self.jobs.take(lambda job: True, 1):
                self._tell(job)

    @torch.no_grad()
    def _tell(self, job: StoryJob) -> None:
        try:
            settings = dict(job.settings)
            steps = settings.pop("num_inference_steps", None)
            decoder, place, num_images = self.pipe.code_decoder, 0, 0
            decoding = decoder.settle(num_inference_steps=steps)
            for part in self._parts(job, settings):
                if isinstance(part, str):
                    job.take(place, part)
                else:
                    self._check_side(job, part)
                    decoder.check_grid(part.shape, decoding)
                    num_images += 1
                    generator = torch.Generator().manual_seed((job.seed + num_images) % 2**63)
                    self.pixels.put([CodesOfImage(job, place, part, generator)], decoding)
                place += 1
                if job.is_done:  # the client has left, or an image has failed
                    return
            job.end_after(place)
        except Exception as error:
            job.fail(error)

    def _check_side(self, job: StoryJob, codes: torch.Tensor) -> None:
        height, width = (self.processor.image_processor.pixels_per_code * side for side in codes.shape)
        if max(height, width) > job.max_side:
            raise ValueError(
                f"`size`: the model has chosen {width} x {height} pixels, and {job.max_side} are allowed on a side; "
                "ask for a size."
            )

    def _parts(self, job: StoryJob, settings: dict[str, Any]) -> Iterator[str | torch.Tensor]:
        """
        Text, and codes `(H, W)` of images. One call of the model for each image and the text before it: what is
        written so far is the next one's prompt, and, for want of the user's words, what guidance leads away from.
        """
        coder = self.pipe.code_generator
        settings |= CodeGenerationSettings(settings.pop("guidance_scale", DEFAULT_GUIDANCE_SCALE)).guidance
        inputs: dict[str, Any] = dict(job.inputs.to(coder.device))
        grid = None if job.size is None else coder.grid_of(*job.size)
        end_ids = torch.as_tensor(coder.own_settings.eos_token_id).flatten().tolist()
        limit = coder.model.config.get_text_config().max_position_embeddings
        generator = torch.Generator().manual_seed(job.seed)
        left = job.max_new_tokens
        for number in range(job.max_images):
            before = inputs["input_ids"].shape[1]
            room = limit - before - (0 if grid is None or not number else grid[0] * grid[1] + FRAME_LENGTH)
            if left < 1 or room < 1:
                return
            sequence = coder.model.generate_interleaved(
                **inputs, max_images=1, grid=grid, max_new_tokens=left, generator=generator, **settings
            )
            new = sequence[0, before:]
            job.num_tokens += len(new)
            has_image = False
            for part in self.processor.post_process(new)[0]:
                if not isinstance(part, str):
                    left -= len(new) - part.numel() - FRAME_LENGTH
                    has_image = True
                    yield part
                elif part.strip():
                    yield part
            if not has_image:
                job.has_ended = len(new) > 0 and int(new[-1]) in end_ids
                return
            uncondition = inputs["uncondition_ids"]
            inputs = {
                "input_ids": sequence,
                "negative_input_ids": torch.cat([sequence, uncondition.to(sequence.device)], dim=1),
                "uncondition_ids": uncondition,
            }
