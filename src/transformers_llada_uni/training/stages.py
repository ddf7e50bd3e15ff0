"""
The three stages a lab walks through, as presets: what is trained, from which mix of tasks, with which blocks.

- `"alignment"` trains embeddings and head, so that the new image codes find their place beside the words; from
  images with captions and some text. Blocks grow from 1 token to 32.
- `"pretraining"` trains the whole language model; from text, captions in both directions, edits and interleaved
  documents. Blocks grow here too.
- `"supervised_finetuning"` trains the whole language model except its routers; from conversations, text-to-image and
  edits, with complementary masks.

The order follows the release (arXiv 2604.20796); what is frozen, learning rates and shares are starting points of
ours. The growth of the blocks from autoregression (a block of one token) is that of LLaDA2.0
(arXiv 2512.15745), and so are the complementary masks of fine-tuning.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..input_checks import check_integer, check_number


# What a parameter's name says it belongs to; the first that matches.
PARTS = {
    "image_tokenizer": r"(^|\.)(visual|vqmodel)\.",
    "embeddings": r"(^|\.)word_embeddings\.",
    "head": r"(^|\.)lm_head\.",
    "attention": r"\.attention\.",
    "router": r"\.mlp\.gate\.",
    "experts": r"\.mlp\.(experts|shared_experts)\.",
    "dense_mlp": r"\.mlp\.",
    "norms": r"norm\.",
}
LANGUAGE_MODEL = tuple(part for part in PARTS if part != "image_tokenizer")


@dataclass(frozen=True)
class Stage:
    """
    What a stage sets where the user does not.

    Args:
        trained_parts: Names among `LANGUAGE_MODEL`; all else is frozen.
        task_mix: Share of each task, for a `train_dataset` that is a dict of datasets by task.
        learning_rate: The peak.
        block_length_warmup_steps: See [`block_length_at`]; below 1 a share of all steps.
        expert_bias_update_rate: See [`RouterBalancing`]. DeepSeek-V3 (arXiv 2412.19437, section 4.2) keeps 1e-3 for
            nearly all of pre-training and 0 at its end.
        complementary: Whether every noisy copy comes with its complement.
        length_weighting: See [`length_weights`]. The paper's (arXiv 2604.20796, eq. 6), in all its stages.
        packing: Whether documents share rows.
    """

    trained_parts: tuple[str, ...]
    learning_rate: float
    block_length_warmup_steps: float
    expert_bias_update_rate: float
    complementary: bool
    packing: bool
    length_weighting: bool = True
    task_mix: dict[str, float] = field(default_factory=dict)


STAGES = {
    "alignment": Stage(
        trained_parts=("embeddings", "head"),
        learning_rate=1e-3,
        block_length_warmup_steps=0.5,
        expert_bias_update_rate=0.0,
        complementary=False,
        packing=True,
        task_mix={"text_to_image": 0.4, "understanding": 0.4, "text": 0.2},
    ),
    "pretraining": Stage(
        trained_parts=LANGUAGE_MODEL,
        learning_rate=1e-4,
        block_length_warmup_steps=0.1,
        expert_bias_update_rate=1e-3,
        complementary=False,
        packing=True,
        task_mix={"text": 0.3, "text_to_image": 0.3, "understanding": 0.25, "editing": 0.1, "interleaved": 0.05},
    ),
    "supervised_finetuning": Stage(
        trained_parts=tuple(part for part in LANGUAGE_MODEL if part != "router"),
        learning_rate=2e-5,
        block_length_warmup_steps=0,
        expert_bias_update_rate=0.0,
        complementary=True,
        packing=False,
        task_mix={"text": 0.25, "understanding": 0.3, "text_to_image": 0.25, "editing": 0.15, "interleaved": 0.05},
    ),
}


def part_of(name: str) -> str:
    """The part in `PARTS` a parameter of the model belongs to. Raises ValueError if it belongs to none."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    raise ValueError(f"`{name}` is no parameter of a LLaDA2.0-Uni model.")


def check_parts(name: str, parts: Iterable[str]) -> None:
    """Raises ValueError, naming the argument, for a part that the language model does not have, or none at all."""
    parts = list(parts)
    unknown = [part for part in parts if part not in LANGUAGE_MODEL]
    if unknown or not parts:
        raise ValueError(f"`{name}` must name parts among {', '.join(LANGUAGE_MODEL)}, got {unknown or parts!r}.")


def freeze_all_but(model: nn.Module, trained_parts: Iterable[str]) -> None:
    """Sets which parameters of `model` take gradients: those of `trained_parts`, and no others."""
    trained_parts = set(trained_parts)
    check_parts("trained_parts", trained_parts)
    for name, parameter in model.named_parameters():
        is_trained = part_of(name) in trained_parts
        if is_trained and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"`trained_parts` holds {part_of(name)!r}, but `{name}` is quantised and takes no gradient; train an "
                "adapter (`peft_config`) instead."
            )
        parameter.requires_grad_(is_trained)


def check_warmup(name: str, warmup_steps: float, block_length: int) -> None:
    """Raises ValueError, naming the argument, if blocks cannot grow to `block_length` by doubling."""
    check_number(name, warmup_steps, 0.0)
    if warmup_steps and block_length & (block_length - 1):
        raise ValueError(
            f"`{name}` must be 0 for a block length of {block_length}: blocks grow through the powers of two."
        )


def block_length_at(step: int, max_steps: int, warmup_steps: float, block_length: int) -> int:
    """
    The block length of a training step: 1, 2, 4, ..., `block_length`, each of those below `block_length` for an equal
    part of the warm-up. It depends on nothing but its arguments, so a resumed run goes on where it was.

    Args:
        step: Optimiser steps done so far.
        max_steps: Of the whole run.
        warmup_steps: Steps until `block_length` is reached; below 1 a share of `max_steps`.
        block_length: The final one.
    """
    check_integer("step", step, 0)
    check_integer("block_length", block_length, 1)
    check_warmup("warmup_steps", warmup_steps, block_length)
    warmup_steps = math.ceil(max_steps * warmup_steps) if warmup_steps < 1 else warmup_steps
    if step >= warmup_steps:
        return block_length
    num_doublings = block_length.bit_length() - 1
    return 2 ** int(num_doublings * step / warmup_steps)


__all__ = ["STAGES", "Stage", "block_length_at", "freeze_all_but"]
