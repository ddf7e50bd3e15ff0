"""What the settings of the autoencoder's, the decoder's and the distillation's training share."""

from dataclasses import dataclass

from transformers import TrainingArguments

from transformers_llada_uni.input_checks import check_number
from transformers_llada_uni.training.documented_settings import documented


@documented
@dataclass
class ComponentTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] of a [`ComponentTrainer`].

    Parameters:
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that. What is
            evaluated are the weights themselves.

    Raises:
        ValueError: if `ema_decay` is no share.
    """

    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    ema_decay: float | None = None

    def __post_init__(self):
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, 0, 1)
        super().__post_init__()
