"""Which emoji an image shows: the one of all 3,786 that is nearest in 32 x 32 RGB."""

from functools import cache

import numpy as np
import torch
from emoji_table import Emoji
from grounds import CELL, on_ground
from PIL import Image
from scenes import Scene


SIDE = 32
NOTHING = frozenset({""})


class NearestEmoji:
    """
    Args:
        table (`list[Emoji]`): All emoji, held-out ones too.
    """

    def __init__(self, table: list[Emoji]):
        self.table = table
        self._pixels_on = cache(self._pixels_of_all)
        self.keys_of_twins: dict[bytes, set[str]] = {}
        for emoji, pixels in zip(table, self._pixels_on("white", "big"), strict=False):
            self.keys_of_twins.setdefault(pixels.numpy().tobytes(), set()).add(emoji.key)
        self.twins_of = {key: frozenset(keys) for keys in self.keys_of_twins.values() for key in keys}

    def _pixels_of_all(self, ground: str, size: str) -> torch.Tensor:
        """`(emoji + 1, pixels)`: of all emoji, and last of the empty ground."""
        pictures = [on_ground(emoji.drawn, ground, size) for emoji in self.table]
        return torch.stack([self._small(picture) for picture in (*pictures, on_ground(None, ground))])

    def _small(self, picture: Image.Image) -> torch.Tensor:
        """Pixels of 0..1, flat."""
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small, dtype=np.float32).reshape(-1) / 255)

    def __call__(self, pictures: list[Image.Image], ground: str = "white", size: str = "big") -> list[frozenset[str]]:
        """
        Of each image the keys of the nearest emoji on this ground: several where the set has the same image twice,
        "" for nothing.
        """
        pixels = torch.stack([self._small(picture) for picture in pictures])
        nearest = torch.cdist(pixels, self._pixels_on(ground, size)).argmin(dim=1).tolist()
        return [self.twins_of[self.table[index].key] if index < len(self.table) else NOTHING for index in nearest]

    def in_places(self, picture: Image.Image, scene: Scene) -> list[bool]:
        """Of each place of a scene whether the picture shows there what it should, on its ground and in its size."""
        rows, columns = scene.shape
        if picture.size != (columns * CELL, rows * CELL):
            return [False] * len(scene.places)
        found = []
        for index, placed in enumerate(scene.places):
            left, top = index % columns * CELL, index // columns * CELL
            place = picture.crop((left, top, left + CELL, top + CELL))
            (keys,) = self([place], scene.ground, "big" if placed is None else placed.size)
            found.append(("" if placed is None else placed.key) in keys)
        return found
