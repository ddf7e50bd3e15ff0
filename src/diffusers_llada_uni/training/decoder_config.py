"""Settings of the decoder's training by flow matching."""

from dataclasses import dataclass, field

from transformers_llada_uni.input_checks import check_choice, check_number
from transformers_llada_uni.training.documented_settings import documented
from transformers_llada_uni.training.stages import check_parts

from .component_config import ComponentTrainingArguments
from .decoder_stages import DECODER_PARTS, DECODER_STAGES


SAMPLINGS = ("uniform", "logit_normal")


@documented
@dataclass
class LLaDAUniDecoderConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniDecoderTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here. Where a default is "the stage's", `None` stands for the value in `DECODER_STAGES[stage]`.

    Parameters:
        stage (`str`, defaults to `"all_domains"`): Preset of what is trained, and how fast: `"warmup"` with the
            semantic processor frozen, then `"all_domains"`, then `"refinement"` (arXiv 2604.20796).
        trained_parts (`list[str]`, *optional*): What is trained, all else is frozen: `semantic_embedder` (codes to
            features), `semantic_refiner` (what the transformer does to features alone), `image_layers` (the rest of
            it). Default: the stage's.
        condition_dropout (`float`, defaults to 0.1): Share of images that are learnt with zero features, the other
            branch of guidance.
        timestep_sampling (`str`, defaults to `"logit_normal"`): How noise levels are drawn: `"uniform"` or
            `"logit_normal"` (SD3, arXiv 2403.03206, eq. 19).
        logit_mean, logit_std (`float`, default to 0.0 and 1.0): Of `"logit_normal"`.
        timestep_shift (`float`, defaults to 1.0): s in sigma <- s sigma / (1 + (s - 1) sigma); above 1 moves noise
            levels toward noise, as large images want. The released sampler shifts by 6.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (the
    > stage's), `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float | None = None  # type: ignore[assignment]  # `None` until the stage is known

    stage: str = field(default="all_domains", metadata={"choices": list(DECODER_STAGES)})
    trained_parts: list[str] | None = None
    condition_dropout: float = 0.1
    timestep_sampling: str = field(default="logit_normal", metadata={"choices": list(SAMPLINGS)})
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0

    def __post_init__(self):
        check_choice("stage", self.stage, DECODER_STAGES)
        if self.learning_rate is None:
            self.learning_rate = DECODER_STAGES[self.stage].learning_rate
        if self.trained_parts is not None:
            check_parts("trained_parts", self.trained_parts, DECODER_PARTS)
        check_number("condition_dropout", self.condition_dropout, 0, 1)
        check_choice("timestep_sampling", self.timestep_sampling, SAMPLINGS)
        check_number("logit_std", self.logit_std, 0, exclude_minimum=True)
        check_number("timestep_shift", self.timestep_shift, 0, exclude_minimum=True)
        super().__post_init__()
