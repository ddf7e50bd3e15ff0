"""Settings of the image tokenizer's training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..image_processing_llada_uni import RESIZE_MODES
from ..input_checks import check_choice, check_integer, check_number
from .documented_settings import documented


CODEBOOK_UPDATES = ("ema", "gradient")


@documented
@dataclass
class LLaDAUniImageTokenizerConfig(TrainingArguments):
    r"""
    Configuration of [`LLaDAUniImageTokenizerTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is
    described here.

    Parameters:
        commitment_weight (`float`, defaults to 0.25): Weight of the loss that draws features to their code.
        reconstruction_weight (`float`, defaults to 0.0): Weight of the loss of a small network that says the pixels of
            a patch by its code. Captions do not tell all that an image shows; above 0 codes keep its look too.
        reconstruction_layers (`int`, defaults to 0): Layers in which that network sees the other codes of the image;
            0 for the patch's code alone. Above 0 all images of a batch must have one size.
        num_style_codes (`int`, defaults to 0): Of data with the columns `content` and `style`, the first so many codes
            of an image are shared by images of one style, all others by images of one content. A `style` may be a
            list with a name for each of these codes. Not with images of several sizes.
        sharing_weight (`float`, defaults to 1.0): Weight of the loss by which an image finds the codes it shares.
        group_weight (`float`, defaults to 1.0): Weight of the loss that keeps styles, and contents, apart.
        codebook_update (`str`, defaults to `"ema"`): How codes follow their features: `"ema"`, moving averages
            (VQ-VAE-2, arXiv 1906.00446), or `"gradient"`, a loss that draws codes to features.
        codebook_decay (`float`, defaults to 0.99): Of the moving averages, also of those that count how often a code
            is used.
        codebook_weight (`float`, defaults to 1.0): Weight of the codebook's loss for `"gradient"`.
        revival_threshold (`float`, defaults to 0.01): A code whose use falls below this share of the mean is dead; 0
            revives none.
        revival_interval (`int`, defaults to 10): Steps between revivals.
        resize_mode (`str`, defaults to `"editing"`): The rule by which images are sized.
        max_text_length (`int`, defaults to 64): Captions are cut to so many tokens.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]: `learning_rate` (1e-4)
    > and `remove_unused_columns`.

    Raises:
        ValueError: naming the field, for a value out of range.
    """

    learning_rate: float = 1e-4
    remove_unused_columns: bool = False

    commitment_weight: float = 0.25
    reconstruction_weight: float = 0.0
    reconstruction_layers: int = 0
    num_style_codes: int = 0
    sharing_weight: float = 1.0
    group_weight: float = 1.0
    codebook_update: str = field(default="ema", metadata={"choices": list(CODEBOOK_UPDATES)})
    codebook_decay: float = 0.99
    codebook_weight: float = 1.0
    revival_threshold: float = 0.01
    revival_interval: int = 10
    resize_mode: str = field(default="editing", metadata={"choices": list(RESIZE_MODES)})
    max_text_length: int = 64

    def __post_init__(self):
        for name in ("commitment_weight", "reconstruction_weight", "codebook_weight", "sharing_weight"):
            check_number(name, getattr(self, name), 0)
        check_number("group_weight", self.group_weight, 0)
        check_number("revival_threshold", self.revival_threshold, 0)
        check_number("codebook_decay", self.codebook_decay, 0, 1)
        check_choice("codebook_update", self.codebook_update, CODEBOOK_UPDATES)
        check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        check_integer("reconstruction_layers", self.reconstruction_layers, 0)
        check_integer("num_style_codes", self.num_style_codes, 0)
        check_integer("revival_interval", self.revival_interval, 1)
        check_integer("max_text_length", self.max_text_length, 1)
        super().__post_init__()
