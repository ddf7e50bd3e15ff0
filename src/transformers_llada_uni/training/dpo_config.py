"""Settings of preference training by block diffusion."""

from dataclasses import dataclass

from trl import DPOConfig

from .documented_settings import documented
from .objective.noise_settings import NoiseSettings
from .trl_settings import refuse_without_meaning, settle_defaults


# Settings of trl that have no meaning for a likelihood bound, the only value they may have, and why.
WITHOUT_MEANING = {
    "precompute_ref_log_probs": (False, "policy and reference must be compared under the same noise, drawn each step"),
    "use_weighting": (False, "it needs the probabilities of a whole answer, of which there is only a bound"),
    "truncation_mode": ("keep_start", "an answer needs its prompt"),
    "padding_free": (False, "trl has no such data for preferences"),
    "prediction_loss_only": (True, "logits of whole sequences are never made"),
    "router_aux_loss_coef": (None, "loads are balanced by the experts' biases"),
}


@documented
@dataclass
class LLaDAUniDPOConfig(NoiseSettings, DPOConfig):
    """
    Configuration of [`LLaDAUniDPOTrainer`]: that of [`~trl.DPOConfig`] and of [`NoiseSettings`].

    Parameters:
        max_length (`int`, defaults to 4096): Longest answer with its prompt, in tokens; longer pairs are left out, not
            cut.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DPOConfig`]: `max_length`, `bf16` (`False` on a CPU)
    > and `prediction_loss_only` (`True`: logits of whole sequences are never made).

    Raises:
        ValueError: naming the field, for a value out of range or a setting of trl without meaning here.
    """

    max_length: int | None = 4096
    prediction_loss_only: bool = True

    def __post_init__(self):
        NoiseSettings.__post_init__(self)
        refuse_without_meaning(self, WITHOUT_MEANING)
        settle_defaults(self)
        DPOConfig.__post_init__(self)
