"""Monte-Carlo bound on the likelihood of completions, the likelihood itself where it can be had."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..input_checks import check_integer
from ..seeding import seeded_generator
from ..training.objective.block_diffusion import add_block_diffusion_head
from ..unwrapping import input_device, unwrap
from .likelihood_noise import LikelihoodNoise


TokenIds = Sequence[int] | torch.Tensor


class Noise(Protocol):
    """[`LikelihoodNoise`], [`BlockDiffusionNoise`], or what has their `sample`."""

    def sample(
        self,
        labels: torch.Tensor,
        document_ids: torch.Tensor | None,
        block_length: int,
        generator: torch.Generator | list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass
class LikelihoodBound:
    """
    Args:
        log_likelihoods (`torch.FloatTensor` of shape `(completions,)`): For each completion an estimate of a lower
            bound on its log-likelihood, in nats.
        token_log_likelihoods (`list[torch.FloatTensor]`): The share of every token of every completion; they sum up
            to the above.
    """

    log_likelihoods: torch.Tensor
    token_log_likelihoods: list[torch.Tensor]

    def perplexity(self) -> float:
        """Of all tokens together. An upper bound, as the likelihoods are lower bounds."""
        num_tokens = sum(len(tokens) for tokens in self.token_log_likelihoods)
        return float(torch.exp(-self.log_likelihoods.double().sum() / num_tokens))


@torch.no_grad()
def completion_likelihood(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    *,
    block_length: int | None = None,
    num_samples: int = 32,
    noise: Noise | None = None,
    fill_last_block: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    copies_per_forward: int = 8,
    show_progress_bar: bool = False,
) -> LikelihoodBound:
    r"""
    Bounds the log-likelihood of completions, each given its prompt and, block after block, what it says before:

        log p(x) >= sum_b E_S [ w(S) * sum_{i in S} log p(x_i | x^b with S hidden, x^{<b}) ]

    (BD3-LM, arXiv 2503.09573, eq. 8, with the sets S and weights of [`LikelihoodNoise`]). The bound is the mean, over
    all orders in which a block's tokens could be written one by one, of the log-likelihood of writing them so. It is
    computed exactly for blocks with few tokens to predict (at most 5 with 32 samples), and so for the short options of
    multiple choice; for longer ones the estimate is unbiased. With `block_length=1` it is the likelihood, exactly.

    The result for a completion depends on `seed` and on its prompt, not on the batch that it is computed in. Different
    completions of one prompt meet the same noise, so that their comparison is less noisy than either estimate.

    Args:
        model ([`LLaDA2MoeForBlockDiffusion`], [`LLaDAUniForConditionalGeneration`] or a `PeftModel` of one): Is left
            as it is; dropout is off meanwhile.
        prompts, completions: Token ids, one sequence each per completion. A prompt may be empty. Images stand in
            prompts as the tokens of their codes.
        block_length (`int`, *optional*): Default: the model's.
        num_samples (`int`, defaults to 32): Noisy copies of each completion.
        noise (*optional*): Default: `LikelihoodNoise(num_samples)`. To measure the training objective instead, give a
            [`BlockDiffusionNoise`].
        fill_last_block (`bool`, defaults to `True`): Hide what follows the completion in its last block, as `generate`
            and training do. `False`: the last block ends with the completion.
        seed (`int`, defaults to 0): Of the noise.
        batch_size (`int`, defaults to 8): Completions in one forward pass.
        copies_per_forward (`int`, defaults to 8): Noisy copies in one forward pass, each as long as the completion.
            Like `batch_size` it changes memory and speed only.
        show_progress_bar (`bool`, defaults to `False`): Show a bar that counts completions.

    Returns:
        [`LikelihoodBound`], on the CPU.

    Raises:
        ValueError: if `prompts` and `completions` are not equally many, a completion is empty, ids are outside of the
            vocabulary, or a sequence is longer than the model's positions; or a number is below 1.
    """
    model = unwrap(model)
    config = model.config.get_text_config()
    block_length = config.block_length if block_length is None else block_length
    check_integer("block_length", block_length, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("copies_per_forward", copies_per_forward, 1)
    check_integer("seed", seed, 0)
    noise = LikelihoodNoise(num_samples) if noise is None else noise
    prompts, completions = _as_rows("prompts", prompts, config), _as_rows("completions", completions, config)
    _check_pairs(prompts, completions, config)

    # Rows of like lengths together, the longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(completions[i]))
    token_log_likelihoods: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    with (
        _scoring(model),
        tqdm(total=len(order), unit="completion", disable=not show_progress_bar) as progress,
    ):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            pairs = [(prompts[index], completions[index]) for index in indices]
            row_length = block_length if fill_last_block else 1
            batch = _lay_out(pairs, row_length, config.mask_token_id, input_device(model))
            generators = [seeded_generator(seed, zlib.crc32(prompt.numpy().tobytes())) for prompt, _ in pairs]
            log_likelihoods = _score(model, batch, noise, block_length, generators, copies_per_forward).cpu()
            for row, (index, (prompt, completion)) in enumerate(zip(indices, pairs, strict=True)):
                end = len(prompt) + len(completion)
                token_log_likelihoods[index] = log_likelihoods[row, len(prompt) : end].clone()
            progress.update(len(indices))
    return LikelihoodBound(
        log_likelihoods=torch.stack([tokens.sum() for tokens in token_log_likelihoods])
        if token_log_likelihoods
        else torch.empty(0),
        token_log_likelihoods=token_log_likelihoods,
    )


@contextlib.contextmanager
def _scoring(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile `model` is in eval mode and its forward can return the objective's terms."""
    was_training, own_forward = model.training, model.__dict__.get("forward")
    model.eval()
    add_block_diffusion_head(model)
    try:
        yield
    finally:
        del model.forward  # the class's shows again
        if own_forward is not None:
            model.forward = own_forward
        model.train(was_training)


