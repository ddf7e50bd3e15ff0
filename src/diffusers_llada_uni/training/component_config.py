"""What the settings of the autoencoder's, the decoder's and the distillation's training share."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from transformers_llada_uni.input_checks import check_number


@dataclass
class ComponentTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] of a [`ComponentTrainer`], which knows `ema_decay`.

    Raises:
        ValueError: if `ema_decay` is no share.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes what it needs."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns losses only."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of a moving average of the weights, which is then saved."}
    )

    def __post_init__(self):
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, 0, 1)
        super().__post_init__()
