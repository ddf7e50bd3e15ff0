"""The images of prompts as codes: those that come at the same time are encoded together."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature


MAX_PATCHES = 16_384  # of a forward pass, unless one prompt has more: four images of 1024 x 1024 in the released model


@dataclass
class _Prompt:
    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    placed: Future = field(default_factory=Future)


class ImageEncoder:
    """
    Puts the codes of images where prompts hold their places open; for several threads. Who finds the model free
    encodes what all others wait for along with its own.

    Args:
        model: With a vision tower.
    """

    def __init__(self, model: Any):
        self.model = model
        self._is_free = threading.Lock()
        self._waiting: list[_Prompt] = []

    def place_images(self, inputs: BatchFeature) -> torch.Tensor:
        """
        Args:
            inputs: Of one prompt, from the processor.

        Returns:
            Its ids, `(length,)`, with the codes in their places.

        Raises:
            ValueError, TypeError: if images and ids do not fit together.
        """
        if "pixel_values" not in inputs:
            return inputs["input_ids"][0]
        num_places = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        if num_places != len(inputs["pixel_values"]):  # codes would go to another prompt
            raise ValueError(f"`inputs` hold {num_places} places for {len(inputs['pixel_values'])} codes.")
        prompt = _Prompt(*(inputs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")))
        self._waiting.append(prompt)
        with self._is_free:
            while not prompt.placed.done():
                self._encode(self._next_prompts())
        return prompt.placed.result()

    def _next_prompts(self) -> list[_Prompt]:
        """Those that have waited longest, as many as may be encoded together."""
        taken = [self._waiting.pop(0)]
        num_patches = len(taken[0].pixel_values)
        while self._waiting and num_patches + len(self._waiting[0].pixel_values) <= MAX_PATCHES:
            taken.append(self._waiting.pop(0))
            num_patches += len(taken[-1].pixel_values)
        return taken

    @torch.no_grad()
    def _encode(self, prompts: list[_Prompt]) -> None:
        pixel_values, image_grid_thw = (
            torch.cat([getattr(prompt, name) for prompt in prompts]) for name in ("pixel_values", "image_grid_thw")
        )
        # All prompts as one row: places are filled in their order.
        ids = torch.cat([prompt.input_ids for prompt in prompts], dim=1)
        try:
            placed = self.model.place_images({"input_ids": ids}, pixel_values, image_grid_thw)["input_ids"][0]
        except Exception as error:
            if len(prompts) > 1:  # one is at fault, or they are too many: each alone
                for prompt in prompts:
                    self._encode([prompt])
            else:
                prompts[0].placed.set_exception(error)
            return
        for prompt, row in zip(prompts, placed.split([prompt.input_ids.shape[1] for prompt in prompts]), strict=True):
            prompt.placed.set_result(row)
