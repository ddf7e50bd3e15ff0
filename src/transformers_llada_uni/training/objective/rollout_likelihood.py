"""What trl's GRPO asks a policy for, the log-probabilities of rollouts, estimated by block diffusion."""

import functools
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...generation.trajectory import Trajectory
from ...seeding import seeded_generator
from .block_diffusion import BlockDiffusionTerms, add_block_diffusion_head
from .noise import BlockDiffusionNoise


ESTIMATES = ("full_mask", "elbo", "trace")


@dataclass
class Rollouts:
    """
    What is known of the rollouts that are learnt from, beside their tokens.

    Attributes:
        step: The optimiser step in which they were made.
        trajectories: `ids` and `steps` of a [`Trajectory`]'s row by the row's tokens. Of two rollouts that read the
            same the latter counts for both, which changes no ratio: the old policy is asked about the same.
    """

    step: int = 0
    trajectories: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def record(self, rows: list[list[int]], trajectory: Trajectory | None) -> None:
        """Adds the trajectories of `rows`, the tokens of prompts with their completions, where there are any."""
        if trajectory is None:
            return
        ids, steps = trajectory.ids.cpu(), trajectory.steps.cpu()
        for index, row in enumerate(rows):
            self.trajectories[_key(row)] = ids[index], steps[index]


def _key(row: list[int]) -> bytes:
    return np.array(row).tobytes()


