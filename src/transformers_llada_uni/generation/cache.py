"""The exact prefix of block diffusion: keys and values of finished blocks, which under the block-causal mask stay."""

from typing import Any, Self

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class BlockDiffusionLayer(CacheLayerMixin):
    """
    Keys and values of one layer in a buffer of fixed size.

    Under the block-causal mask the keys and values of finished blocks never change. A step writes those of the
    columns it forwards behind the committed prefix and attends to both; `commit` then decides how many of them stay.
    Whatever is not committed is overwritten by the next step, so nothing is copied or concatenated.
    """

    is_croppable = False
    keys: torch.Tensor  # once it is initialized
    values: torch.Tensor

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0
        self.first_column: torch.Tensor | None = None  # of the next step, where buffers are static

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, num_heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch_size, num_heads, self.max_length, head_dim)
        self.values = value_states.new_zeros(batch_size, num_heads, self.max_length, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.first_column is not None:
            columns = self.first_column + torch.arange(key_states.shape[-2], device=self.device)
            self.keys.index_copy_(2, columns, key_states)
            self.values.index_copy_(2, columns, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def commit(self, num_columns: int) -> None:
        if self.length == 0 and self.is_initialized and self.first_column is None:
            # A compiled backbone shall take buffers of any length.
            torch._dynamo.maybe_mark_dynamic(self.keys, 2)
            torch._dynamo.maybe_mark_dynamic(self.values, 2)
        self.length += num_columns

    def select(self, rows: torch.Tensor, first: int, stop: int) -> Self:
        layer = type(self)(stop - first)
        layer.length = self.length - first
        if self.is_initialized:
            rows = rows.to(self.device)
            layer.keys, layer.values = self.keys[rows, :, first:stop], self.values[rows, :, first:stop]
            layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        return layer

    def put(self, layers: list[Self], num_rows: list[int], shifts: list[int], length: int) -> None:
        like = next(layer for layer in layers if layer.is_initialized)
        no_columns = (states[:1, :, :0].expand(sum(num_rows), -1, -1, -1) for states in (like.keys, like.values))
        self.lazy_initialization(*no_columns)
        self.length, first = length, 0
        for layer, count, shift in zip(layers, num_rows, shifts, strict=True):
            if layer.is_initialized:
                place = slice(first, first + count), slice(None), slice(shift, shift + layer.length)
                self.keys[place] = layer.keys[:, :, : layer.length]
                self.values[place] = layer.values[:, :, : layer.length]
            first += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_length if self.first_column is not None else self.length + query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        self.length = 0
        if self.first_column is not None:
            # Under a mask a NaN that an earlier call has left would still be multiplied by 0.
            self.keys.zero_()
            self.values.zero_()


class BlockDiffusionCache(Cache):
    """
    The exact prefix cache of [`BlockDiffusionGenerationMixin.generate`].

    Its buffers are made at the first step. With `make_static` they are made at once, and a step finds the columns it
    writes through a tensor, `first_column`: so it can be recorded, and replayed behind a longer prefix. All of a
    static buffer is then attended to, under a mask that hides what is not written yet.

    Args:
        num_layers (`int`): Layers of the backbone.
        max_length (`int`): Columns of the whole canvas, prompt included.
    """

    layers: list[BlockDiffusionLayer]  # type: ignore[assignment]  # transformers' may hold layers of any kind

    def __init__(self, num_layers: int, max_length: int) -> None:
        layers: list[Any] = [BlockDiffusionLayer(max_length) for _ in range(num_layers)]
        super().__init__(layers=layers)
        self.first_column: torch.Tensor | None = None

    def make_static(self, config: PreTrainedConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            config: Of the backbone.
            batch_size: Rows of all branches.
            dtype, device: Of keys and values.
        """
        self.early_initialization(batch_size, config.num_key_value_heads, config.head_dim, dtype, device)
        self.first_column = torch.zeros((), dtype=torch.long, device=device)
        for layer in self.layers:
            layer.first_column = self.first_column

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(2 * layer.keys.nbytes for layer in self.layers if layer.is_initialized)

    def commit(self, num_columns: int) -> None:
        """Keeps the first `num_columns` columns of the last step as part of the prefix."""
        for layer in self.layers:
            layer.commit(num_columns)
        if self.first_column is not None and num_columns:
            self.first_column.fill_(self.layers[0].length)

    def select(self, rows: torch.Tensor, first: int, stop: int) -> Self:
        """A cache of these rows (indices of shape `(rows,)`) and of the columns from `first` to `stop`: a copy."""
        selected = type(self)(len(self.layers), stop - first)
        selected.layers = [layer.select(rows, first, stop) for layer in self.layers]
        return selected

    @classmethod
    def side_by_side(
        cls, caches: list[Self], num_rows: list[int], shifts: list[int], length: int, max_length: int
    ) -> Self:
        """
        The rows of several caches in one.

        Args:
            caches: At least one of them has buffers.
            num_rows: Of each.
            shifts: Columns that each is moved right.
            length: Columns of the prefix they have together.
            max_length: Columns of the whole canvas.
        """
        joined = cls(len(caches[0].layers), max_length)
        for index, layer in enumerate(joined.layers):
            layer.put([cache.layers[index] for cache in caches], num_rows, shifts, length)
        return joined

    def reset(self) -> None:
        """Forgets the prefix; the buffers stay."""
        super().reset()
        if self.first_column is not None:
            self.first_column.zero_()


__all__ = ["BlockDiffusionCache"]
