"""What can be seen of images whose codes are not all there yet."""

import PIL.Image
import PIL.ImageDraw
import torch

from diffusers_llada_uni.code_decoding import CodeDecoder


MASKED, LINE = "#d8dce6", "#eef0f5"  # of what is still masked


def preview(
    decoder: CodeDecoder, codes: torch.Tensor, is_done: torch.Tensor, seeds: list[int]
) -> list[PIL.Image.Image]:
    """
    One step of the decoder, with tiles where codes are missing. That holds for any model whose decoder has few steps,
    and roughly for others; what it shows will change in its details.

    Args:
        decoder: From codes to images.
        codes: `(images, H, W)`; anything where they are missing.
        is_done: `(images, H, W)`, true where they are there.
        seeds: Of the images, whose noise is that of the images to come.
    """
    # The decoder sees all codes at once: what is missing looks like what was last there, and not like anything else.
    flat, done = codes.flatten(1), is_done.flatten(1)
    last = torch.where(done, torch.arange(flat.shape[1], device=flat.device), 0).cummax(dim=1).values
    filled = flat.gather(1, last).view_as(codes)
    points = 1 if "turbo" in decoder.transformers else 2  # the other decoder counts the points between its steps
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = list(decoder.decode(filled, decoder.settle(num_inference_steps=points), generators))
    for image, there in zip(images, is_done.tolist(), strict=True):
        _cover(image, there)
    return images


def _cover(image: PIL.Image.Image, is_done: list[list[bool]]) -> None:
    draw, side = PIL.ImageDraw.Draw(image), image.height // len(is_done)
    for row, line in enumerate(is_done):
        for column, is_there in enumerate(line):
            if not is_there:
                left, top = column * side, row * side
                draw.rectangle((left, top, left + side - 1, top + side - 1), MASKED, LINE)
