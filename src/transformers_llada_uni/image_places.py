"""Where images are in a sequence: `<|image|>`, a header that names their grid, their codes, and `<|/image|>`."""

import math
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from .user_words import MARK_START


IMAGE_START, IMAGE_END, BEGIN_OF_IMAGE = "<|image|>", "<|/image|>", "<boi>"
GRID_TOKEN = "<|reserved_token_{}|>"
HEADER_LENGTH = 4  # `<|image|>`, height, width, `<boi>`

# An `<|image|>` that stands for an image: no words of a user, and without a header yet, which begins with a number.
_NUMBER = re.escape(GRID_TOKEN).replace(r"\{\}", r"\d+")
LONE_IMAGE = re.compile(f"(?<!{MARK_START}){re.escape(IMAGE_START)}(?!{_NUMBER})")
# Stands for a code of an image given as pixels.
OPEN_PLACE = re.compile(f"(?<!{MARK_START}){re.escape(GRID_TOKEN.format(0))}")

Grid = tuple[int, int]


def image_header(height: int, width: int) -> str:
    """What announces an image of so many codes."""
    return IMAGE_START + GRID_TOKEN.format(height) + GRID_TOKEN.format(width) + BEGIN_OF_IMAGE


def image_block(height: int, width: int) -> str:
    """What stands for a whole image whose codes come later."""
    return image_header(height, width) + GRID_TOKEN.format(0) * (height * width) + IMAGE_END


def place_images(text: str, blocks: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """
    Puts each of `blocks` in the place of a lone `<|image|>`, of which there are as many.

    Returns:
        The text, and what was put where, with the places before and after, as transformers' processors report it.
    """
    found: list[dict[str, Any]] = []
    remaining, shift = iter(blocks), 0

    def place(match: re.Match[str]) -> str:
        nonlocal shift
        (start, end), block = match.span(), next(remaining)
        new_span = (start + shift, start + shift + len(block))
        found.append(
            {"type": "image", "span": (start, end), "new_span": new_span, "text": match[0], "replacement": block}
        )
        shift += len(block) - (end - start)
        return block

    return LONE_IMAGE.sub(place, text), found


def deal_out(images: Any, num_texts: int, counts: list[int] | None, name: str = "images") -> list[list]:
    """
    Gives each text its images.

    Args:
        images: None, an image, a list (dealt out in order), or a list of lists with one list per text.
        num_texts (`int`): Number of texts.
        counts (`list[int]`, *optional*): How many images each text asks for. Without it a list is dealt out one by
            one, or goes to the only text.
        name (`str`, defaults to `"images"`): Of the argument, in errors.

    Raises:
        ValueError: if the images do not fit the texts.
    """
    images = [] if images is None else images if isinstance(images, list) else [images]
    if any(isinstance(entry, list) for entry in images):
        if not all(isinstance(entry, list) for entry in images) or any(
            isinstance(entry, list) for sample in images for entry in sample
        ):
            raise ValueError(f"`{name}` must be one list of images, or one list of lists with a list per text.")
        if len(images) != num_texts:
            raise ValueError(f"`{name}` has {len(images)} lists of images for {num_texts} texts.")
        samples = images
    elif num_texts == 1:
        samples = [images]
    elif not images:
        samples = [[] for _ in range(num_texts)]
    elif counts is None:
        if len(images) != num_texts:
            raise ValueError(
                f"`{name}` has {len(images)} images for {num_texts} texts; a list of lists says which are whose."
            )
        samples = [[image] for image in images]
    else:
        if len(images) != sum(counts):
            raise ValueError(f"`{name}`: {len(images)} were given for {sum(counts)} <|image|> in `text`.")
        remaining = iter(images)
        samples = [[next(remaining) for _ in range(count)] for count in counts]
    for sample, count in zip(samples, counts or [], strict=counts is not None):
        if len(sample) != count:
            raise ValueError(f"`{name}`: {len(sample)} were given for {count} <|image|> in a text.")
    return samples


class ImageTokens:
    """
    The ids of what frames an image: `start`, `end`, `begin` (of codes), and `grid`, that of number n at index n.

    Raises:
        ValueError: if the tokenizer lacks one of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        def find(token: str) -> int | None:
            token_id = tokenizer.convert_tokens_to_ids(token)
            if isinstance(token_id, int) and tokenizer.convert_ids_to_tokens(token_id) == token:
                return token_id
            return None  # unknown tokens have an id, or none

        def need(token: str) -> int:
            if (token_id := find(token)) is None:
                raise ValueError(f"`tokenizer` has no token {token}; is it a tokenizer of LLaDA2.0-Uni?")
            return token_id

        self.start, self.end, self.begin = map(need, (IMAGE_START, IMAGE_END, BEGIN_OF_IMAGE))
        self.grid = [need(GRID_TOKEN.format(number)) for number in (0, 1)]  # with fewer no image has a header
        while (token_id := find(GRID_TOKEN.format(len(self.grid)))) is not None:
            self.grid.append(token_id)
        self._number = {token_id: number for number, token_id in enumerate(self.grid)}

    @property
    def largest_side(self) -> int:
        """The largest number that a header can name."""
        return len(self.grid) - 1

    def split(self, row: list[int]) -> list[tuple[Grid | None, list[int]]]:
        """
        A sequence, cut at its images.

        Returns:
            Pairs in order: None and the ids of a stretch of text, or the grid (H, W) and what stands where its H*W
            codes should: fewer ids where the sequence, or by its end token the image, ends early.
        """
        pieces: list[tuple[Grid | None, list[int]]] = []
        position = last = 0
        while position < len(row):
            grid = self._grid_at(row, position)
            if grid is None:
                position += 1
                continue
            first = position + HEADER_LENGTH
            codes = row[first : first + math.prod(grid)]
            codes = codes[: codes.index(self.end)] if self.end in codes else codes
            pieces += [(None, row[last:position]), (grid, codes)]
            position = first + len(codes)
            position += position < len(row) and row[position] == self.end
            last = position
        return [*pieces, (None, row[last:])]

    def _grid_at(self, row: list[int], position: int) -> Grid | None:
        """The grid that the header at `position` names, if there is one."""
        head = row[position : position + HEADER_LENGTH]
        if len(head) < HEADER_LENGTH or head[0] != self.start or head[-1] != self.begin:
            return None
        height, width = (self._number.get(token, 0) for token in head[1:3])
        return (height, width) if height and width else None
