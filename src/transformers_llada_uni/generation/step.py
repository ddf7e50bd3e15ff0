"""A step of denoising as a program of tensors: backbone, guidance, head, prediction, choice."""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import LogitsProcessorList

from ..masking_block_causal import PrefixMask
from .cache import BlockDiffusionCache
from .credit import CreditDecoding
from .guided_head import GuidedHead
from .policy import CommitPolicy
from .sampling import predict_tokens
from .state import BlockState
from .token_remasking import shares_of_best


Mask = torch.Tensor | BlockMask | PrefixMask


class DenoisingStep:
    """
    Predicts the masks of a block and commits what the policy chooses, in place. It reads no value of a tensor, and
    what changes from step to step it finds in tensors: so a step can be recorded.

    Args:
        backbone: Ids to hidden states, with block-causal attention.
        head ([`GuidedHead`]): Hidden states of all branches to logits.
        policy ([`CommitPolicy`]): What to commit.
        block_length (`int`): Tokens in a block.
        allowed (`tuple[int, int]`, *optional*): First and last-plus-one id that may be predicted; what the head's
            logits are of. Default: all.
        warpers (`LogitsProcessorList`, *optional*): Shape what is sampled from. Default: the most probable token.
        confidence (`str`): What ranks positions, see [`SprintConfig`].
        credit ([`CreditDecoding`], *optional*): What earlier steps add to the logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: GuidedHead,
        policy: CommitPolicy,
        block_length: int,
        allowed: tuple[int, int] | None,
        warpers: LogitsProcessorList | None,
        confidence: str = "low_confidence",
        credit: CreditDecoding | None = None,
    ):
        # What is kept of a model from call to call must not keep the model.
        self._backbone = weakref.ref(backbone)
        self.head, self.policy = head, policy
        self.block_length, self.first_id = block_length, 0 if allowed is None else allowed[0]
        self.warpers, self.confidence, self.credit = warpers, confidence, credit

    def __call__(
        self,
        state: BlockState,
        padding: torch.Tensor,
        cache: BlockDiffusionCache | None = None,
        context: torch.Tensor | None = None,
        mask: Mask | None = None,
        columns: torch.Tensor | None = None,
        on_context: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """
        Args:
            state: The block; changed in place.
            padding: `(branches, rows)`, columns of padding on the left.
            cache: What stands before `context`. The step writes keys and values behind it and commits nothing.
            context: `(branches, rows, columns)`, tokens between the cache and the block.
            mask: What the backbone takes for `attention_mask`.
            columns: `(rows, kept)`, ascending: the columns of the block to predict. Default: all.
            on_context: Called with the hidden states of `context`, `(branches, rows, columns, hidden)`.
        """
        hidden_states = self.forward(state.tokens, padding, cache, context, mask, columns, on_context)
        weights = None
        if state.guidance_weights is not None:
            weights = state.guidance_weights.index_select(0, state.step[None])[0]
            weights = weights[:, None].expand(-1, hidden_states.shape[2]).flatten()
        logits = self.head(hidden_states.flatten(1, 2), weights)
        uniforms = None
        if state.uniforms is not None:
            uniforms = state.uniforms.index_select(0, state.step[None])[0]
            uniforms = (uniforms if columns is None else uniforms.gather(1, columns)).flatten()
        credited = logits if self.credit is None else self.credit(state, logits, columns)
        predictions = predict_tokens(credited, self.warpers, uniforms, self.confidence)
        tokens, probabilities, ranking = (values.view(len(state.masked), -1) for values in predictions)
        tokens = tokens + self.first_id
        if columns is not None:
            tokens = state.tokens[0].scatter(1, columns, tokens)
            nothing = torch.zeros(state.masked.shape, dtype=probabilities.dtype, device=columns.device)
            probabilities = nothing.scatter(1, columns, probabilities)
            ranking = nothing.scatter(1, columns, ranking)
        shares = None
        if self.policy.remasking is not None:
            before = state.before if columns is None else state.before.gather(1, columns)
            shares = shares_of_best(logits, before.flatten() - self.first_id).view_as(before)
            if columns is not None:
                shares = torch.zeros_like(ranking).scatter(1, columns, shares)
        self.policy.update(state, tokens, probabilities, ranking, shares)

    def forward(
        self,
        tokens: torch.Tensor,
        padding: torch.Tensor,
        cache: BlockDiffusionCache | None,
        context: torch.Tensor | None = None,
        mask: Mask | None = None,
        columns: torch.Tensor | None = None,
        on_context: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states `(branches, rows, kept, hidden)` of the columns of `tokens`, all or those of `columns`."""
        num_branches, num_rows, block_length = tokens.shape
        num_context = 0 if context is None else context.shape[-1]
        if context is not None:
            tokens = torch.cat([context, tokens], dim=-1)
        padding = padding.flatten()
        first: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
        if cache is not None and cache.first_column is not None:
            first, mask = cache.first_column, PrefixMask(cache.first_column, padding, self.block_length)
        positions = first + torch.arange(tokens.shape[-1], device=tokens.device)
        positions_to_keep = None if columns is None else (columns + num_context).repeat(num_branches, 1)
        if columns is None and num_context > 0:
            of_block = torch.arange(num_context, num_context + block_length, device=tokens.device)
            positions_to_keep = of_block.expand(num_branches * num_rows, -1)
        # The plain loop, which the caches are held against, computes all that the release computes.
        is_narrow = cache is not None and (context is None or on_context is None)
        backbone = self._backbone()
        assert backbone is not None  # who calls has it
        outputs = backbone(
            input_ids=tokens.flatten(0, 1),
            attention_mask=mask,
            position_ids=(positions - padding[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=False,
            block_length=self.block_length,
            positions_to_keep=positions_to_keep if is_narrow else None,
        )
        # The last layer may be on another device than the tokens (`device_map="auto"`).
        hidden_states = outputs.last_hidden_state.to(tokens.device)
        if context is not None and on_context is not None:
            on_context(hidden_states[:, :num_context].unflatten(0, (num_branches, num_rows)))
        if not is_narrow and positions_to_keep is not None:
            hidden_states = hidden_states.take_along_dim(positions_to_keep[..., None], dim=1)
        return hidden_states.unflatten(0, (num_branches, num_rows))
