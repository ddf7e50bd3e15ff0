"""
The stages a lab walks through, as presets: what is trained, from which mix of tasks, with which blocks.

- `"alignment"` trains embeddings and head, so that the new image codes find their place beside the words; from
  images with captions and some text. Of captions and images the loss is taken on one side only, on the codes of an
  image to make and on the words about an image that is shown (arXiv 2604.20796, stage 0), as rows are prepared.
- `"pretraining"` trains the whole language model; from text, captions in both directions, edits and interleaved
  documents.
- `"supervised_finetuning"` trains the whole language model except its routers; from conversations, text-to-image and
  edits, with complementary masks.
- `"from_autoregressive"` makes a model of block diffusion of one that learnt from left to right: blocks grow from one
  token to whole documents, stay there, and shrink to the final ones (LLaDA2.0, arXiv 2512.15745). LLaDA2.0-Uni began
  with one that was made so, and its own stages keep their blocks.

From the reports are the order of stages and lengths of blocks, length weighting and complementary masks (for
fine-tuning: more data makes them needless). What is frozen, learning rates, shares of tasks and of steps are starting
points of ours.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn


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
        expert_bias_update_rate: See [`RouterBalancing`]. DeepSeek-V3 (arXiv 2412.19437, section 4.2) keeps 1e-3 for
            nearly all of pre-training and 0 at its end.
        complementary: Whether every noisy copy comes with its complement.
        block_lengths, block_length_shares: See [`block_length_at`].
        length_weighting: See [`length_weights`]. The paper's (arXiv 2604.20796, eq. 6), in all its stages.
        packing: Whether documents share rows.
    """

    trained_parts: tuple[str, ...]
    learning_rate: float
    expert_bias_update_rate: float
    complementary: bool
    packing: bool
    block_lengths: list[int] | None = None
    block_length_shares: list[float] | None = None
    length_weighting: bool = True
    task_mix: dict[str, float] = field(default_factory=dict)


STAGES = {
    "alignment": Stage(
        trained_parts=("embeddings", "head"),
        learning_rate=1e-3,
        expert_bias_update_rate=0.0,
        complementary=False,
        packing=True,
        task_mix={"text_to_image": 0.4, "understanding": 0.4, "text": 0.2},
    ),
    "pretraining": Stage(
        trained_parts=LANGUAGE_MODEL,
        learning_rate=1e-4,
        expert_bias_update_rate=1e-3,
        complementary=False,
        packing=True,
        task_mix={"text": 0.3, "text_to_image": 0.3, "understanding": 0.25, "editing": 0.1, "interleaved": 0.05},
    ),
    "supervised_finetuning": Stage(
        trained_parts=tuple(part for part in LANGUAGE_MODEL if part != "router"),
        learning_rate=2e-5,
        expert_bias_update_rate=0.0,
        complementary=True,
        packing=False,
        task_mix={"text": 0.25, "understanding": 0.3, "text_to_image": 0.25, "editing": 0.15, "interleaved": 0.05},
    ),
    "from_autoregressive": Stage(
        trained_parts=LANGUAGE_MODEL,
        learning_rate=1e-4,
        expert_bias_update_rate=1e-3,
        complementary=False,
        packing=True,
        block_lengths=[1, 4, 32, 64, 4096, 1024, 256, 64],
        block_length_shares=[0.02, 0.02, 0.03, 0.03, 0.7, 0.03, 0.03, 0.04],
        task_mix={"text": 1.0},
    ),
}


def part_of(name: str, patterns: Mapping[str, str] = PARTS) -> str:
    """The part a parameter of the model belongs to: the first that matches. Raises ValueError if it is in none."""
    for part, pattern in patterns.items():
        if re.search(pattern, name):
            return part
    raise ValueError(f"`{name}` is no parameter of a LLaDA2.0-Uni model.")


def check_parts(name: str, parts: Iterable[str], known: Collection[str] = LANGUAGE_MODEL) -> None:
    """Raises ValueError, naming the argument, for a part that is not known, or none at all."""
    parts = list(parts)
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        raise ValueError(f"`{name}` must name parts among {', '.join(known)}, got {unknown or parts!r}.")


def freeze_all_but(model: nn.Module, trained_parts: Collection[str], patterns: Mapping[str, str] = PARTS) -> None:
    """Sets which parameters of `model` take gradients: those of `trained_parts` of its parts, and no others."""
    check_parts("trained_parts", trained_parts, patterns)
    for name, parameter in model.named_parameters():
        part = part_of(name, patterns)
        is_trained = part in trained_parts
        if is_trained and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"`trained_parts` holds {part!r}, but `{name}` is quantised and takes no gradient; train an "
                "adapter (`peft_config`) instead."
            )
        parameter.requires_grad_(is_trained)
