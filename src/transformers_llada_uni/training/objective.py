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

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from ..input_checks import check_integer, check_shape, check_tensor
from .masking import block_ids_of, create_noisy_clean_mask, positions_of, running_block_ids


# Columns of the vocabulary whose logits exist at one time.
VOCABULARY_TILE = 32768
STATISTICS = ("entropy", "mean_logits", "is_top1")


def document_ids_of(
    labels: torch.LongTensor, attention_mask: torch.Tensor | None = None, position_ids: torch.LongTensor | None = None
) -> torch.LongTensor:
    """
    The number of each token's document, `(batch, length)`, from what trl's collators give: position ids that start
    again with each packed document, or else an attention mask, whose padding gets -1.
    """
    if position_ids is not None:
        return (position_ids == 0).cumsum(dim=1) - 1
    if attention_mask is not None:
        return attention_mask.to(torch.long) - 1
    return torch.zeros_like(labels)


def columns_of_pass(
    labels: torch.LongTensor, document_ids: torch.LongTensor, block_length: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    The columns of a row that a noisy copy needs, those of blocks that hold a token with a label, and the columns that
    the clean part needs, those of blocks with such a block after them in their document.

    Args:
        labels, document_ids: `(batch, length)`.
        block_length: Tokens of a block.

    Returns:
        For the noisy and for the clean part `columns` `(batch, width)`, rising, and `is_real` `(batch, width)`, false
        where a row has fewer than the fullest.
    """
    block_numbers = running_block_ids(positions_of(document_ids), block_length)
    has_label = (labels != -100).to(torch.long)
    labels_in_block = torch.zeros_like(labels).scatter_add_(1, block_numbers, has_label)
    is_noised = labels_in_block.gather(1, block_numbers) > 0
    # Of each document the last block that is noised; documents are counted anew, as their numbers may be anything.
    begins = torch.ones_like(is_noised)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    documents = begins.cumsum(dim=1) - 1
    noised_blocks = torch.where(is_noised, block_numbers, -1)
    last_noised = torch.full_like(labels, -1).scatter_reduce_(1, documents, noised_blocks, "amax")
    is_seen = block_numbers < last_noised.gather(1, documents)
    return _gathered(is_noised, minimum=1), _gathered(is_seen, minimum=0)


def _gathered(is_needed: torch.BoolTensor, minimum: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(int(is_needed.sum(dim=1).max()), minimum)
    # A stable sort puts the needed columns first, in their order.
    columns = torch.sort(is_needed.logical_not().to(torch.uint8), dim=1, stable=True).indices[:, :width]
    return columns, is_needed.gather(1, columns)


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
            compares them under the same noise.
        document_ids: `(batch, length)`, see [`document_ids_of`], which makes them if they are not given.
        block_length: Default: the model's.

    Returns of the call:
        [`trl.trainer.utils.FusedCausalLMOutput`] with `log_probs` `(batch, length)`, the sum over the copies of
        weight times log-probability of the label; `entropy`, `mean_logits` and `is_top1`, of the same shape, their
        means over the copies that mask the token; `label_mask`; and `router_logits` if they were asked for.

    Raises:
        ValueError, TypeError: if `model` has no block-diffusion backbone; in the call, for shapes that do not fit.
    """
    text_config = model.config.get_text_config()
    if text_config.model_type != "llada2_moe":
        raise ValueError(f"`model` must be a LLaDA2 MoE model, got a {type(model).__name__}.")
    plain_forward = model.forward

    # `generate` checks its arguments against the signature of the class.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head:
            return plain_forward(*args, **kwargs)
        return _forward_objective(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@dataclass
class BlockDiffusionTerms(FusedCausalLMOutput):
    """trl's output, with the routers' logits for the trainers that look at them."""

    router_logits: tuple[torch.Tensor, ...] | None = None


def _forward_objective(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    labels: torch.LongTensor,
    masked: torch.BoolTensor | None = None,
    weights: torch.FloatTensor | None = None,
    document_ids: torch.LongTensor | None = None,
    block_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    num_items_in_batch: int | None = None,
    **kwargs,
) -> BlockDiffusionTerms:
    config = model.config.get_text_config()
    block_length = config.block_length if block_length is None else block_length
    _check_inputs(input_ids, labels, masked, weights, block_length)
    if document_ids is None:
        document_ids = document_ids_of(labels, attention_mask, position_ids)
    check_shape("document_ids", document_ids, tuple(input_ids.shape))
    batch_size, length = input_ids.shape
    num_copies = masked.shape[1]

    # 1. The columns of a noisy copy, and of the clean part
    positions = positions_of(document_ids)
    blocks = block_ids_of(positions, block_length)
    (columns, is_real), (clean_columns, is_clean) = columns_of_pass(labels, document_ids, block_length)
    width = columns.shape[1]

    def pick(values: torch.Tensor) -> torch.Tensor:  # [b, r, l] -> [b, r, w]
        return values.gather(2, columns[:, None].expand(-1, values.shape[1], -1))

    def noisy_and_clean(values: torch.Tensor, noisy: torch.Tensor | None = None) -> torch.Tensor:
        noisy = pick(values[:, None]).expand(-1, num_copies, -1) if noisy is None else noisy
        clean = values.gather(1, clean_columns)
        return torch.cat([noisy.reshape(batch_size, num_copies * width), clean], dim=1)  # [b, r * w + c]

    # 2. The row [noisy copies | clean], and who sees whom in it
    masked = masked & (labels != -100)[:, None]
    is_hidden = pick(masked) & is_real[:, None]  # [b, r, w]
    noisy_ids = pick(input_ids[:, None]).expand_as(is_hidden).masked_fill(is_hidden, config.mask_token_id)
    copy_ids = torch.arange(num_copies, device=labels.device)[:, None].expand(batch_size, num_copies, width)
    noisy_documents = pick(document_ids[:, None]).masked_fill(~is_real[:, None], -1).expand_as(is_hidden)
    mask = create_noisy_clean_mask(
        config,
        copy_ids=noisy_and_clean(torch.full_like(input_ids, num_copies), copy_ids),
        block_ids=noisy_and_clean(blocks),
        document_ids=torch.cat(
            [
                noisy_documents.reshape(batch_size, num_copies * width),
                document_ids.gather(1, clean_columns).masked_fill(~is_clean, -1),
            ],
            dim=1,
        ),
        clean_copy=num_copies,
        dtype=model.dtype,
    )
    outputs = model.base_model(
        input_ids=noisy_and_clean(input_ids, noisy_ids),
        attention_mask=mask,
        position_ids=noisy_and_clean(positions),
        **{**kwargs, "use_cache": False},
    )
    hidden_states = outputs.last_hidden_state[:, : num_copies * width].reshape(batch_size, num_copies, width, -1)

    # 3. The head, on hidden tokens only
    row, copy, place = is_hidden.nonzero(as_tuple=True)
    column = columns[row, place]
    log_probs, *statistics = _score(model, hidden_states[row, copy, place], labels[row, column])

    # 4. Back to where the tokens stand, summed over the copies
    flat = row * length + column

    def sum_over_copies(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(batch_size * length).index_add(0, flat, values).view(batch_size, length)

    times_masked = masked.sum(dim=1).clamp(min=1)
    entropy, mean_logits, is_top1 = (sum_over_copies(values) / times_masked for values in statistics)
    return BlockDiffusionTerms(
        log_probs=sum_over_copies(log_probs * weights[row, copy, column].to(log_probs.dtype)),
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=labels != -100,
        router_logits=outputs.router_logits,
    )


def _score(
    model: PreTrainedModel, hidden_states: torch.Tensor, targets: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of `targets` `(tokens,)`: log-probability, entropy, mean logit, and whether it is the likeliest."""
    weight = model.get_output_embeddings().weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if targets.numel() == 0:
        # No token is masked: zero-sized results that still hang on the model, so that `backward` works.
        nothing = hidden_states.float().sum(dim=-1) + weight.float().sum() * 0
        return nothing, nothing.detach(), nothing.detach(), nothing.detach()
    with maybe_gather_lm_head_ctx(weight):
        log_probs, entropy, _, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
            hidden_states, weight, None, targets, 1.0, VOCABULARY_TILE, None, 1.0, STATISTICS
        )
    return log_probs, entropy.detach(), mean_logits, is_top1.to(log_probs.dtype)


def _check_inputs(input_ids, labels, masked, weights, block_length) -> None:
    check_tensor("input_ids", input_ids, (torch.int64,), ndim=2)
    check_tensor("labels", labels, (torch.int64,), ndim=2)
    check_shape("labels", labels, tuple(input_ids.shape))
    check_tensor("masked", masked, (torch.bool,), ndim=3)
    check_shape("masked", masked, (input_ids.shape[0], masked.shape[1], input_ids.shape[1]))
    check_tensor("weights", weights, ndim=3)
    check_shape("weights", weights, tuple(masked.shape))
    check_integer("block_length", block_length, 1)


__all__ = ["add_block_diffusion_head"]