def _lay_out(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], row_length: int, mask_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows `prompt, completion, masks to a multiple of row_length`, padded to the longest."""
    lengths = [-(-(len(prompt) + len(completion)) // row_length) * row_length for prompt, completion in pairs]
    shape = (len(pairs), max(lengths))
    input_ids = torch.full(shape, mask_token_id)
    labels, document_ids = torch.full(shape, -100), torch.full(shape, -1)
    for row, ((prompt, completion), length) in enumerate(zip(pairs, lengths, strict=True)):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.cat([prompt, completion])
        labels[row, len(prompt) : end] = completion
        document_ids[row, :length] = 0
    batch = {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _score(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    noise: Noise,
    block_length: int,
    generators: list[torch.Generator],
    copies_per_forward: int,
) -> torch.Tensor:
    """The share of each token in its row's bound, `(batch, length)`."""
    masked, weights = noise.sample(batch["labels"], batch["document_ids"], block_length, generators)
    is_used = masked.any(dim=2).any(dim=0)  # few tokens need fewer copies
    masked, weights = masked[:, is_used], weights[:, is_used]
    total = torch.zeros(batch["labels"].shape, dtype=torch.float32, device=batch["labels"].device)
    for start in range(0, masked.shape[1], copies_per_forward):
        copies = slice(start, start + copies_per_forward)
        total += model(
            **batch,
            masked=masked[:, copies],
            weights=weights[:, copies],
            block_length=block_length,
            fused_lm_head=True,
        ).log_probs.float()
    return total


def _as_rows(name: str, rows: Sequence[TokenIds], config: PreTrainedConfig) -> list[torch.Tensor]:
    tensors = []
    for number, row in enumerate(rows):
        is_tensor = isinstance(row, torch.Tensor) and row.ndim == 1 and not row.is_floating_point()
        if not is_tensor and not (isinstance(row, Sequence) and all(isinstance(token, int) for token in row)):
            raise ValueError(f"`{name}` must hold sequences of token ids, got {row!r} in row {number}.")
        tensor = torch.as_tensor(row, dtype=torch.long, device="cpu")
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < config.vocab_size:
            raise ValueError(f"Row {number} of `{name}` holds ids outside of the vocabulary of {config.vocab_size}.")
        tensors.append(tensor)
    return tensors


def _check_pairs(prompts: list[torch.Tensor], completions: list[torch.Tensor], config: PreTrainedConfig) -> None:
    if config.mask_token_id is None:
        raise ValueError("`model` has no `mask_token_id` in its configuration.")
    if len(prompts) != len(completions):
        raise ValueError(f"`prompts` has {len(prompts)} rows, but `completions` has {len(completions)}.")
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(completion) == 0:
            raise ValueError(f"Row {number} of `completions` is empty.")
        if (length := len(prompt) + len(completion)) > config.max_position_embeddings:
            raise ValueError(
                f"Prompt and completion {number} have {length} tokens together, more than `max_position_embeddings` "
                f"({config.max_position_embeddings})."
            )


__all__ = ["LikelihoodBound", "completion_likelihood"]
