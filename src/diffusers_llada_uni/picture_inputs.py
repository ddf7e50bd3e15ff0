"""The pictures and masks a caller gives: one list of pictures per prompt, checked; masks as pixels and as codes."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import load_image

Picture = PIL.Image.Image | np.ndarray | torch.Tensor | str | Path


def pictures_per_prompt(image: Any, num_prompts: int, is_batch: bool) -> list[list[Picture]]:
    r"""
    Args:
        image: For one prompt a picture, or a list of pictures (the first is the source, the others are references).
            For a list of prompts a picture that serves all, or a list with one picture or list of pictures for each.
        num_prompts: How many prompts there are.
        is_batch: Whether the prompts were given as a list.

    Returns:
        For each prompt its pictures, at least one.

    Raises:
        TypeError: for what is no picture. ValueError: for empty lists, or a list of another length than the prompts'.
    """
    if not isinstance(image, (list, tuple)):
        rows = [[image]] * num_prompts
    elif not is_batch:
        rows = [list(image)]
    else:
        if len(image) != num_prompts:
            raise ValueError(f"`image` has {len(image)} entries for {num_prompts} prompts; give one for each.")
        rows = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in image]
    for row in rows:
        if not row:
            raise ValueError("`image` must hold at least one picture for each prompt, got an empty list.")
        for picture in row:
            _check_picture("image", picture)
    return rows


def masks_per_prompt(mask_image: Any, pictures: list[list[Picture]]) -> list[PIL.Image.Image]:
    r"""
    Args:
        mask_image: One mask for all prompts, or a list with one for each. A mask is a picture, or an array or tensor
            `(height, width)`, of the size of its source picture; more than half of full brightness means "regenerate".
        pictures: For each prompt its pictures; the mask belongs to the first.

    Returns:
        For each prompt its mask, black and white (mode "L", 0 or 255).

    Raises:
        TypeError: for what is no mask. ValueError: for a mask of another size than its picture, or one without white.
    """
    given = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image] * len(pictures)
    if len(given) != len(pictures):
        raise ValueError(f"`mask_image` has {len(given)} entries for {len(pictures)} prompts; give one for each.")
    masks = []
    for mask, row in zip(given, pictures, strict=True):
        _check_picture("mask_image", mask, dimensions=(2, 3))
        mask, size = _to_mask(mask), _size(row[0])
        if mask.size != size:
            raise ValueError(
                f"`mask_image` must have the size of its picture, {size[0]} x {size[1]} (width x height), got "
                f"{mask.size[0]} x {mask.size[1]}."
            )
        if mask.getextrema()[1] == 0:
            raise ValueError("`mask_image` must be white where the picture is to be made anew; it is black everywhere.")
        masks.append(mask)
    return masks


def mask_codes(mask: PIL.Image.Image, image_processor: Any) -> torch.BoolTensor:
    r"""
    Which codes a mask touches. The mask goes through the image processor as its picture does, so the two stay aligned.

    Args:
        mask (`PIL.Image.Image`): Black and white, of the size of the source picture.
        image_processor ([`LLaDAUniImageProcessor`]): The processor of the pictures.

    Returns:
        `torch.BoolTensor` of shape `(H * W,)`, in raster order: True where the code's patch has any white.
    """
    patches = image_processor(
        mask.convert("RGB"), resize_mode="editing", do_rescale=True, do_normalize=False, return_tensors="pt"
    )["pixel_values"]
    return (patches > 0.5).any(dim=-1)


def _check_picture(name: str, picture: Any, dimensions: tuple[int, ...] = (3,)) -> None:
    if not isinstance(picture, Picture):
        raise TypeError(
            f"`{name}` must be a PIL image, array, tensor, path or URL (or a list of them), got "
            f"{type(picture).__name__}."
        )
    if isinstance(picture, (np.ndarray, torch.Tensor)) and picture.ndim not in dimensions:
        raise ValueError(
            f"`{name}` must have {' or '.join(map(str, dimensions))} dimensions as an array or tensor, got the shape "
            f"{tuple(picture.shape)}."
        )


def _open(picture: str | Path) -> PIL.Image.Image:
    if isinstance(picture, str) and not Path(picture).is_file():
        return load_image(picture)  # a URL or base64
    return PIL.ImageOps.exif_transpose(PIL.Image.open(picture))


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height, as the picture is seen."""
    if isinstance(picture, (str, Path)):
        return _open(picture).size
    if isinstance(picture, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(picture).size
    # (channels, height, width) when the first axis looks like channels, else (height, width, channels)
    height, width = picture.shape[1:] if picture.shape[0] in (1, 3, 4) else picture.shape[:2]
    return int(width), int(height)


def _to_mask(mask: Picture) -> PIL.Image.Image:
    if isinstance(mask, (str, Path)):
        mask = _open(mask)
    if isinstance(mask, PIL.Image.Image):
        pixels = np.asarray(PIL.ImageOps.exif_transpose(mask).convert("L"))
        return PIL.Image.fromarray(np.where(pixels > 127, 255, 0).astype(np.uint8))
    pixels = mask.detach().cpu().float().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    full = 255 if np.issubdtype(pixels.dtype, np.integer) or pixels.max(initial=0) > 1 else 1
    if pixels.ndim == 3:
        pixels = pixels.max(axis=0 if pixels.shape[0] in (1, 3, 4) else -1)
    return PIL.Image.fromarray(np.where(pixels > full / 2, 255, 0).astype(np.uint8))
