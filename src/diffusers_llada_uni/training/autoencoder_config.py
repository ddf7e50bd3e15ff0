"""Settings of the autoencoder's training."""

from dataclasses import dataclass

from transformers_llada_uni.input_checks import check_number
from transformers_llada_uni.training.documented_settings import documented

from .component_config import ComponentTrainingArguments


@documented
@dataclass
class LLaDAUniAutoencoderConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniAutoencoderTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        kl_weight (`float`, defaults to 1e-6): Weight of the divergence of the latents from a standard normal
            distribution (arXiv 2112.10752, appendix G, for the order of magnitude).
        absolute_error_weight (`float`, defaults to 1.0): Weight of the mean absolute error, which keeps edges sharp.
        squared_error_weight (`float`, defaults to 1.0): Weight of the mean squared error.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-4),
    > `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = 1e-4

    kl_weight: float = 1e-6
    absolute_error_weight: float = 1.0
    squared_error_weight: float = 1.0

    def __post_init__(self):
        for name in ("kl_weight", "absolute_error_weight", "squared_error_weight"):
            check_number(name, getattr(self, name), 0.0)
        if not self.absolute_error_weight and not self.squared_error_weight:
            raise ValueError("`absolute_error_weight` and `squared_error_weight` are both 0, so nothing is learnt.")
        super().__post_init__()
