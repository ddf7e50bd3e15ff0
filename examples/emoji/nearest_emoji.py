"""Which emoji an image shows: the one of all 3,786 that is nearest in 32 x 32 RGB."""

import numpy as np
import torch
from emoji_table import Emoji
from PIL import Image


SIDE = 32


class NearestEmoji:
    """
    Args:
        table (`list[Emoji]`): All emoji, held-out ones too.
    """

    def __init__(self, table: list[Emoji]):
        self.table = table
        self.pixels = torch.stack([self._small(emoji.picture) for emoji in table])
        self.keys_of_twins: dict[bytes, set[str]] = {}
        for emoji, pixels in zip(table, self.pixels, strict=True):
            self.keys_of_twins.setdefault(pixels.numpy().tobytes(), set()).add(emoji.key)

    def _small(self, picture: Image.Image) -> torch.Tensor:
        """Pixels of 0..1, flat."""
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small, dtype=np.float32).reshape(-1) / 255)

    def __call__(self, pictures: list[Image.Image]) -> list[set[str]]:
        """Of each image the keys of the nearest emoji: several where the set has the same image twice."""
        pixels = torch.stack([self._small(picture) for picture in pictures])
        nearest = torch.cdist(pixels, self.pixels).argmin(dim=1)
        return [self.keys_of_twins[self.pixels[index].numpy().tobytes()] for index in nearest]
