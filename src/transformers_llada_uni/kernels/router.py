"""The router of the experts: its product in one launch, its choice in another."""

import torch
import triton
import triton.language as tl


# Tokens, experts and hidden channels of a tile. Few tokens want many small programs, as each walks the whole hidden
# size and the time is that of the walk; many want large ones, which read less. In float32, without tensor cores,
# products are unrolled into single operations, and large ones would take long to compile.
FEW_TOKENS = 256
TILE_OF_FEW_TOKENS = (16, 32, 256)
TILE_OF_MANY_TOKENS = (64, 64, 128)
TILE_IN_FLOAT32 = (16, 32, 32)


def router_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    The product with the router's weight in float32. Products of two numbers in half precision are exact in it, so it
    does not matter that they are multiplied as they are, where the model converts both first. No gradients.

    Args:
        hidden: `(tokens, hidden_size)`, contiguous, bfloat16, float16 or float32.
        weight: `(experts, hidden_size)`, contiguous, of the same dtype.

    Returns:
        `(tokens, experts)`, float32.
    """
    tokens, hidden_size = hidden.shape
    experts = len(weight)
    assert weight.shape == (experts, hidden_size) and weight.dtype == hidden.dtype
    assert hidden.is_contiguous() and weight.is_contiguous()
    logits = hidden.new_empty(tokens, experts, dtype=torch.float32)
    if hidden.dtype == torch.float32:
        block_tokens, block_experts, block_channels = TILE_IN_FLOAT32
    else:
        block_tokens, block_experts, block_channels = (
            TILE_OF_FEW_TOKENS if tokens <= FEW_TOKENS else TILE_OF_MANY_TOKENS
        )
    if tokens > 0:
        _router_logits_kernel[(triton.cdiv(tokens, block_tokens), triton.cdiv(experts, block_experts))](
            hidden,
            weight,
            logits,
            tokens,
            experts,
            hidden_size,
            block_tokens,
            block_experts,
            block_channels,
            num_warps=4,
            num_stages=4,
        )
    return logits


def choose_experts(
    router_logits: torch.Tensor, expert_bias: torch.Tensor, n_group: int, topk_group: int, top_k: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What `LLaDA2MoeTopkRouter` does behind its product (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): the best groups
    by the sum of their two best biased scores, the best experts in these by biased scores, weighted by the unbiased
    ones, which are made to sum to `scaling`. No gradients.

    Of equal scores that of the lowest index is taken first. Scores that are NaN are never preferred; a token that has
    no others gets valid indices, and weights that are NaN.

    Args:
        router_logits: `(tokens, experts)`, float32, contiguous.
        expert_bias: `(experts,)`, float32.
        n_group: Groups of experts, each of at least two; divides their number.
        topk_group: Groups that are kept.
        top_k: Experts of a token, at most those of the groups kept.
        scaling: Sum of a token's weights.

    Returns:
        Weights, float32, and indices, int64, `(tokens, top_k)`, best biased score first.
    """
    tokens, experts = router_logits.shape
    assert router_logits.dtype == expert_bias.dtype == torch.float32 and router_logits.is_contiguous()
    assert expert_bias.shape == (experts,) and experts % n_group == 0 and experts >= 2 * n_group
    assert topk_group <= n_group and top_k <= experts // n_group * topk_group
    weights = router_logits.new_empty(tokens, top_k)
    index = router_logits.new_empty(tokens, top_k, dtype=torch.int64)
    if tokens > 0:
        _choose_experts_kernel[(tokens,)](
            router_logits,
            expert_bias,
            weights,
            index,
            scaling,
            n_group,
            experts // n_group,
            topk_group,
            top_k,
            triton.next_power_of_2(n_group),
            triton.next_power_of_2(experts // n_group),
            triton.next_power_of_2(top_k),
            num_warps=1,
        )
    return weights, index


@triton.jit(do_not_specialize=["num_tokens"])
def _router_logits_kernel(
    hidden,
    weight,
    logits,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    is_token, is_expert = (token < num_tokens)[:, None], (expert < NUM_EXPERTS)[:, None]
    token_states = hidden + token[:, None].to(tl.int64) * HIDDEN_SIZE
    expert_weights = weight + expert[:, None] * HIDDEN_SIZE
    tile = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_CHANNELS):
        channel = (start + tl.arange(0, BLOCK_CHANNELS))[None, :]
        is_channel = channel < HIDDEN_SIZE
        tile_states = tl.load(token_states + channel, mask=is_token & is_channel, other=0.0)
        tile_weights = tl.load(expert_weights + channel, mask=is_expert & is_channel, other=0.0)
        tile = tl.dot(tile_states, tl.trans(tile_weights), tile, input_precision="ieee")
    offset = token[:, None].to(tl.int64) * NUM_EXPERTS + expert[None, :]
    tl.store(logits + offset, tile, mask=is_token & (expert < NUM_EXPERTS)[None, :])


@triton.jit
def _choose_experts_kernel(
    logits,
    bias,
    weights,
    index,
    scaling,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
):
    """One program a token: its experts as a matrix of groups, of which the best is taken again and again."""
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_EXPERTS)
    expert = group[:, None] * GROUP_SIZE + member[None, :]
    is_expert = (group < GROUPS)[:, None] & (member < GROUP_SIZE)[None, :]
    score = tl.sigmoid(tl.load(logits + token * (GROUPS * GROUP_SIZE) + expert, mask=is_expert, other=0.0))
    biased = score + tl.load(bias + expert, mask=is_expert, other=0.0)
    biased = tl.where(is_expert & (biased == biased), biased, float("-inf"))

    best, best_member = tl.max(biased, axis=1, return_indices=True)
    second = tl.max(tl.where(member[None, :] == best_member[:, None], float("-inf"), biased), axis=1)
    group_score = tl.where(group < GROUPS, best + second, float("-inf"))
    is_kept = group < 0
    for _ in tl.static_range(KEPT_GROUPS):
        best_group = tl.argmax(tl.where(is_kept, float("-inf"), group_score), axis=0)
        is_kept = is_kept | (group == best_group)

    choice = tl.reshape(tl.where(is_kept[:, None], biased, float("-inf")), [BLOCK_GROUPS * BLOCK_EXPERTS])
    score = tl.reshape(score, [BLOCK_GROUPS * BLOCK_EXPERTS])
    place = tl.arange(0, BLOCK_GROUPS * BLOCK_EXPERTS)
    rank = tl.arange(0, BLOCK_TOP_K)
    chosen_score = tl.zeros((BLOCK_TOP_K,), tl.float32)
    chosen_place = tl.zeros((BLOCK_TOP_K,), tl.int32)
    for k in tl.static_range(TOP_K):
        best_place = tl.argmax(choice, axis=0)
        best_score = tl.sum(tl.where(place == best_place, score, 0.0), axis=0)
        chosen_place = tl.where(rank == k, best_place, chosen_place)
        chosen_score = tl.where(rank == k, best_score, chosen_score)
        choice = tl.where(place == best_place, float("-inf"), choice)

    chosen_weight = chosen_score / (tl.sum(chosen_score, axis=0) + 1e-20) * scaling
    chosen_expert = chosen_place // BLOCK_EXPERTS * GROUP_SIZE + chosen_place % BLOCK_EXPERTS
    tl.store(weights + token * TOP_K + rank, chosen_weight, mask=rank < TOP_K)
    tl.store(index + token * TOP_K + rank, chosen_expert.to(tl.int64), mask=rank < TOP_K)
