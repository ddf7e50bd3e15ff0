"""Settings of supervised training by block diffusion, for all three stages."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..input_checks import check_choice, check_integer, check_number
from .block_schedule import check_block_schedule
from .documented_settings import documented
from .objective.noise import WEIGHTINGS, BlockDiffusionNoise
from .objective.noise_settings import NoiseSettings
from .objective.router_balancing import BIAS_UPDATES
from .objective.token_corruption import TokenCorruption
from .stages import STAGES, check_parts
from .trl_settings import refuse_without_meaning, settle_defaults


# Settings of trl that block diffusion has no use for, the only value they may have, and what to do instead.
WITHOUT_MEANING = {
    "loss_type": ("nll", "the loss is that of block diffusion"),
    "label_smoothing_factor": (0.0, "the loss is a bound on the likelihood"),
    "completion_only_loss": (None, "the loss is taken on completions and answers, for plain text on all of it"),
    "assistant_only_loss": (False, "the loss is taken on completions and answers, for plain text on all of it"),
    "packing_strategy": ("bfd", "other strategies cut documents inside a block"),
    "truncation_mode": ("keep_start", "an answer needs its prompt"),
    "router_aux_loss_coef": (None, "loads are balanced by `expert_bias_update_rate`"),
    "dataset_text_field": ("text", "rename the column"),
    "chat_template_path": (None, "set the template of the processor"),
    "eos_token": (None, "set the token of the tokenizer"),
}


@documented
@dataclass
class LLaDAUniSFTConfig(NoiseSettings, SFTConfig):
    r"""
    Configuration of [`LLaDAUniSFTTrainer`]: that of [`~trl.SFTConfig`] and of [`NoiseSettings`]. Only what differs
    from both is described here.

    Where a default is "the stage's", `None` stands for the value in `STAGES[stage]`.

    Parameters:
        stage (`str`, defaults to `"supervised_finetuning"`): Preset of what is trained on what mix of tasks:
            `"alignment"`, `"pretraining"`, `"supervised_finetuning"` or `"from_autoregressive"`; see `stages.py`.
        trained_parts (`list[str]`, *optional*): Parts of the model to train, among `embeddings`, `head`,
            `attention`, `router`, `experts`, `dense_mlp` and `norms`. Default: the stage's. Not with LoRA, which says
            itself what it trains.
        learning_rate (`float`, *optional*): The peak of the schedule. Default: the stage's.
        task_mix (`dict[str, float]`, *optional*): Shares of the tasks, if `train_dataset` is a dict of datasets by
            task. Default: the stage's, for the tasks that are there.

        > Objective

        block_length (`int`, *optional*): Tokens of a block; the trained model is saved with it. Default: the model's.
        block_lengths (`list[int]`, *optional*): Lengths of blocks before the final one, in order, for a model that
            learnt from left to right. Default: the stage's.
        block_length_shares (`list[float]`, *optional*): The share of all steps that each of them lasts.
        weighting (`str`, defaults to `"inverse"`): Weight of a masked token: one over its noise level, with which the
            loss bounds the likelihood, or the same for all (`"none"`).
        complementary (`bool`, *optional*): Whether each noisy copy comes with another that masks exactly the other
            tokens. Default: the stage's.
        num_noise_samples (`int`, defaults to 1): Independent noisy copies of each row.
        length_weighting (`bool`, *optional*): Whether a document weighs as much as the root of its length, see
            [`length_weights`], and not as its length. Default: the stage's.
        confidence_weight (`float`, defaults to 0.0): Weight of the entropy of predictions that are right, added to the
            loss: a model that is sure of what it knows takes fewer steps (LLaDA2.0's CAP, arXiv 2512.15745; its
            public code has 2.0).
        editing_weight (`float`, defaults to 0.0): Weight of the loss of tokens that are shown, of which some are
            wrong, for decoding with `editing_threshold`; see [`TokenCorruption`]. Masked tokens have 1.
        corruption_rate (`float`, defaults to 0.1): How many of them are drawn at random.
        draft_share (`float`, defaults to 0.0): How many blocks show, in the place of their masks, what the model
            itself finds likeliest, with its mistakes (DMax, arXiv 2604.08302, has 0.5). Needs an `editing_weight`.
        text_weight, image_weight (`float`, default to 1.0): Factors on the loss of text tokens and of image codes. An
            image has a thousand codes, its caption ten words: their numbers say what the mean is made of.

        > Routers

        expert_bias_update_rate (`float`, *optional*): Step of the auxiliary-loss-free load balancing, 0 for none; see
            [`RouterBalancing`]. Default: the stage's; with LoRA 0, as adapters hold no bias.
        expert_bias_update (`str`, defaults to `"normalized"`): Whether the bias moves by the load's `"normalized"`
            error or by its `"sign"`.
        router_z_loss_coefficient (`float`, defaults to 0.0): Weight of the z-loss on the routers' logits.

        > Data

        max_length (`int`, defaults to 4096): Longest row in tokens; longer ones are left out, plain text is cut into
            pieces. An image of 1024 x 1024 takes 1029.
        packing (`bool`, *optional*): Whether documents share rows of `max_length` tokens. Default: the stage's.
        caption_dropout, image_dropout (`float`, default to 0.1): How often the caption of an image to generate, or
            the source image of an edit, is left out, for guidance. Drawn once, when the data are prepared.
        editing_max_pixels (`int`, *optional*): Largest area of an image to make, where images are not codes yet. The
            paper begins with 256 x 256 (65536). Default: that of the processor, 512 x 512.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]: `learning_rate` (the stage's), `bf16`
    > (`False` on a CPU), `ddp_find_unused_parameters` (`False`: all that is trained takes part in each step),
    > `prediction_loss_only` (`True`: logits of whole sequences are never made).

    Raises:
        ValueError: naming the field, for a value out of range or a setting of trl without meaning here.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["task_mix"]

    # Overridden defaults
    learning_rate: float | None = None  # type: ignore[assignment]  # `None` until the stage is known
    max_length: int | None = 4096
    packing: bool | None = None  # type: ignore[assignment]  # `None` until the stage is known
    ddp_find_unused_parameters: bool | None = False
    prediction_loss_only: bool = True

    # What is trained
    stage: str = field(default="supervised_finetuning", metadata={"choices": list(STAGES)})
    trained_parts: list[str] | None = None
    task_mix: dict[str, Any] | str | None = None

    # Objective
    block_lengths: list[int] | None = None
    block_length_shares: list[float] | None = None
    weighting: str = field(default="inverse", metadata={"choices": list(WEIGHTINGS)})
    complementary: bool | None = None  # type: ignore[assignment]  # `None` until the stage is known
    num_noise_samples: int = 1
    length_weighting: bool | None = None
    confidence_weight: float = 0.0
    editing_weight: float = 0.0
    corruption_rate: float = 0.1
    draft_share: float = 0.0
    text_weight: float = 1.0
    image_weight: float = 1.0

    # Routers
    expert_bias_update_rate: float | None = None
    expert_bias_update: str = field(default="normalized", metadata={"choices": list(BIAS_UPDATES)})
    router_z_loss_coefficient: float = 0.0

    # Data
    caption_dropout: float = 0.1
    image_dropout: float = 0.1
    editing_max_pixels: int | None = None

    def __post_init__(self):
        check_choice("stage", self.stage, STAGES)
        preset = STAGES[self.stage]
        for name in ("learning_rate", "complementary", "packing", "length_weighting"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))
        if self.block_lengths is None and self.block_length_shares is None:
            self.block_lengths, self.block_length_shares = preset.block_lengths, preset.block_length_shares
        settle_defaults(self)
        SFTConfig.__post_init__(self)

        refuse_without_meaning(self, WITHOUT_MEANING)
        if self.trained_parts is not None:
            check_parts("trained_parts", self.trained_parts)
        self._check_task_mix()
        NoiseSettings.__post_init__(self)
        self.make_corruption()
        check_block_schedule(self.block_lengths, self.block_length_shares)
        check_choice("expert_bias_update", self.expert_bias_update, BIAS_UPDATES)
        for name in ("text_weight", "image_weight", "confidence_weight", "router_z_loss_coefficient"):
            check_number(name, getattr(self, name), 0.0)
        if self.text_weight == self.image_weight == 0:
            raise ValueError("`text_weight` and `image_weight` are both 0: there is nothing to learn.")
        if self.expert_bias_update_rate is not None:
            check_number("expert_bias_update_rate", self.expert_bias_update_rate, 0.0)
        for name in ("caption_dropout", "image_dropout"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        if self.editing_max_pixels is not None:
            check_integer("editing_max_pixels", self.editing_max_pixels, 1)
        if self.router_z_loss_coefficient and (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`router_z_loss_coefficient` must be 0 with `use_reentrant` in `activation_checkpointing_kwargs`, "
                f"which cuts the routers' logits off from the gradient, got {self.router_z_loss_coefficient!r}."
            )

    def _check_task_mix(self) -> None:
        if self.task_mix is None:
            return
        if not isinstance(self.task_mix, dict) or not self.task_mix:
            raise ValueError(f"`task_mix` must be a dict of shares by task, got {self.task_mix!r}.")
        for task, share in self.task_mix.items():
            check_number(f"task_mix[{task!r}]", share, 0.0)
        if not any(self.task_mix.values()):
            raise ValueError(f"`task_mix` gives every task the share 0: {self.task_mix!r}.")

    def make_corruption(self) -> TokenCorruption | None:
        """`None` where nothing but masks is shown."""
        corruption = TokenCorruption(self.corruption_rate, self.editing_weight, self.draft_share)
        if corruption.draft_share and not corruption.weight:
            raise ValueError(
                f"`draft_share` is {self.draft_share!r}, but without `editing_weight` nothing is learnt from drafts."
            )
        return corruption if corruption.weight else None

    def make_noise(self) -> BlockDiffusionNoise:
        return dataclasses.replace(super().make_noise(), weighting=self.weighting)
