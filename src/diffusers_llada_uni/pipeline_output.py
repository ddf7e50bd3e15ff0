"""What the pipeline returns."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils.outputs import BaseOutput


@dataclass
class LLaDAUniPipelineOutput(BaseOutput):
    r"""
    Output of [`LLaDAUniPipeline`]. The images of one prompt stand together: prompt 0 image 0, prompt 0 image 1, ...

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): By `output_type`: images; an array
            `(n, height, width, 3)` in 0..1; a tensor `(n, 3, height, width)` in 0..1; or latents `(n, 16, h, w)`.
            Images of different sizes (a batch of edits) come as a list of such arrays or tensors without `n`. With
            `"codes"` an empty list.
        codes (`list[torch.LongTensor]`): The image codes `(H, W)` each image was decoded from; `decode_codes` takes
            them again, for another seed or decoder.
        thoughts (`list[str]`, *optional*): What the model wrote before each image when called with `thinking=True`.
        scores (`list[float]`, *optional*): With `num_candidates`, what the judge gave each image, the best of its own.
    """

    images: list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor] | np.ndarray | torch.Tensor
    codes: list[torch.Tensor]
    thoughts: list[str] | None = None
    scores: list[float] | None = None
