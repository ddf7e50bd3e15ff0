"""What a step of block diffusion reads and writes: keys and values of the prefix, exact, static, or SPRINT's."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .input_checks import check_integer, check_number


class BlockDiffusionLayer(CacheLayerMixin):
    """
    Keys and values of one layer in a buffer of fixed size.

    Under the block-causal mask the keys and values of finished blocks never change. A step writes those of the
    columns it forwards behind the committed prefix and attends to both; `commit` then decides how many of them stay.
    Whatever is not committed is overwritten by the next step, so nothing is copied or concatenated.
    """

    is_croppable = False

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, num_heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch_size, num_heads, self.max_length, head_dim)
        self.values = value_states.new_zeros(batch_size, num_heads, self.max_length, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def commit(self, num_columns: int) -> None:
        if self.length == 0 and self.is_initialized:
            # A compiled backbone shall take buffers of any length.
            torch._dynamo.maybe_mark_dynamic(self.keys, 2)
            torch._dynamo.maybe_mark_dynamic(self.values, 2)
        self.length += num_columns

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        self.length = 0


class BlockDiffusionCache(Cache):
    """
    The exact prefix cache of [`BlockDiffusionGenerationMixin.generate`].

    Args:
        num_layers (`int`): Layers of the backbone.
        max_length (`int`): Columns of the whole canvas, prompt included. All memory is taken at the first step.
    """

    layer_class = BlockDiffusionLayer

    def __init__(self, num_layers: int, max_length: int):
        super().__init__(layers=[self.layer_class(max_length) for _ in range(num_layers)])

    def commit(self, num_columns: int) -> None:
        """Keeps the first `num_columns` columns of the last step as part of the prefix."""
        for layer in self.layers:
            layer.commit(num_columns)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps the rows of these indices (shape `(rows,)`), when others have ended."""
        for layer in self.layers:
            layer.select_rows(rows)


