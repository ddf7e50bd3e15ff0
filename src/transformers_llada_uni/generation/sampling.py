"""One step of block diffusion as pure functions: guidance, the token of every mask, and which of them to commit."""

import math

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


Generators = torch.Generator | list[torch.Generator] | None


def commit_schedule(block_length: int, num_steps: int, masking_schedule: str = "linear") -> list[int]:
    """
    Positions each step commits.

    Args:
        block_length: Tokens in a block.
        num_steps: Steps of a block.
        masking_schedule: `"linear"`: `block_length // num_steps`, one more in the first `block_length % num_steps`.
            `"cosine"` (MaskGIT, arXiv 2202.04200): after the share r of the steps the share cos(pi r / 2) is still
            masked, but each step commits one position at least. Not more steps than tokens.
    """
    if masking_schedule == "linear":
        base, remainder = divmod(block_length, num_steps)
        return [base + (step < remainder) for step in range(num_steps)]
    counts, left = [], block_length
    for step in range(1, num_steps + 1):
        wanted = int(block_length * math.cos(math.pi / 2 * step / num_steps))
        after = min(max(wanted, num_steps - step), left - 1)
        counts.append(left - after)
        left = after
    return counts


def guided_hidden_states(
    branches: torch.Tensor,
    guidance_scale: float,
    image_guidance_scale: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Classifier-free guidance (arXiv 2207.12598) on anything linear, such as logits or the hidden states before them.

    Args:
        branches: `(branches, masks, width)`: conditional, without text and, with three branches, without image.
        guidance_scale: s_text in u + s_text (c - u) + s_image (u - n).
        image_guidance_scale: s_image.
        weights: `(masks,)`, how far to go from the conditional branch to that, 0 to 1. Default: all the way.

    Returns:
        `(masks, width)`.
    """
    if len(branches) == 1:
        return branches[0]
    conditional, no_text = branches[0], branches[1]
    guided = no_text + guidance_scale * (conditional - no_text)
    if len(branches) == 3:
        guided = guided + image_guidance_scale * (no_text - branches[2])
    # At 0 and 1 this is one or the other, bit for bit.
    return guided if weights is None else torch.lerp(conditional, guided, weights[:, None].to(guided.dtype))


def guided_logits(
    branches: torch.Tensor,
    guidance_scale: float,
    image_guidance_scale: float,
    guidance_rescale: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`guided_hidden_states`] of logits, rescaled to the conditional's spread (arXiv 2305.08891).

    Args:
        branches, guidance_scale, image_guidance_scale: As there, the width being the whole vocabulary.
        guidance_rescale: Share r of the rescaled logits, 0 to 1.
        weights: As there; where they are 0 nothing is rescaled.

    Returns:
        `(masks, vocabulary)`.
    """
    guided = guided_hidden_states(branches, guidance_scale, image_guidance_scale, weights)
    if len(branches) > 1 and guidance_rescale > 0:
        spread = branches[0].std(dim=-1, keepdim=True) / (guided.std(dim=-1, keepdim=True) + 1e-6)
        rescaled = guidance_rescale * guided * spread + (1 - guidance_rescale) * guided
        guided = rescaled if weights is None else torch.where(weights[:, None] > 0, rescaled, guided)
    return guided


def predict_tokens(
    logits: torch.Tensor,
    warpers: LogitsProcessorList | None = None,
    uniforms: torch.Tensor | None = None,
    confidence: str = "low_confidence",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The token of every masked position and how sure the model is of it.

    Args:
        logits: `(masks, vocabulary)`.
        warpers: What shapes the distribution.
        uniforms: `(masks,)`: where from 0 to 1 the token lies in the cumulative distribution. `None`: take the most
            probable one.
        confidence: What ranks positions, see [`SprintConfig`].

    Returns:
        Tokens, their probabilities, and the values to rank positions by, each `(masks,)`.
    """
    if warpers is not None:
        logits = warpers(None, logits)  # type: ignore[arg-type]  # they do not look at ids
    probabilities = logits.softmax(dim=-1)
    if uniforms is None:
        tokens = probabilities.argmax(dim=-1)
    else:
        cumulative = _cumulative_sum(probabilities)
        # Of the sum as it was rounded, so that no number lies behind it; `right`: no token of probability 0 is met.
        reached = uniforms[:, None].to(cumulative.dtype) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, reached, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    token_probabilities = probabilities.gather(-1, tokens[:, None])[:, 0]
    if confidence == "top_k_margin":
        best = probabilities.topk(2, dim=-1).values
        ranking = best[:, 0] - best[:, 1]
    elif confidence == "neg_entropy":
        ranking = -torch.special.entr(probabilities).sum(dim=-1)
    else:
        ranking = token_probabilities
    return tokens, token_probabilities, ranking


def _cumulative_sum(probabilities: torch.Tensor) -> torch.Tensor:
    """Along the last dimension."""
    if not (probabilities.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return probabilities.cumsum(dim=-1)
    return _deterministic_cumulative_sum(probabilities)


def _deterministic_cumulative_sum(values: torch.Tensor) -> torch.Tensor:
    """In float64. torch's own refuses where algorithms have to be deterministic, as it is not on CUDA."""
    total, distance = values.double(), 1
    while distance < total.shape[-1]:
        total = total + F.pad(total[..., :-distance], (distance, 0))
        distance *= 2
    return total


def make_warpers(temperature: float | None, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """transformers' warpers in its own order: temperature, top-k, top-p."""
    warpers = LogitsProcessorList()
    if temperature is not None and temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def select_positions(
    masked: torch.Tensor,
    ranking: torch.Tensor,
    probabilities: torch.Tensor,
    count: int | torch.Tensor,
    threshold: float,
    at_least_count: bool,
) -> torch.Tensor:
    """
    Which masked positions a step commits.

    Args:
        masked: `(rows, block)`.
        ranking, probabilities: `(rows, block)`; only values at masked positions count.
        count: How many to commit, the best by `ranking`: one number, or one of each row, `(rows, 1)`.
        threshold: Positions whose token is more probable than this are sure.
        at_least_count: For text a row with `count` or more sure positions commits just those, else its best `count`.
            For image codes (`True`) both are committed.

    Returns:
        `(rows, block)`, true where the token is committed.
    """
    ranking = ranking.masked_fill(~masked, float("-inf"))
    # How many come before each: fewer launches than sorting twice takes.
    first, second = ranking[:, :, None], ranking[:, None, :]
    is_before = (second > first) | ((second == first) & _is_earlier(ranking.shape[-1], ranking.device))
    best = masked & (is_before.sum(dim=-1) < count)
    sure = masked & (probabilities > threshold)
    if at_least_count:
        return best | sure
    enough = sure.sum(dim=-1, keepdim=True) >= masked.sum(dim=-1, keepdim=True).clamp(max=count)
    return torch.where(enough, sure, best)


def _is_earlier(length: int, device: torch.device) -> torch.Tensor:
    """`(length, length)`, true where the position of the column stands before that of the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)
