"""Settings of the few-step distillation of the decoder."""

from dataclasses import dataclass, field

from transformers_llada_uni.input_checks import check_choice, check_integer, check_number
from transformers_llada_uni.training.documented_settings import documented

from .component_config import ComponentTrainingArguments


OBJECTIVES = ("twinflow", "guidance")


@documented
@dataclass
class LLaDAUniDistillationConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniDistillationTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        objective (`str`, defaults to `"twinflow"`): `"twinflow"` teaches the student to jump, for a few steps;
            `"guidance"` to say in one pass what the teacher says with guidance in two (arXiv 2210.03142, stage one),
            soon learnt, for the same number of steps, 8 say.
        scheduler_shift (`float`, defaults to 6.0): Of the noise levels that a student of guidance is sampled at: its
            teacher's.
        teacher_guidance_scale (`float`, defaults to 1.0): Guidance that the student takes over; 0 for none.
        num_student_steps (`int`, defaults to 4): Steps of the sampler from whose noise levels the student learns to
            draw; those of 4 steps hold those of 1 and 2. Only of TwinFlow.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-5),
    > `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = 1e-5

    objective: str = field(default="twinflow", metadata={"choices": list(OBJECTIVES)})
    scheduler_shift: float = 6.0
    teacher_guidance_scale: float = 1.0
    num_student_steps: int = 4

    def __post_init__(self):
        check_choice("objective", self.objective, OBJECTIVES)
        check_number("scheduler_shift", self.scheduler_shift, 0, exclude_minimum=True)
        check_number("teacher_guidance_scale", self.teacher_guidance_scale, 0)
        check_integer("num_student_steps", self.num_student_steps, 1)
        super().__post_init__()