class StaticBlockDiffusionLayer(BlockDiffusionLayer):
    """The whole buffer is attended to, and where a step writes is a tensor, which a recorded graph reads anew."""

    first_column: torch.Tensor  # of the next step, the same tensor in all layers

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # A graph that writes into a buffer which may move would not be recorded.
        torch._dynamo.mark_static_address(self.keys)
        torch._dynamo.mark_static_address(self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = self.first_column + torch.arange(key_states.shape[-2], device=self.device)
        self.keys.index_copy_(2, columns, key_states.to(self.dtype))
        self.values.index_copy_(2, columns, value_states.to(self.dtype))
        # Mixed precision computes in another type than that of the weights, which the buffers have.
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def commit(self, num_columns: int) -> None:
        self.length += num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0


class StaticBlockDiffusionCache(BlockDiffusionCache):
    """
    As exact as [`BlockDiffusionCache`], with buffers whose shapes and addresses stay from step to step and from call
    to call, as CUDA graphs need it. Every step must come with a 4-D mask that hides what is not written yet.

    Args:
        config (`PreTrainedConfig`): Of the backbone.
        batch_size (`int`): Rows of all branches.
        max_length (`int`): Columns of the canvas. The buffers are longer, up to a multiple of 256, so that canvases of
            different lengths share them.
        dtype (`torch.dtype`), device (`torch.device`): Of keys and values.
    """

    layer_class = StaticBlockDiffusionLayer

    def __init__(
        self, config: PreTrainedConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(config.num_hidden_layers, (max_length // 256 + 1) * 256)
        # Not at the first step: what is made within a graph is overwritten by its next run.
        self.early_initialization(batch_size, config.num_key_value_heads, config.head_dim, dtype, device)
        self.first_column = torch.zeros((), dtype=torch.long, device=device)
        for layer in self.layers:
            layer.first_column = self.first_column

    def will_do(self, num_columns: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it can be used again for a canvas of so many columns."""
        keys = self.layers[0].keys
        is_alike = keys.dtype == dtype and keys.device == device
        return is_alike and num_columns < keys.shape[2] and keys.is_inference() == torch.is_inference_mode_enabled()

    def commit(self, num_columns: int) -> None:
        super().commit(num_columns)
        self.first_column += num_columns

    def reset(self) -> None:
        super().reset()
        self.first_column.zero_()


@dataclass(frozen=True)
class SprintConfig:
    """
    SPRINT, the release's own acceleration (Sparse Prefix Retention with Inference-time Non-uniform Token unmasking).
    An approximation: after the first steps of a block the rest of its steps see only the most important part of the
    prefix, and a block is filled in as evenly as its steps allow.

    Args:
        keep_ratio (`float`, defaults to 0.5): Share of the prefix that is kept.
        image_keep_ratio, text_keep_ratio (`float`, *optional*): The same for image codes and for text alone.
        cache_warmup_steps (`int`, defaults to 1): Steps of each block that see the whole prefix.
        importance_alpha (`float`, defaults to 0.5): Importance of a prefix token is
            `alpha * confidence + (1 - alpha) * attention`: the probability it was committed with (1 for tokens of the
            prompt), and how much the block looks at its key, over all heads and layers, relative to the largest.
        confidence (`str`, defaults to `"low_confidence"`): What ranks the masked positions: the token's probability,
            `"top_k_margin"` (lead over the second best) or `"neg_entropy"`.

    Raises:
        ValueError: if a value is out of its range.
    """

    keep_ratio: float = 0.5
    image_keep_ratio: float | None = None
    text_keep_ratio: float | None = None
    cache_warmup_steps: int = 1
    importance_alpha: float = 0.5
    confidence: Literal["low_confidence", "top_k_margin", "neg_entropy"] = "low_confidence"

    def __post_init__(self) -> None:
        for name in ("keep_ratio", "image_keep_ratio", "text_keep_ratio"):
            if name == "keep_ratio" or getattr(self, name) is not None:
                check_number(f"{name}` of `cache_config", getattr(self, name), 0.0, 1.0, exclude_low=True)
        check_integer("cache_warmup_steps` of `cache_config", self.cache_warmup_steps, minimum=1)
        check_number("importance_alpha` of `cache_config", self.importance_alpha, 0.0, 1.0)
        choices = ("low_confidence", "top_k_margin", "neg_entropy")
        if self.confidence not in choices:
            raise ValueError(f"`confidence` of `cache_config` must be one of {choices}, got {self.confidence!r}.")


class SprintLayer(BlockDiffusionLayer):
    """A layer that can measure how much a block looks at each prefix key, and then attend to some of them only."""

    def __init__(self, max_length: int):
        super().__init__(max_length)
        self.observing = False
        self.attention = None  # (rows, prefix) while observing
        self.kept_keys = self.kept_values = None  # what is kept of the prefix, and room for a block behind it

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, query_states: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept_keys is not None:
            self.kept_keys[:, :, -self.block_length :] = key_states
            self.kept_values[:, :, -self.block_length :] = value_states
            return self.kept_keys, self.kept_values
        keys, values = super().update(key_states, value_states)
        if self.observing:
            self.attention = self._attention_to_prefix(query_states, keys)
        return keys, values

    def _attention_to_prefix(self, query_states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mean over heads and queries of the attention the block pays to each column before it: `(rows, prefix)`."""
        queries = query_states[:, :, -self.block_length :]
        grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # (rows, key heads, group * block, dim)
        scores = grouped @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        hidden = ~self.visible[:, None, None, : keys.shape[-2]]
        weights = scores.float().masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return weights.mean(dim=(1, 2))[:, : keys.shape[-2] - self.block_length]

    def observe(self, visible: torch.Tensor, block_length: int) -> None:
        self.observing, self.visible, self.block_length = True, visible, block_length

    def keep(self, columns: torch.Tensor) -> None:
        """Attend to these columns, `(rows, kept)`, until `restore`."""
        self.observing = False
        index = columns[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        self.kept_keys, self.kept_values = (
            F.pad(states.gather(2, index), (0, 0, 0, self.block_length)) for states in (self.keys, self.values)
        )

    def restore(self) -> None:
        self.kept_keys = self.kept_values = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.kept_keys is not None:
            return self.kept_keys.shape[-2], 0
        return super().get_mask_sizes(query_length)


class SprintCache(BlockDiffusionCache):
    """[`BlockDiffusionCache`] whose prefix is pruned for part of every block, see [`SprintConfig`]."""

    layer_class = SprintLayer

    def __init__(self, num_layers: int, max_length: int):
        super().__init__(num_layers, max_length)
        # (rows, kept) while the prefix is pruned, false where a row keeps fewer columns than another
        self.kept_is_real: torch.Tensor | None = None

    def observe(self, visible: torch.Tensor, block_length: int) -> None:
        """From the next step on measure the attention of the last `block_length` columns; `visible`: (rows, all)."""
        for layer in self.layers:
            layer.observe(visible, block_length)

    def prune(
        self, config: SprintConfig, confidence: torch.Tensor, is_image: torch.Tensor, visible: torch.Tensor
    ) -> None:
        """
        Chooses what the rest of the block's steps see of the prefix.

        Args:
            config: Ratios and weights.
            confidence: `(rows, prefix)`, the probability each prefix token was committed with.
            is_image: `(rows, prefix)`, whether it is an image code.
            visible: `(rows, prefix)`, false for padding.
        """
        attention = torch.stack([layer.attention.to(confidence.device) for layer in self.layers]).mean(dim=0)
        attention = attention / attention.amax(dim=-1, keepdim=True).clamp(min=1e-9)
        alpha = config.importance_alpha
        importance = alpha * confidence + (1 - alpha) * attention
        keep = torch.zeros_like(visible)
        for kind, ratio in ((is_image, config.image_keep_ratio), (~is_image, config.text_keep_ratio)):
            ratio = config.keep_ratio if ratio is None else ratio
            candidates = kind & visible
            count = torch.ceil(candidates.sum(dim=-1, keepdim=True) * ratio)
            order = importance.masked_fill(~candidates, float("-inf")).argsort(dim=-1, descending=True, stable=True)
            keep |= candidates & (order.argsort(dim=-1) < count)
        kept = int(keep.sum(dim=-1).max())
        # Kept columns first, in their order; rows that keep fewer are filled up with hidden ones.
        columns = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :kept]
        for layer in self.layers:
            layer.keep(columns.to(layer.keys.device))
        self.kept_is_real = keep.gather(-1, columns)

    def restore(self) -> None:
        """The next step sees the whole prefix again."""
        self.kept_is_real = None
        for layer in self.layers:
            layer.restore()


__all__ = ["BlockDiffusionCache", "SprintCache", "SprintConfig"]
