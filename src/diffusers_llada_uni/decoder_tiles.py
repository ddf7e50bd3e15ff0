"""Images in tiles, for a decoder that knows one size: what it draws at once is never larger."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecoderTiles:
    """
    The tiles of a grid of codes, in raster order. Where they do not go into it evenly, the last of a row or column
    ends at the edge and covers a part of the one before; there the mean of both counts, at every step
    (MultiDiffusion, arXiv 2302.08113).

    Args:
        rows, columns (`tuple[int, ...]`): Where tiles begin, in codes.
        height, width (`int`): Of a tile, in codes.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    height: int
    width: int

    @classmethod
    def of(cls, grid: tuple[int, int], tile_size: int | None) -> "DecoderTiles":
        """Of a grid `(H, W)`: at most `tile_size` codes down and across, `None` for one tile of all."""
        height, width = (side if tile_size is None else min(side, tile_size) for side in grid)
        return cls(_starts(grid[0], height), _starts(grid[1], width), height, width)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def split(self, whole: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """
        Args:
            whole: `(batch, ..., scale * H, scale * W)`.
            scale: Of its rows and columns to a code.

        Returns:
            `(batch * tiles, ..., scale * height, scale * width)`, those of an image one after the other.
        """
        if len(self) == 1:
            return whole
        return torch.stack([whole[..., down, across] for down, across in self._places(scale)], dim=1).flatten(0, 1)

    def join(self, parts: torch.Tensor, grid: tuple[int, int], scale: int = 1) -> torch.Tensor:
        """What [`split`] has split, `(batch, ..., scale * H, scale * W)` of `grid` `(H, W)`."""
        if len(self) == 1:
            return parts
        parts = parts.unflatten(0, (-1, len(self)))
        size = scale * grid[0], scale * grid[1]
        total = parts.new_zeros((*parts.shape[:1], *parts.shape[2:-2], *size))
        count = parts.new_zeros(size)
        for number, (down, across) in enumerate(self._places(scale)):
            total[..., down, across] += parts[:, number]
            count[down, across] += 1
        return total / count

    def _places(self, scale: int) -> list[tuple[slice, slice]]:
        height, width = scale * self.height, scale * self.width
        return [
            (slice(scale * row, scale * row + height), slice(scale * column, scale * column + width))
            for row in self.rows
            for column in self.columns
        ]


def _starts(side: int, tile: int) -> tuple[int, ...]:
    return (*range(0, side - tile, tile), side - tile)
