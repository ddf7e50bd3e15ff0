r"""
The training objective of block diffusion, for every trainer of the language model.

A document x is cut into blocks of B tokens. Block b is noised at a level t to x_t^b, and its masked tokens are
predicted from x_t^b and the clean blocks before it (BD3-LM, arXiv 2503.09573). With w = 1/t,

    L(x) = sum_b E_t [ w(t) * sum_{i in b, masked} -log p(x_i | x_t^b, x^{<b}) ]  >=  -log p(x).

All blocks are learnt in one forward pass over `[noisy_1 | ... | noisy_R | clean]`, where every copy has the position
ids of the document and [`create_noisy_clean_mask`] says who sees whom. Three things keep the pass small:

- the clean part is computed once for all R noisy copies (a complementary pair costs 3 lengths instead of 4);
- only blocks that hold a token with a label are in the noisy copies (not the prompt's), and only blocks that a noisy
  one looks back at are in the clean part (not a document's last);
- the head is applied to masked tokens only, and in tiles of the vocabulary.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from ...attention import can_share_key_value_heads
from ...document_attention import PackedDocuments
from ...input_checks import check_integer, check_shape, check_tensor
from ...weight_hooks import weights_in_place
from .masking import block_ids_of, create_noisy_clean_mask, positions_of, running_block_ids


# Entries of the vocabulary whose logits exist at one time.
VOCABULARY_TILE = 32768
# Tokens whose logits exist at one time, where no gradient is taken.
TOKEN_TILE = 1024
STATISTICS = ("entropy", "mean_logits", "is_top1")


def document_ids_of(
    labels: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The number of each token's document, `(batch, length)`, from what trl's collators give: position ids that start
    again with each packed document, or else an attention mask, whose padding gets -1.
    """
    if position_ids is not None:
        return (position_ids == 0).cumsum(dim=1) - 1
    if attention_mask is not None:
        return attention_mask.to(torch.long) - 1
    return torch.zeros_like(labels)


