"""SPRINT, the release's own acceleration: an approximation that prunes the prefix."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..input_checks import check_integer, check_number
from .cache import BlockDiffusionCache, BlockDiffusionLayer


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
                check_number(f"{name}` of `cache_config", getattr(self, name), 0.0, 1.0, exclude_minimum=True)
        check_integer("cache_warmup_steps` of `cache_config", self.cache_warmup_steps, minimum=1)
        check_number("importance_alpha` of `cache_config", self.importance_alpha, 0.0, 1.0)
        choices = ("low_confidence", "top_k_margin", "neg_entropy")
        if self.confidence not in choices:
            raise ValueError(f"`confidence` of `cache_config` must be one of {choices}, got {self.confidence!r}.")


class SprintLayer(BlockDiffusionLayer):
    """A layer that can measure how much a block looks at each prefix key, and then attend to some of them only."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        self.observing = False
        self.attention: torch.Tensor  # (rows, prefix), once observed
        # Keys and values that are kept of the prefix, with room for a block behind them
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept is not None:
            for kept, states in zip(self.kept, (key_states, value_states), strict=True):
                kept[:, :, -self.block_length :] = states
            return self.kept
        keys, values = super().update(key_states, value_states)
        if self.observing:
            self.attention = self._attention_to_prefix(kwargs["query_states"], keys)
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
        room = 0, 0, 0, self.block_length
        self.kept = F.pad(self.keys.gather(2, index), room), F.pad(self.values.gather(2, index), room)

    def restore(self) -> None:
        self.kept = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.kept is not None:
            return self.kept[0].shape[-2], 0
        return super().get_mask_sizes(query_length)


class SprintCache(BlockDiffusionCache):
    """[`BlockDiffusionCache`] whose prefix is pruned for part of every block, see [`SprintConfig`]."""

    layers: list[SprintLayer]  # type: ignore[assignment]  # those of its parent are of another kind
    layer_class = SprintLayer

    def __init__(self, num_layers: int, max_length: int) -> None:
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


__all__ = ["SprintCache", "SprintConfig"]
