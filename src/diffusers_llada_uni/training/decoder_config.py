"""Settings of the decoder's training by flow matching."""

from dataclasses import dataclass, field

from transformers_llada_uni.input_checks import check_choice, check_number

from .component_config import ComponentTrainingArguments


SAMPLINGS = ("uniform", "logit_normal")


@dataclass
class LLaDAUniDecoderConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniDecoderTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        condition_dropout (`float`, defaults to 0.1): Share of pictures that are learnt with zero features, the other
            branch of guidance.
        timestep_sampling (`str`, defaults to `"logit_normal"`): How noise levels are drawn: `"uniform"` or
            `"logit_normal"` (SD3, arXiv 2403.03206, eq. 19).
        logit_mean, logit_std (`float`, default to 0.0 and 1.0): Of `"logit_normal"`.
        timestep_shift (`float`, defaults to 1.0): s in sigma <- s sigma / (1 + (s - 1) sigma); above 1 moves noise
            levels toward noise, as large pictures want. The released sampler shifts by 6.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.
        train_semantic_embedder (`bool`, defaults to `True`): Whether the embedder of codes is trained as well.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-4),
    > `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})

    condition_dropout: float = field(
        default=0.1, metadata={"help": "Share of pictures learnt with zero features, for guidance."}
    )
    timestep_sampling: str = field(
        default="logit_normal", metadata={"help": "How noise levels are drawn.", "choices": list(SAMPLINGS)}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logits of noise levels."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logits of noise levels."})
    timestep_shift: float = field(default=1.0, metadata={"help": "Shift of noise levels toward noise; 1.0 for none."})
    train_semantic_embedder: bool = field(
        default=True, metadata={"help": "Whether the embedder of codes is trained as well."}
    )

    def __post_init__(self):
        check_number("condition_dropout", self.condition_dropout, 0, 1)
        check_choice("timestep_sampling", self.timestep_sampling, SAMPLINGS)
        check_number("logit_std", self.logit_std, 0, exclude_minimum=True)
        check_number("timestep_shift", self.timestep_shift, 0, exclude_minimum=True)
        super().__post_init__()


__all__ = ["LLaDAUniDecoderConfig"]
