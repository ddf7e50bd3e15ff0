"""Preference training: DPO with a likelihood bound in the place of the likelihood."""

from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from ..unwrapping import unwrap
from .base_trainer import check_settings
from .data.dataset_formats import check_format
from .data.dataset_loading import AnyDataset, only_dataset
from .data.preparation import preferences_that_fit, prepare_preference_dataset
from .dpo_config import LLaDAUniDPOConfig
from .language_model_trainer import LanguageModelTrainer, Processing
from .objective.block_diffusion import add_block_diffusion_head, document_ids_of
from .objective.noise import step_generators
from .reference_model import make_reference


class LLaDAUniDPOTrainer(LanguageModelTrainer, DPOTrainer):
    r"""
    trl's [`~trl.DPOTrainer`], in which log p(answer | prompt) is replaced by its block-diffusion bound

        B(y | x) = sum_i w_i log p(y_i | noisy copies of y, x)

    ([`add_block_diffusion_head`]), an average over `num_noise_samples` noisy copies. As in VRPO (LLaDA 1.5, arXiv
    2505.19223) the noise levels and masks are drawn once a step and shared by policy and reference: B_policy - B_ref,
    from which the loss is made, then varies far less, and is exactly 0 before the first step. All losses of trl's
    `loss_type` work on it.

    Args:
        model: A model or the name of one.
        ref_model ([`PreTrainedModel`], *optional*): The reference. Default: a copy of `model`, see
            [`make_reference`]; with an adapter, the model without it (or with it, as it was given).
        args ([`LLaDAUniDPOConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with `prompt`, `chosen` and `rejected`, see [`prepare_preference_dataset`].
        processing_class ([`LLaDAUniProcessor`], or a tokenizer for a text-only model, *optional*): Default: from where
            the model came.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter; see [`lora_config`].
        **kwargs: Further arguments of [`~trl.DPOTrainer`].

    Raises:
        ValueError, TypeError: for settings that do not fit, or rows that are no preferences.
    """

    _stage = "preference training (DPO)"
    args: LLaDAUniDPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: LLaDAUniDPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: Processing | None = None,
        peft_config: Any | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniDPOConfig, "llada-uni-dpo")
        if not train_dataset:
            raise ValueError(f"`train_dataset` must hold rows to train on, got {train_dataset!r}.")
        train_dataset = only_dataset("train_dataset", train_dataset)
        self.check_columns("train_dataset", train_dataset)
        model, processing_class = self._take_model(model, processing_class, args, kwargs)
        trains_adapter = peft_config is not None or is_peft_model(model)
        if ref_model is None and not trains_adapter:
            ref_model = make_reference(model)

        # Rows with images would take trl's path for them.
        self._training_data: AnyDataset | None = self._tokenize(train_dataset, processing_class, args)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=self._training_data,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._training_data = None  # trl has made its own of it
        self.aux_loss_enabled = False  # whatever the model's configuration says: see `WITHOUT_MEANING`
        add_block_diffusion_head(unwrap(self.model))
        if self.ref_model is not None:
            add_block_diffusion_head(self.accelerator.unwrap_model(self.ref_model))

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        if "chosen_ids" not in get_dataset_column_names(dataset):
            check_format(argument, dataset, ("preference",))

    def _tokenize(self, dataset: AnyDataset, processing_class: Any, args: LLaDAUniDPOConfig) -> AnyDataset:
        with global_then_local_main_first():
            if "chosen_ids" in get_dataset_column_names(dataset):  # prepared, maybe with another `max_length`
                return preferences_that_fit(dataset, args.max_length)
            return prepare_preference_dataset(
                dataset,
                processing_class,
                block_length=self.block_length,
                max_length=args.max_length,
                model=self._data_model,
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset if dataset is self._training_data else self._tokenize(dataset, processing_class, args)

    def _compute_loss(self, model, inputs, return_outputs):
        # 1. One draw of noise, which trl hands on to both models
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        document_ids = document_ids_of(labels, inputs["attention_mask"])
        # Numbered by pairs, so that how a step's pairs are dealt out to batches and processes changes nothing.
        generators = step_generators(self, labels.shape[0])
        generators = generators[0::2] + generators[1::2]  # of the chosen answers, of the rejected ones
        masked, weights = self.noise.sample(labels, document_ids, self.block_length, generators)
        noised = {"masked": masked, "weights": weights, "block_length": self.block_length}

        # 2. trl counts tokens that are predicted right; a token in several copies is, if it is so in most
        def forward(**kwargs: Any):
            outputs = model(**kwargs)
            outputs.is_top1 = outputs.is_top1 > 0.5
            return outputs

        # The reference got its head after accelerate had prepared it, and so would compute in another precision.
        with self.accelerator.autocast():
            loss = super()._compute_loss(forward, {**inputs, **noised}, return_outputs=False)
        return (loss, {}) if return_outputs else loss
