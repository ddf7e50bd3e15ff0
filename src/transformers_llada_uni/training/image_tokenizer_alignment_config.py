"""Settings of the training that teaches an image tokenizer codes which are given."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..image_processing_llada_uni import RESIZE_MODES
from ..input_checks import check_choice
from .documented_settings import documented


@documented
@dataclass
class LLaDAUniImageTokenizerAlignmentConfig(TrainingArguments):
    r"""
    Configuration of [`LLaDAUniImageTokenizerAlignmentTrainer`]. Only what differs from
    [`~transformers.TrainingArguments`] is described here.

    Parameters:
        resize_mode (`str`, defaults to `"editing"`): The rule by which images are sized.
        train_codebook (`bool`, defaults to `False`): Whether codes move too. Language model and decoder know them by
            number alone. Where two lie so close that no image can be told to have one and not the other, the vision
            tower cannot learn to, and they have to move apart.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-4)
    > and `remove_unused_columns`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = 1e-4
    remove_unused_columns: bool = False

    resize_mode: str = field(default="editing", metadata={"choices": list(RESIZE_MODES)})
    train_codebook: bool = False

    def __post_init__(self):
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        super().__post_init__()
