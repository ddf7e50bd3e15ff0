"""The pictures and masks a caller gives: one list of pictures per prompt, and which codes a mask touches."""

from typing import Any

import PIL.Image
import torch

from transformers_llada_uni import LLaDAUniImageProcessor


def pictures_per_prompt(
    image: Any, num_prompts: int, is_batch: bool, image_processor: LLaDAUniImageProcessor
) -> list[list[PIL.Image.Image]]:
    r"""
    Args:
        image: For one prompt a picture, or a list of pictures (the first is the source, the others are references).
            For a list of prompts a picture that serves all, or a list with one picture or list of pictures for each.
            A picture is anything [`LLaDAUniImageProcessor.fetch_images`] reads.
        num_prompts: How many prompts there are.
        is_batch: Whether the prompts were given as a list.
        image_processor: Reads the pictures.

    Returns:
        For each prompt its pictures, at least one; upright and RGB.

    Raises:
        TypeError: for what is no picture. ValueError: for empty lists, a list of another length than the prompts', or
            a picture that cannot be read.
    """
    if not isinstance(image, (list, tuple)):
        rows = [_read("image", image, image_processor)] * num_prompts
    elif not is_batch:
        rows = [_read("image", image, image_processor)]
    elif len(image) == num_prompts:
        rows = [_read("image", entry, image_processor) for entry in image]
    else:
        raise ValueError(f"`image` has {len(image)} entries for {num_prompts} prompts; give one for each.")
    return rows


def masks_per_prompt(
    mask_image: Any, pictures: list[list[PIL.Image.Image]], image_processor: LLaDAUniImageProcessor
) -> list[PIL.Image.Image]:
    r"""
    Args:
        mask_image: One mask for all prompts, or a list with one for each. A mask is a picture, or an array or tensor
            `(height, width)`, of the size of its source picture; at least half of full brightness means "regenerate".
        pictures: For each prompt its pictures; the mask belongs to the first.
        image_processor: Reads the masks.

    Returns:
        For each prompt its mask, black and white (mode "L", 0 or 255).

    Raises:
        TypeError: for what is no mask. ValueError: for a mask of another size than its picture, or one without white.
    """
    given = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image] * len(pictures)
    if len(given) != len(pictures):
        raise ValueError(f"`mask_image` has {len(given)} entries for {len(pictures)} prompts; give one for each.")
    masks = []
    for entry, row in zip(given, pictures, strict=True):
        mask, size = _read("mask_image", entry, image_processor)[0], row[0].size
        if mask.size != size:
            raise ValueError(
                f"`mask_image` must have the size of its picture, {size[0]} x {size[1]} (width x height), got "
                f"{mask.size[0]} x {mask.size[1]}."
            )
        mask = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
        if mask.getextrema()[1] == 0:
            raise ValueError(
                "`mask_image` must be white where the picture is to be made anew; it is black everywhere."
            )
        masks.append(mask)
    return masks


def touched_codes(mask: PIL.Image.Image, image_processor: LLaDAUniImageProcessor) -> torch.BoolTensor:
    r"""
    Which codes a mask touches. The mask is scaled and cropped as its picture is, so the two stay aligned.

    Args:
        mask (`PIL.Image.Image`): Black and white, of the size of the source picture.
        image_processor ([`LLaDAUniImageProcessor`]): The processor of the pictures.

    Returns:
        `torch.BoolTensor` of shape `(H, W)`: True where the code's patch has any white.
    """
    # A box filter looks at every pixel of the mask but never beyond the pixels that a pixel stands for.
    mask = image_processor.resize_and_crop(mask, "editing", resample=PIL.Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)
    side = image_processor.patch_size
    return pixels.unflatten(0, (-1, side)).unflatten(2, (-1, side)).amax(dim=(1, 3)) > 0


def _read(name: str, images: Any, image_processor: LLaDAUniImageProcessor) -> list[PIL.Image.Image]:
    """The pictures of one prompt; errors speak of the argument `name`."""
    try:
        pictures = image_processor.fetch_images(images)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`images`", f"`{name}`")) from error
    pictures = pictures if isinstance(pictures, list) else [pictures]
    if not pictures:
        raise ValueError(f"`{name}` must hold at least one picture for each prompt, got an empty list.")
    if any(isinstance(picture, list) for picture in pictures):
        raise ValueError(f"`{name}` is nested too deep: a prompt has one list of pictures.")
    return pictures
