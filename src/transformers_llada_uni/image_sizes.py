"""Sizes of images in pixels and in codes: what a header can name, and what the model has room for."""

import math

from PIL import Image

from .image_places import Grid
from .image_processing_llada_uni import LLaDAUniImageProcessor


UPSCALE = 2  # how often the decoder, as it was trained, sees a code down and across


def default_side(image_processor: LLaDAUniImageProcessor) -> int:
    """What is set, or the side, as it is drawn, of the largest square that the rule of editing leaves."""
    if image_processor.default_side is not None:
        return image_processor.default_side
    codes_of_step = image_processor.size_multiple // image_processor.patch_size
    num_steps = math.isqrt(image_processor.editing_max_pixels) // image_processor.size_multiple
    return image_processor.pixels_per_code * codes_of_step * num_steps


def grids_of(
    image_processor: LLaDAUniImageProcessor, sample: list[Image.Image], resize_mode: str | None, largest: int
) -> list[Grid]:
    """
    The grids of a sample's images.

    Raises:
        ValueError: for a grid with a side above `largest`, which no header can name; with a crop that fits.
    """

    def grid_of(height: int, width: int) -> Grid:
        return image_processor.get_grid(height, width, resize_mode, len(sample))

    grids = [grid_of(image.height, image.width) for image in sample]
    for image, grid in zip(sample, grids, strict=True):
        sides, fitting = [image.height, image.width], grid
        step = image_processor.size_multiple if resize_mode is None else 1
        while max(fitting) > largest:
            longer = sides.index(max(sides))
            shrunk = min(sides[longer] - 1, sides[longer] * largest // max(fitting))
            sides[longer] = max(step, shrunk // step * step)
            fitting = grid_of(*sides)
        if fitting != grid:
            raise ValueError(
                f"`images`: one of {image.width} x {image.height} pixels becomes a grid of {grid[0]} x {grid[1]} "
                f"codes, but the tokenizer has numbers up to {largest} only (no <|reserved_token_{max(grid)}|>); "
                f"cropped to {sides[1]} x {sides[0]} it fits."
            )
    return grids


def grid_to_generate(
    image_processor: LLaDAUniImageProcessor, height: int | None, width: int | None, largest: int
) -> Grid:
    """
    The grid of an image of so many pixels, [`default_side`] where they are `None`.

    Raises:
        TypeError, ValueError: if one is missing, or no size of an image; with the nearest that is.
    """
    if (height is None) != (width is None):
        raise ValueError("`height` and `width` must be given together.")
    unit, default = image_processor.pixels_per_code, default_side(image_processor)
    height, width = (default if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or isinstance(side, bool):
            raise TypeError(f"`{name}` must be a whole number of pixels, got {side!r}.")
        if side < 1 or side % unit:
            nearest = min(max(1, round(side / unit)), largest) * unit
            raise ValueError(f"`{name}` must be a positive multiple of {unit}, got {side}; the nearest is {nearest}.")
        if side > largest * unit:
            raise ValueError(
                f"`{name}` may be at most {largest * unit}, got {side}: this model draws at most "
                f"{largest * unit} x {largest * unit}."
            )
    return height // unit, width // unit


def grid_of_sources(grids: list[list[Grid]]) -> Grid:
    """The grid of the first image of each sample; raises ValueError if they differ."""
    first = {sample[0] for sample in grids}
    if len(first) > 1:
        different = ", ".join(f"{height} x {width}" for height, width in sorted(first))
        raise ValueError(
            f"`images`: those to edit have different grids ({different}), and a batch has one; give "
            "`height` and `width`, or edit them one by one."
        )
    return first.pop()


def check_length(length: int, limit: int | None, grid: Grid | None, image_processor: LLaDAUniImageProcessor) -> None:
    """
    Refuses a prompt that overruns the model's positions, with what would fit.

    Args:
        length (`int`): Tokens of the prompt.
        limit (`int`, *optional*): The model's positions.
        grid (`tuple[int, int]`, *optional*): Of the image to generate, in codes.
    """
    num_codes = math.prod(grid or (0,))
    if limit is None or length + num_codes <= limit:
        return
    room, unit = limit - length, image_processor.pixels_per_code
    if grid is None or room < 1:
        raise ValueError(
            f"`text` and `images` make a prompt of {length} tokens, but the model has {limit} positions "
            f"(`max_position_embeddings`); shorten it to at most {limit - (num_codes if num_codes < limit else 1)} "
            "tokens."
        )
    scale = math.sqrt(room / num_codes)
    rows = min(max(1, math.floor(grid[0] * scale)), room)
    columns = min(max(1, math.floor(grid[1] * scale)), room // rows)
    raise ValueError(
        f"`height` and `width`: a prompt of {length} tokens and {num_codes} image codes overrun the model's {limit} "
        f"positions (`max_position_embeddings`); height={rows * unit}, width={columns * unit} would fit."
    )
