"""SPRINT, the paper's own acceleration: an approximation that prunes the prefix."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..input_checks import check_integer, check_number
from .cache import BlockDiffusionCache


# Positions that the head is applied to at once: of 173,568 ids these are 89 MB of float32.
POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class SprintConfig:
    """
    SPRINT (Sparse Prefix Retention with Inference-time Non-uniform Token unmasking; arXiv 2604.20796), an
    approximation: the first step of a block sees the whole prefix, the others the most important tokens of it. Every
    step commits all masks above the `threshold`, and at least an even share of those left: `ceil(masks / steps left)`.

    The importance of a token of the prefix is `alpha * norm + (1 - alpha) * confidence`:

    - norm: that of its key, all heads of a layer together, over the mean of the row's prefix; of this ratio the mean
      of all layers. (The keys of LLaDA2 are normalised, so that these ratios are close to 1.)
    - confidence: the most probable id's probability at that position, of all ids, without guidance and temperature,
      where the token itself stands there. In the prompt and in what was generated alike: under the block-causal mask
      it is settled when the token is forwarded behind its block's end, and does not change with the blocks after it.

    Of n tokens `floor(ratio * n)` are kept, at least one; image codes and all others (text) are chosen apart, and each
    branch of guidance has a choice of its own. Three branches fall back to the exact cache.

    What it saves is attention to what is pruned, in all steps of a block but the first. What it costs is the last
    layer at all positions and the head at those of a kind that is pruned, once. Against the exact cache, which does
    not compute the prefix anew either, it gains nothing behind prompts below a few thousand tokens, nor on GPUs where
    the exact cache's steps are recorded: SPRINT's are not. The paper's 1.6x is over a loop without an exact cache.
    On the emoji model, with prompts of 30 tokens, the importance chooses no better than chance.

    Args:
        keep_ratio (`float`, defaults to 0.5): Share of the prefix that is kept.
        image_keep_ratio, text_keep_ratio (`float`, *optional*): The same for image codes and for text alone; the
            paper's gentler setting is 0.8 and 1.0.
        cache_warmup_steps (`int`, defaults to 1): Steps of each block that see the whole prefix.
        importance_alpha (`float`, defaults to 0.5): alpha, above.
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

    def is_pruned(self, is_image: torch.Tensor) -> torch.Tensor:
        """Whether tokens are of a kind that is not kept as a whole, in the shape of `is_image`."""
        return torch.where(is_image, self._ratio_of(True) < 1, self._ratio_of(False) < 1)

    def choose(self, importance: torch.Tensor, is_image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """
        Args:
            importance: `(rows, prefix)`.
            is_image: `(rows, prefix)`, whether a token is an image code.
            visible: `(rows, prefix)`, false for padding.

        Returns:
            `(rows, prefix)`, true for what is kept.
        """
        keep = torch.zeros_like(visible)
        for kind, ratio in ((is_image, self._ratio_of(True)), (~is_image, self._ratio_of(False))):
            candidates = kind & visible
            # 0.29 * 100 is a hair below 29. One at least: a ratio above 0 shall keep something of a kind.
            count = (candidates.sum(dim=-1, keepdim=True) * ratio + 1e-3).floor().clamp(min=1)
            order = importance.masked_fill(~candidates, float("-inf")).argsort(dim=-1, descending=True, stable=True)
            keep |= candidates & (order.argsort(dim=-1) < count)
        return keep

    def _ratio_of(self, is_image: bool) -> float:
        ratio = self.image_keep_ratio if is_image else self.text_keep_ratio
        return self.keep_ratio if ratio is None else ratio


def top_probabilities(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Args:
        head: Hidden states to logits.
        hidden_states: `(positions, hidden)`.

    Returns:
        `(positions,)`, float32: the probability of the most probable id.
    """
    parts = [
        head(part).softmax(dim=-1, dtype=torch.float32).amax(dim=-1) for part in hidden_states.split(POSITIONS_AT_ONCE)
    ]
    return torch.cat(parts).to(hidden_states.device)


def relative_key_norms(cache: BlockDiffusionCache, visible: torch.Tensor) -> torch.Tensor:
    """
    Norms of the keys of a prefix over their mean, the mean of all layers.

    Args:
        cache: Holds the prefix.
        visible: `(rows, prefix)`, false for padding.

    Returns:
        `(rows, prefix)`.
    """
    ratios = torch.zeros_like(visible, dtype=torch.float32)
    for layer in cache.layers:
        dtype = torch.promote_types(layer.dtype, torch.float32)
        norms = torch.linalg.vector_norm(layer.keys[:, :, : layer.length], dim=(1, 3), dtype=dtype).to(ratios)
        mean = (norms * visible).sum(dim=-1, keepdim=True) / visible.sum(dim=-1, keepdim=True)
        ratios += norms / mean / len(cache.layers)
    return ratios


class PrunedCache(BlockDiffusionCache):
    """
    Part of a prefix, and room for one block behind it, which stands where it stands behind the whole prefix.

    Args:
        cache ([`BlockDiffusionCache`]): The whole prefix; it stays as it is.
        keep (`torch.Tensor` of shape `(rows, prefix)`): True for what is kept.
        block_length (`int`): Tokens of the block.

    Attributes:
        is_real: `(rows, kept)`, false where a row keeps less than another.
    """

    def __init__(self, cache: BlockDiffusionCache, keep: torch.Tensor, block_length: int) -> None:
        num_kept = int(keep.sum(dim=-1).max())
        super().__init__(len(cache.layers), num_kept + block_length)
        self.whole_length = cache.get_seq_length()
        # What is kept comes first, in its order.
        columns = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :num_kept]
        self.is_real = keep.gather(-1, columns)
        for layer, whole in zip(self.layers, cache.layers, strict=True):
            layer.lazy_initialization(whole.keys[:, :, :0], whole.values[:, :, :0])
            index = columns.to(whole.device)[:, None, :, None]
            layer.keys[:, :, :num_kept] = whole.keys.take_along_dim(index, dim=2)
            layer.values[:, :, :num_kept] = whole.values.take_along_dim(index, dim=2)
            layer.length = num_kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the whole prefix: positions are counted from it."""
        return self.whole_length


__all__ = ["SprintConfig"]