def tokens_of_pass(
    labels: torch.Tensor,
    document_ids: torch.Tensor,
    num_copies: int,
    block_length: int,
    predicted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What of `[noisy_1 | ... | noisy_R | clean]` has to be computed: of a noisy copy the blocks that hold a token with a
    label, of the clean part the blocks with such a block after them in their document. What is left of a row moves
    together.

    Args:
        labels, document_ids: `(batch, length)`.
        num_copies: R.
        block_length: Tokens of a block.
        predicted: `(batch, copies, length)`; where it is given, a copy leaves out the blocks in which it has none.

    Returns:
        `places`, `copies` and `is_real`, all `(batch, width)`: of each token of the pass its place in the document's
        row, the number of the copy (R for the clean part), and whether it is more than padding.
    """
    length = labels.shape[1]
    positions = positions_of(document_ids)
    block_numbers = running_block_ids(positions, block_length)
    has_label = (labels != -100).to(torch.long)
    labels_in_block = torch.zeros_like(labels).scatter_add_(1, block_numbers, has_label)
    is_noised = labels_in_block.gather(1, block_numbers) > 0
    # Of each document the last block that is noised; documents are counted anew, as their numbers may be anything.
    documents = document_ids_of(labels, position_ids=positions)
    noised_blocks = torch.where(is_noised, block_numbers, -1)
    last_noised = torch.full_like(labels, -1).scatter_reduce_(1, documents, noised_blocks, "amax")
    is_seen = block_numbers < last_noised.gather(1, documents)

    in_copies = is_noised.repeat(1, num_copies)
    if predicted is not None:
        numbers = block_numbers[:, None].expand_as(predicted)
        predicted_in_block = torch.zeros_like(numbers).scatter_add_(2, numbers, predicted.to(torch.long))
        in_copies = (predicted_in_block.gather(2, numbers) > 0).flatten(1)
    is_needed = torch.cat([in_copies, is_seen], dim=1)
    width = max(int(is_needed.sum(dim=1).max()), 1)
    # A stable sort puts what is needed first, in its order.
    order = torch.sort(is_needed.logical_not().to(torch.uint8), dim=1, stable=True).indices[:, :width]
    return order % length, order // length, is_needed.gather(1, order)


def add_block_diffusion_head(model: PreTrainedModel) -> None:
    """
    Gives `model` a forward that returns the objective's terms in place of logits, in the manner (and with the output)
    of trl's `add_fused_lm_head`, which it overrides. Without `fused_lm_head=True` the forward is the model's own. As
    it is the model's forward, it works inside DDP, FSDP and PEFT.

    The new call is `model(input_ids, labels=..., masked=..., weights=..., document_ids=None, block_length=None,
    fused_lm_head=True)`:

    Args of the call:
        input_ids: `(batch, length)`, the clean ids.
        labels: `(batch, length)`, the clean ids where a loss is taken, -100 elsewhere.
        masked, weights: `(batch, copies, length)`, from [`BlockDiffusionNoise.sample`]. Giving the same to two models
            compares them under the same noise. Tokens that are not masked and have a weight are predicted as well.
        shown_ids: `(batch, copies, length)`, what the copies show where they do not mask, see [`TokenCorruption`].
            Default: the clean ids.
        document_ids: `(batch, length)`, see [`document_ids_of`], which makes them if they are not given.
        block_length: Default: the model's.
        keep_entropy: Whether `entropy` has a gradient, and `confidence_loss` is returned, which costs a further
            backward pass through the head.
        predict: Whether `predicted_ids` are returned, and nothing else: what the model itself would put in.
        skip_empty_copies: Whether a block is left out of the copies that predict nothing in it.

    Returns of the call:
        [`trl.trainer.utils.FusedCausalLMOutput`] with `log_probs` `(batch, length)`, the sum over the copies of
        weight times log-probability of the label; `entropy`, `mean_logits` and `is_top1`, of the same shape, their
        means over the copies that mask the token; `label_mask`; `router_logits` if they were asked for; and with
        `keep_entropy` the `confidence_loss` `(batch, length)`, the sum over the copies of weight times the entropy of
        a prediction that is right, 0 where it is not, which has a gradient (LLaDA2.0's loss for parallel decoding,
        arXiv 2512.15745); and with `shown_ids`, of the tokens that are shown wrong, how many there are and how many
        are predicted right, `num_wrong` and `num_repaired`, `(batch, length)`. With `predict` only
        the `predicted_ids` `(batch, copies, length)`, the likeliest token of each masked place and the clean one
        elsewhere, without a gradient.

    Raises:
        ValueError, TypeError: if `model` has no block-diffusion backbone; in the call, for shapes that do not fit.
    """
    text_config = model.config.get_text_config()
    if text_config.model_type != "llada2_moe":
        raise ValueError(f"`model` must be a LLaDA2 MoE model, got a {type(model).__name__}.")
    plain_forward = model.forward

    # `generate` checks its arguments against the signature of the class.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(*args, **kwargs)
        return _forward_objective(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@dataclass
class BlockDiffusionTerms(FusedCausalLMOutput):
    """trl's output, with what only some trainers look at."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    confidence_loss: torch.Tensor | None = None
    num_wrong: torch.Tensor | None = None
    num_repaired: torch.Tensor | None = None
    predicted_ids: torch.Tensor | None = None


def _forward_objective(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    weights: torch.Tensor,
    shown_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    block_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: int | None = None,
    keep_entropy: bool = False,
    predict: bool = False,
    skip_empty_copies: bool = False,
    **kwargs: Any,
) -> BlockDiffusionTerms:
    config = model.config.get_text_config()
    block_length = config.block_length if block_length is None else block_length
    _check_inputs(input_ids, labels, masked, weights, block_length)
    if document_ids is None:
        document_ids = document_ids_of(labels, attention_mask, position_ids)
    check_shape("document_ids", document_ids, tuple(input_ids.shape))
    batch_size, length = input_ids.shape
    num_copies = masked.shape[1]

    # 1. What has to be computed of [noisy copies | clean]
    has_label = (labels != -100)[:, None]
    masked, predicted = masked & has_label, (masked | (weights > 0)) & has_label
    wanted = predicted if skip_empty_copies else None
    places, copies, is_real = tokens_of_pass(labels, document_ids, num_copies, block_length, wanted)
    positions = positions_of(document_ids)
    if shown_ids is not None:
        check_shape("shown_ids", shown_ids, tuple(masked.shape))
    shown = input_ids[:, None].expand_as(masked) if shown_ids is None else shown_ids

    def of_pass(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return torch.cat([noisy, clean[:, None]], dim=1).flatten(1).gather(1, copies * length + places)

    nothing = torch.zeros_like(labels, dtype=torch.bool)
    is_predicted = of_pass(predicted, nothing) & is_real
    ids = of_pass(shown.masked_fill(masked, config.mask_token_id), input_ids)

    # 2. That row, and who sees whom in it
    document_ids_of_pass = document_ids.gather(1, places).masked_fill(~is_real, -1)
    mask = create_noisy_clean_mask(
        config,
        copy_ids=copies,
        block_ids=block_ids_of(positions, block_length).gather(1, places),
        document_ids=document_ids_of_pass,
        clean_copy=num_copies,
        dtype=model.dtype,
    )
    if isinstance(mask, torch.Tensor) and can_share_key_value_heads(config._attn_implementation, ids, mask):
        kwargs["documents"] = PackedDocuments.of(document_ids_of_pass, mask)
    outputs = model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions.gather(1, places),
        **{**kwargs, "use_cache": False},
    )

    # 3. The head, on predicted tokens only
    row, index = is_predicted.nonzero(as_tuple=True)
    place, copy = places[row, index], copies[row, index]
    hidden_states = outputs.last_hidden_state.to(row.device)[row, index]  # a model may lie on several devices
    if predict:
        predicted_ids = input_ids[:, None].repeat(1, num_copies, 1)
        predicted_ids[row, copy, place] = _likeliest(model, hidden_states)
        return BlockDiffusionTerms(predicted_ids=predicted_ids)
    log_probs, entropy, mean_logits, is_top1 = _score(model, hidden_states, labels[row, place], keep_entropy)

    # 4. Back to where the tokens stand, summed over the copies
    flat = row * length + place

    def sum_over_copies(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(batch_size * length).index_add(0, flat, values).view(batch_size, length)

    weights_of_predicted = weights[row, copy, place].to(log_probs.dtype)
    confidence_loss = sum_over_copies(entropy * is_top1 * weights_of_predicted) if keep_entropy else None
    is_masked, times_masked = masked[row, copy, place], masked.sum(dim=1).clamp(min=1)
    num_wrong = num_repaired = None
    if shown_ids is not None:
        is_wrong = (ids[row, index] != labels[row, place]) & ~is_masked
        num_wrong, num_repaired = sum_over_copies(is_wrong.to(log_probs.dtype)), sum_over_copies(is_top1 * is_wrong)
    entropy, mean_logits, is_top1 = (
        sum_over_copies(values * is_masked) / times_masked for values in (entropy, mean_logits, is_top1)
    )
    return BlockDiffusionTerms(
        log_probs=sum_over_copies(log_probs * weights_of_predicted),
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=labels != -100,
        router_logits=outputs.router_logits,
        confidence_loss=confidence_loss,
        num_wrong=num_wrong,
        num_repaired=num_repaired,
    )


def _score(
    model: PreTrainedModel, hidden_states: torch.Tensor, targets: torch.Tensor, keep_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Of each of `targets` `(tokens,)`: log-probability, entropy (with a gradient where it is wanted), mean logit, and
    whether it is the likeliest.
    """
    head = model.get_output_embeddings()
    with weights_in_place(head):
        weight = head.weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if targets.numel() == 0:
            # No token is masked: zero-sized results that still hang on the model, so that `backward` works.
            nothing = hidden_states.float().sum(dim=-1) + (weight.float().sum() * 0).to(hidden_states.device)
            return nothing, nothing.detach(), nothing.detach(), nothing.detach()
        with maybe_gather_lm_head_ctx(weight):
            states, of_head = hidden_states.to(weight.device), targets.to(weight.device)
            with torch.cuda.device_of(weight):  # where trl's kernel is launched
                log_probs, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
                    states, weight, None, of_head, 1.0, VOCABULARY_TILE, None, 1.0, STATISTICS
                )
            found = (log_probs, entropy, mean_logits, is_top1)
            log_probs, entropy, mean_logits, is_top1 = (values.to(targets.device) for values in found)
    return log_probs, entropy if keep_entropy else entropy.detach(), mean_logits, is_top1.to(log_probs.dtype)


def never_shown(model: PreTrainedModel) -> list[int]:
    """What may not stand where a token is: the mask, and the place of an image whose pixels would be missing."""
    placeholder = getattr(model.config, "image_token_id", None)
    return [model.config.get_text_config().mask_token_id, *([] if placeholder is None else [placeholder])]


@torch.no_grad()
def _likeliest(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each of `hidden_states` `(tokens, width)`, without [`never_shown`]; `(tokens,)`."""
    head = model.get_output_embeddings()
    tokens = []
    with weights_in_place(head):
        weight = head.weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        with maybe_gather_lm_head_ctx(weight):
            for tile in hidden_states.split(TOKEN_TILE):
                logits = F.linear(tile.to(weight.device), weight.to(tile.dtype))
                logits[:, never_shown(model)] = -torch.inf
                tokens.append(logits.argmax(dim=-1).to(tile.device))
    return torch.cat(tokens)


def _check_inputs(input_ids: Any, labels: Any, masked: Any, weights: Any, block_length: Any) -> None:
    check_tensor("input_ids", input_ids, (torch.int64,), ndim=2)
    check_tensor("labels", labels, (torch.int64,), ndim=2)
    check_shape("labels", labels, tuple(input_ids.shape))
    check_tensor("masked", masked, (torch.bool,), ndim=3)
    check_shape("masked", masked, (input_ids.shape[0], masked.shape[1], input_ids.shape[1]))
    check_tensor("weights", weights, ndim=3)
    check_shape("weights", weights, tuple(masked.shape))
    check_integer("block_length", block_length, 1)