class RolloutLikelihood:
    r"""
    Log-probabilities of the answers y that a policy gave to prompts x, token by token, of which GRPO makes its ratio
    of the new policy to the old one. A masked-diffusion model has no exact ones. See [`LLaDAUniGRPOTrainer`] for what
    the estimates are, and where they come from.

    Args:
        estimate: One of [`ESTIMATES`].
        noise: Which masks `"full_mask"` and `"elbo"` draw, and with what weights.
        block_length, mask_token_id: Of the model.
        seed: Of the run.
        trace_shrinkage: How many neighbouring steps of a block `"trace"` takes for one.
        rollouts: Gives the rollouts that are learnt from at the moment.
        keep_entropy: Whether entropies have a gradient.
    """

    def __init__(
        self,
        estimate: str,
        noise: BlockDiffusionNoise,
        block_length: int,
        mask_token_id: int,
        seed: int,
        trace_shrinkage: int,
        rollouts: Callable[[], Rollouts],
        keep_entropy: bool = False,
    ):
        self.estimate, self.noise, self.seed, self.rollouts = estimate, noise, seed, rollouts
        self.block_length, self.mask_token_id = block_length, mask_token_id
        self.trace_shrinkage, self.keep_entropy = trace_shrinkage, keep_entropy

    def attach(self, model: PreTrainedModel) -> None:
        """
        Makes `model(input_ids, attention_mask, labels, fused_lm_head=True)` return the estimates, which is how trl's
        trainer calls a model after `add_fused_lm_head`: tensors `(batch, length)` with padding before prompts and
        behind answers, labels on answers only, of which come `log_probs` and `entropy` of the same shape.
        """
        add_block_diffusion_head(model)
        objective = model.forward

        @functools.wraps(type(model).forward)
        def forward(_: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return objective(*args, **kwargs)
            return self._estimate(functools.partial(objective, fused_lm_head=True), *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def _estimate(
        self,
        objective: Callable[..., BlockDiffusionTerms],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        **kwargs: Any,
    ) -> BlockDiffusionTerms:
        inputs, places = self.lay_out(input_ids, attention_mask, labels)
        terms = objective(**inputs, block_length=self.block_length, keep_entropy=self.keep_entropy, **kwargs)
        assert terms.log_probs is not None and terms.entropy is not None
        is_answer = labels != -100
        log_probs = terms.log_probs.gather(1, places).masked_fill(~is_answer, 0.0)
        if self.estimate == "elbo":
            # The bound is one of the whole answer. Each token carries its mean, so that trl's ratio of a token, the
            # clipping and the divergence from the reference are those of the answer.
            mean = log_probs.sum(dim=1, keepdim=True) / is_answer.sum(dim=1, keepdim=True).clamp(min=1)
            log_probs = torch.where(is_answer, mean, 0.0)
        entropy = terms.entropy.gather(1, places).masked_fill(~is_answer, 0.0)
        return BlockDiffusionTerms(log_probs=log_probs, entropy=entropy, label_mask=is_answer)

    def lay_out(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """
        Rows without padding in front, extended to whole blocks, and what of them is masked.

        Returns:
            Inputs of the objective, see [`add_block_diffusion_head`], and the places `(batch, length)` where each of
            trl's tokens stands in them.
        """
        is_token = attention_mask.bool()
        num_tokens = is_token.sum(dim=1)
        length = int(num_tokens.max())
        length += -length % self.block_length
        places = (is_token.cumsum(dim=1) - 1).clamp(min=0)
        batch_size, device = len(input_ids), input_ids.device

        # What comes behind an answer in its last block stays masked, as it was when the block was begun.
        rows, columns = is_token.nonzero(as_tuple=True)
        at = rows, places[rows, columns]
        ids = torch.full((batch_size, length), self.mask_token_id, device=device)
        ids[at] = input_ids[rows, columns]
        own_labels = torch.full((batch_size, length), -100, device=device)
        own_labels[at] = labels[rows, columns]
        end = num_tokens + (-num_tokens) % self.block_length
        document_ids = torch.where(torch.arange(length, device=device) < end[:, None], 0, -1)
        inputs: dict[str, Any] = {"labels": own_labels, "document_ids": document_ids}

        keys = [_key(row[:count]) for row, count in zip(ids.tolist(), num_tokens.tolist(), strict=True)]
        if self.estimate == "trace":
            ids, groups = self._follow(ids, own_labels, keys)
            num_copies = int(groups.masked_fill(own_labels == -100, 0).max()) + 1
            groups, copies = groups[:, None], torch.arange(num_copies, device=device)[:, None]
            masked = (groups == copies) & (own_labels != -100)[:, None]
            shown = torch.where(groups >= copies, self.mask_token_id, ids[:, None])
            inputs |= {"masked": masked, "weights": masked.float(), "shown_ids": shown}
        else:
            # Seeded by the row, so that the policies are compared under the same noise.
            step = self.rollouts().step
            generators = [seeded_generator(self.seed, step, zlib.crc32(key)) for key in keys]
            masked, weights = self.noise.sample(own_labels, document_ids, self.block_length, generators)
            inputs |= {"masked": masked, "weights": weights}
        return {"input_ids": ids, **inputs, "skip_empty_copies": True}, places

    def _follow(self, ids: torch.Tensor, labels: torch.Tensor, keys: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows with what their last blocks hold behind the answers, and the group of steps of each token."""
        ids, steps = ids.clone(), torch.full_like(ids, -1)
        trajectories = self.rollouts().trajectories
        for row, key in enumerate(keys):
            if (labels[row] == -100).all():  # an answer that was cut off and is not learnt from
                continue
            own_ids, own_steps = (tensor[: ids.shape[1]] for tensor in trajectories[key])
            ids[row, : len(own_ids)] = own_ids.to(ids.device)
            steps[row, : len(own_steps)] = own_steps.to(ids.device)
        return ids, steps.div(self.trace_shrinkage, rounding_mode="floor")

    def step_weights(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """
        Weights `(batch, length)` under which the mean over an answer's tokens is the mean over the steps (those that
        `trace_shrinkage` takes for one) of the mean over a step's tokens.
        """
        inputs, places = self.lay_out(input_ids, attention_mask, labels)
        masked = inputs["masked"]  # every token once, in the copy of its step
        blocks = masked.unflatten(2, (-1, self.block_length))
        tokens_of_step = blocks.sum(dim=3)
        num_steps = (tokens_of_step > 0).sum(dim=(1, 2))
        share = (blocks / tokens_of_step.clamp(min=1)[..., None]).sum(dim=1).flatten(1)
        weights = share * (masked.sum(dim=(1, 2)) / num_steps.clamp(min=1))[:, None]
        return weights.gather(1, places).masked_fill(labels == -100, 0.0)
