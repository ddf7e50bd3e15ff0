"""The loop of the released code, literally: every step forwards all that stands before it and makes all logits."""

import torch

from transformers_llada_uni import LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.generation.sampling import commit_schedule, guided_logits


@torch.no_grad()
def released_loop(
    model: LLaDA2MoeForBlockDiffusion,
    branches: torch.LongTensor,
    num_new_tokens: int,
    num_steps_per_block: int,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    allowed: tuple[int, int] | None = None,
) -> torch.LongTensor:
    """
    Greedy, with a threshold that is never met: each step commits its share of the block, the surest first.

    Args:
        model: The model.
        branches: `(branches, rows, prompt)`, prompts of one length that ends a block: conditional and, with guidance,
            without text.
        num_new_tokens: A multiple of the block length.
        num_steps_per_block: Steps of a block.
        guidance_scale, guidance_rescale: See [`guided_logits`].
        allowed: First and last-plus-one id that may be predicted. Default: all.

    Returns:
        `(rows, num_new_tokens)`.
    """
    config = model.config
    num_branches, num_rows, prompt_length = branches.shape
    block_length, mask_id = config.block_length, config.mask_token_id
    ids = branches.flatten(0, 1)
    ids = torch.cat([ids, ids.new_full((len(ids), num_new_tokens), mask_id)], dim=1)
    blocks = torch.arange(ids.shape[1]) // block_length
    mask = torch.zeros(ids.shape[1], ids.shape[1], dtype=model.dtype)
    mask = mask.masked_fill(blocks[None, :] > blocks[:, None], float("-inf"))[None, None]
    for start in range(prompt_length, ids.shape[1], block_length):
        stop = start + block_length
        positions = torch.arange(stop)[None].expand(len(ids), -1)
        for count in commit_schedule(block_length, num_steps_per_block):
            logits = model(
                ids[:, :stop],
                attention_mask=mask[..., :stop, :stop].expand(len(ids), -1, -1, -1),
                position_ids=positions,
                use_cache=False,
            ).logits[:, start:]
            logits = logits.float().unflatten(0, (num_branches, num_rows)).flatten(1, 2)
            logits = guided_logits(logits, guidance_scale, 0.0, guidance_rescale)
            logits[:, mask_id] = float("-inf")
            if allowed is not None:
                logits[:, : allowed[0]] = logits[:, allowed[1] :] = float("-inf")
            probabilities, tokens = logits.softmax(dim=-1).max(dim=-1)
            masked = ids[:num_rows, start:stop] == mask_id
            confidence = probabilities.view(num_rows, -1).masked_fill(~masked, float("-inf"))
            chosen = confidence.argsort(dim=-1, descending=True, stable=True)[:, :count]
            new_tokens = tokens.view(num_rows, -1).gather(1, chosen)
            ids[:, start:stop].scatter_(1, chosen.repeat(num_branches, 1), new_tokens.repeat(num_branches, 1))
    return ids[:num_rows, prompt_length:]
