"""Settings of the few-step distillation of the decoder."""

from dataclasses import dataclass, field

from transformers_llada_uni.input_checks import check_integer, check_number

from .component_config import ComponentTrainingArguments


@dataclass
class LLaDAUniDistillationConfig(ComponentTrainingArguments):
    r"""
    Configuration of [`LLaDAUniDistillationTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        num_teacher_steps (`int`, defaults to 50): Points of the teacher's schedule, which has one step fewer.
        teacher_guidance_scale (`float`, defaults to 1.0): Guidance that the student takes over; 0 for none.
        min_student_steps, max_student_steps (`int`, default to 4 and 8): The student is trained at the noise levels of
            samplers with so many steps.
        pairs_per_trajectory (`int`, defaults to 4): Noise levels that are learnt from one trajectory of the teacher.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and save that.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-5),
    > `remove_unused_columns` and `prediction_loss_only`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    num_teacher_steps: int = field(default=50, metadata={"help": "Points of the teacher's schedule."})
    teacher_guidance_scale: float = field(default=1.0, metadata={"help": "Guidance that the student takes over."})
    min_student_steps: int = field(default=4, metadata={"help": "Fewest steps the student is trained for."})
    max_student_steps: int = field(default=8, metadata={"help": "Most steps the student is trained for."})
    pairs_per_trajectory: int = field(
        default=4, metadata={"help": "Noise levels that are learnt from one trajectory of the teacher."}
    )

    def __post_init__(self):
        check_integer("num_teacher_steps", self.num_teacher_steps, 2)
        check_number("teacher_guidance_scale", self.teacher_guidance_scale, 0)
        check_integer("min_student_steps", self.min_student_steps, 1)
        check_integer("max_student_steps", self.max_student_steps, self.min_student_steps)
        check_integer("pairs_per_trajectory", self.pairs_per_trajectory, 1)
        super().__post_init__()


__all__ = ["LLaDAUniDistillationConfig"]
