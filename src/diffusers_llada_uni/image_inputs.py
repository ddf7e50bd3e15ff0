"""The images, codes and masks a caller gives: one list of images per prompt, and which codes a mask touches."""

from typing import Any

import PIL.Image
import torch

from transformers_llada_uni import LLaDAUniImageProcessor, LLaDAUniProcessor


def images_per_prompt(
    image: Any, num_prompts: int, is_batch: bool, image_processor: LLaDAUniImageProcessor
) -> list[list[PIL.Image.Image]]:
    r"""
    Args:
        image: For one prompt an image, or a list of images (the first is the source, the others are references).
            For a list of prompts an image that serves all, or a list with one image or list of images for each.
            An image is anything [`LLaDAUniImageProcessor.fetch_images`] reads; an array or tensor of four dimensions
            is a list of images.
        num_prompts: How many prompts there are.
        is_batch: Whether the prompts were given as a list.
        image_processor: Reads the images.

    Returns:
        For each prompt its images, at least one; upright and RGB.

    Raises:
        TypeError: for what is no image. ValueError: for empty lists, a list of another length than the prompts', or
            an image that cannot be read.
    """
    image = _unstacked(image)
    if not isinstance(image, (list, tuple)):
        return [_read("image", image, image_processor)] * num_prompts
    entries = image if is_batch else [image]
    if len(entries) != num_prompts:
        raise ValueError(f"`image` has {len(entries)} entries for {num_prompts} prompts; give one for each.")
    return [_read("image", entry, image_processor) for entry in entries]


def codes_per_prompt(
    image_codes: Any, num_prompts: int, is_batch: bool, processor: LLaDAUniProcessor
) -> list[list[torch.Tensor]]:
    """
    As [`images_per_prompt`], of images that are given as codes `(H, W)`.

    Raises:
        TypeError, ValueError: for what are no codes of the model; for empty lists, or one of another length than the
            prompts'.
    """
    image_codes = processor.fetch_codes(image_codes)
    if not isinstance(image_codes, list):
        return [[image_codes]] * num_prompts
    entries = image_codes if is_batch else [image_codes]
    if len(entries) != num_prompts:
        raise ValueError(f"`image_codes` has {len(entries)} entries for {num_prompts} prompts; give one for each.")
    rows = [entry if isinstance(entry, list) else [entry] for entry in entries]
    if not all(row and all(isinstance(codes, torch.Tensor) for codes in row) for row in rows):
        raise ValueError("`image_codes` must hold for each prompt the codes of an image, or one list of such.")
    return rows


def masks_per_prompt(
    mask_image: Any,
    images: list[list[PIL.Image.Image]] | list[list[torch.Tensor]],
    image_processor: LLaDAUniImageProcessor,
) -> list[PIL.Image.Image]:
    r"""
    Args:
        mask_image: One mask for all prompts, or a list (or stack of four dimensions) with one for each. A mask is an
            image, or an array or tensor `(height, width)`, of the size of its source image; at least half of full
            brightness means "regenerate".
        images: For each prompt its images, or their codes; the mask belongs to the first. A pixel of it is a pixel of
            the image, or a code.
        image_processor: Reads the masks.

    Returns:
        For each prompt its mask, black and white (mode "L", 0 or 255).

    Raises:
        TypeError: for what is no mask. ValueError: for a mask of another size than its image, or one without white.
    """
    mask_image = _unstacked(mask_image)
    given = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image] * len(images)
    if len(given) != len(images):
        raise ValueError(f"`mask_image` has {len(given)} entries for {len(images)} prompts; give one for each.")
    masks = []
    for number, entry in enumerate(given):
        read, source = _read("mask_image", entry, image_processor), images[number][0]
        if len(read) != 1:
            raise ValueError(f"`mask_image` must hold one mask for each prompt, got {len(read)} for one.")
        mask = read[0]
        size = (source.shape[1], source.shape[0]) if isinstance(source, torch.Tensor) else source.size
        if mask.size != size:
            raise ValueError(
                f"`mask_image` must have the size of its image, {size[0]} x {size[1]} (width x height), got "
                f"{mask.size[0]} x {mask.size[1]}."
            )
        mask = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
        if mask.getextrema()[1] == 0:
            raise ValueError("`mask_image` must be white where the image is to be made anew; it is black everywhere.")
        masks.append(mask)
    return masks


def touched_codes(
    mask: PIL.Image.Image, image_processor: LLaDAUniImageProcessor, is_of_codes: bool = False
) -> torch.Tensor:
    r"""
    Which codes a mask touches. The mask is scaled and cropped as its image is, so the two stay aligned.

    Args:
        mask (`PIL.Image.Image`): Black and white, of the size of the source image.
        image_processor ([`LLaDAUniImageProcessor`]): The processor of the images.
        is_of_codes (`bool`, defaults to `False`): A pixel of the mask stands for a code already.

    Returns:
        `torch.BoolTensor` of shape `(H, W)`: True where the code's patch has any white.
    """
    if is_of_codes:
        return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width) > 0
    # A box filter looks at every pixel of the mask but never beyond the pixels that a pixel stands for.
    mask = image_processor.resize_and_crop(mask, "editing", resample=PIL.Image.Resampling.BOX)
    pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width)
    side = image_processor.patch_size
    return pixels.unflatten(0, (-1, side)).unflatten(2, (-1, side)).amax(dim=(1, 3)) > 0


def _unstacked(images: Any) -> Any:
    """Images that are stacked in one array or tensor, as `output_type="pt"` and "np" give them, as a list."""
    return list(images) if getattr(images, "ndim", None) == 4 else images


def _read(name: str, images: Any, image_processor: LLaDAUniImageProcessor) -> list[PIL.Image.Image]:
    """The images of one prompt; errors speak of the argument `name`."""
    try:
        images = image_processor.fetch_images(images)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(str(error).replace("`images`", f"`{name}`")) from error
    images = images if isinstance(images, list) else [images]
    if not images:
        raise ValueError(f"`{name}` must hold at least one image for each prompt, got an empty list.")
    if any(isinstance(image, list) for image in images):
        raise ValueError(f"`{name}` is nested too deep: a prompt has one list of images.")
    return images
