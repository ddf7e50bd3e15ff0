"""Settings of the few-step distillation of the decoder."""

from dataclasses import dataclass

from transformers_llada_uni.input_checks import check_integer, check_number
from transformers_llada_uni.training.documented_settings import documented

from .component_config import ComponentTrainingArguments


@documented
@dataclass
class LLaDAUniDistillationConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniDistillationTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        num_teacher_steps (`int`, defaults to 50): Points of the teacher's schedule, which has one step fewer.
        teacher_guidance_scale (`float`, defaults to 1.0): Guidance that the student takes over; 0 for none.
        min_student_steps (`int`, defaults to 4): Fewest steps of the samplers whose noise levels the student is
            trained at.
        max_student_steps (`int`, defaults to 8): Most steps of those samplers.
        pairs_per_trajectory (`int`, defaults to 4): Noise levels that are learnt from one trajectory of the teacher.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-5),
    > `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = 1e-5

    num_teacher_steps: int = 50
    teacher_guidance_scale: float = 1.0
    min_student_steps: int = 4
    max_student_steps: int = 8
    pairs_per_trajectory: int = 4

    def __post_init__(self):
        check_integer("num_teacher_steps", self.num_teacher_steps, 2)
        check_number("teacher_guidance_scale", self.teacher_guidance_scale, 0)
        check_integer("min_student_steps", self.min_student_steps, 1)
        check_integer("max_student_steps", self.max_student_steps, self.min_student_steps)
        check_integer("pairs_per_trajectory", self.pairs_per_trajectory, 1)
        super().__post_init__()
