"""Supervised training of the language model by block diffusion: pre-training, alignment, fine-tuning."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    disable_progress_bars,
    enable_progress_bars,
    is_progress_bar_enabled,
)
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import global_then_local_main_first

from ..unwrapping import unwrap
from .base_trainer import check_settings
from .block_schedule import block_length_at
from .data.dataset_formats import check_format
from .data.dataset_loading import AnyDataset, only_dataset
from .data.preparation import LEARNABLE, mix_datasets, prepare_dataset, rows_that_fit
from .language_model_trainer import LanguageModelTrainer, Processing
from .objective.block_diffusion import (
    BlockDiffusionTerms,
    add_block_diffusion_head,
    document_ids_of,
    never_shown,
    tokens_of_pass,
)
from .objective.length_weighting import length_sums, length_weights
from .objective.noise import step_generators
from .objective.router_balancing import RouterBalancing
from .sft_config import LLaDAUniSFTConfig
from .stages import STAGES, freeze_all_but


# Arguments of trl's trainer that would put another loss, or logits of whole sequences, in the place of ours.
REFUSED_ARGUMENTS = {
    "compute_loss_func": "override `compute_loss`",
    "compute_metrics": "see `transformers_llada_uni.evaluation`",
    "preprocess_logits_for_metrics": "see `transformers_llada_uni.evaluation`",
    "formatting_func": "give the dataset one of the formats of `prepare_dataset`",
}


@contextmanager
def _without_bars() -> Iterator[None]:
    were_enabled = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            enable_progress_bars()


class LLaDAUniSFTTrainer(LanguageModelTrainer, SFTTrainer):
    r"""
    trl's [`~trl.SFTTrainer`] with the objective of block diffusion (`objective/`). Data, noise and forward differ;
    collators, packing, the normalisation of the loss, checkpoints, LoRA and logging are trl's. With the modality's
    weight a (`text_weight`, `image_weight`) the loss is

        L = sum_i a_i * b_i * (confidence_weight * confidence_loss_i - log_probs_i) / num_items,

    where b_i is the weight of the token's document ([`length_weights`], scaled so that its mean over all batches of
    the step is one; 1 without `length_weighting`), log_probs_i the weighted log-probability of token i over its noisy
    copies and confidence_loss_i the entropy of its right predictions ([`add_block_diffusion_head`]), and num_items the
    number of tokens with a label: in all accumulated batches and on all processes.

    Logged are, besides trl's numbers: `text_loss` and `image_loss`, the mean of -log_probs_i for each modality;
    `text_accuracy` and `image_accuracy`, the share of masked tokens whose likeliest prediction is right;
    `block_length`; with `editing_weight` `repaired`, the share of tokens shown wrong that are predicted right;
    `max_load_violation` and `router_z_loss`, see [`RouterBalancing`].

    Args:
        model: A model or the name of one.
        args ([`LLaDAUniSFTConfig`], *optional*): Settings.
        train_dataset, eval_dataset: In any format of [`prepare_dataset`], or prepared. A dict of training datasets by
            task is mixed by `args.task_mix`.
        processing_class ([`LLaDAUniProcessor`], or a tokenizer for a text-only model, *optional*): Default: from where
            the model came. Saved with each checkpoint.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter; see [`lora_config`].
        **kwargs: Further arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError, TypeError: for settings that do not fit the model, or rows that do not fit a format.
    """

    args: LLaDAUniSFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LLaDAUniSFTConfig | None = None,
        train_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: Processing | None = None,
        peft_config: Any | None = None,
        **kwargs: Any,
    ):
        # 1. Check what can be checked before any work
        args = check_settings(args, LLaDAUniSFTConfig, "llada-uni-sft")
        for name, instead in REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` has no meaning in {type(self).__name__}; {instead}.")
        if not train_dataset:
            raise ValueError(f"`train_dataset` must hold rows to train on, got {train_dataset!r}.")
        parts = train_dataset if isinstance(train_dataset, dict) else {None: train_dataset}
        for task, part in parts.items():
            if isinstance(part, Dataset | IterableDataset):  # of what is none, its preparation says more
                self.check_columns("train_dataset" if task is None else f"train_dataset[{task!r}]", part)

        # 2. The model
        model, processing_class = self._take_model(model, processing_class, args, kwargs)
        is_packed = args.packing or bool(args.eval_packing)
        if is_packed and args.max_length is not None and args.max_length % self.block_length:
            raise ValueError(
                f"`max_length` ({args.max_length}) must be a multiple of `block_length` ({self.block_length}) with "
                "`packing`: documents are made of whole blocks."
            )
        trains_adapter = peft_config is not None or is_peft_model(model)
        self._choose_trained_parameters(model, args, trains_adapter)

        # 3. The data. trl would leave rows with images to a collator.
        self._image_token_offset = model.config.get_text_config().image_token_offset
        train_dataset = self._prepare_training_data(train_dataset, processing_class, args)
        self._training_data: AnyDataset | None = train_dataset

        # 4. trl's trainer, with the objective as the model's forward
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._training_data = None  # trl has made its own of it
        if is_packed and isinstance(self.data_collator, DataCollatorForLanguageModeling):
            assert not isinstance(args.pad_to_multiple_of, str)  # settled by trl
            # trl joins all packed rows into one, as flash attention likes it. A mask would then be quadratic in the
            # whole batch, and not in a row.
            self.data_collator = DataCollatorForLanguageModeling(
                pad_token_id=self.data_collator.pad_token_id,
                pad_to_multiple_of=args.pad_to_multiple_of,
                return_position_ids=True,
            )
        self._stage = args.stage.replace("_", " ")
        base_model = unwrap(self.model)
        add_block_diffusion_head(base_model)
        preset_rate = 0.0 if trains_adapter else STAGES[args.stage].expert_bias_update_rate
        update_rate = preset_rate if args.expert_bias_update_rate is None else args.expert_bias_update_rate
        self.router_balancing = RouterBalancing(
            base_model, update_rate, self.accelerator, self._report, args.expert_bias_update
        )
        self._length_scale: torch.Tensor | None = None
        self._corruption = args.make_corruption()
        text_config = base_model.config.get_text_config()
        num_words = text_config.vocab_size if self._image_token_offset is None else self._image_token_offset
        self._vocabulary = num_words, text_config.vocab_size
        self._never_shown = never_shown(base_model)
        self.add_callback(self.router_balancing)

    # Model

    @staticmethod
    def _choose_trained_parameters(model: nn.Module, args: LLaDAUniSFTConfig, trains_adapter: bool) -> None:
        if not trains_adapter:
            freeze_all_but(model, args.trained_parts or STAGES[args.stage].trained_parts)
            return
        if args.trained_parts is not None:
            raise ValueError(
                f"`trained_parts` ({args.trained_parts}) cannot be given with an adapter: `peft_config` says what is "
                "trained."
            )
        if args.expert_bias_update_rate:
            raise ValueError(
                f"`expert_bias_update_rate` must be 0 with an adapter, got {args.expert_bias_update_rate}: the bias "
                "belongs to the frozen model and would not be saved."
            )

    # Data

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        if "input_ids" not in get_dataset_column_names(dataset):
            check_format(argument, dataset, LEARNABLE)

    def _prepare_training_data(self, dataset: Any, processing_class: Any, args: LLaDAUniSFTConfig) -> AnyDataset:
        mix = args.task_mix or STAGES[args.stage].task_mix
        assert not isinstance(mix, str)  # parsed by the configuration
        if isinstance(dataset, DatasetDict | IterableDatasetDict) and not set(dataset) <= set(mix):
            dataset = only_dataset("train_dataset", dataset)  # its splits are no tasks
        if not isinstance(dataset, dict):
            return self._tokenize(dataset, processing_class, args)
        missing = sorted(set(dataset) - set(mix))
        if missing:
            raise ValueError(
                f"`task_mix` must give a share for each task of `train_dataset`; it has none for {missing}, only for "
                f"{sorted(mix)}."
            )
        parts = {task: self._tokenize(part, processing_class, args) for task, part in dataset.items() if mix[task]}
        if not parts:
            raise ValueError(f"`task_mix` gives every task of `train_dataset` the share 0: {sorted(dataset)}.")
        return mix_datasets(parts, {task: mix[task] for task in parts}, seed=args.seed)

    def _tokenize(self, dataset: AnyDataset, processing_class: Any, args: LLaDAUniSFTConfig) -> AnyDataset:
        """Rows of any format to `input_ids` and `labels`."""
        with global_then_local_main_first():
            if "input_ids" in get_dataset_column_names(dataset):  # prepared, maybe with another `max_length`
                return rows_that_fit(dataset, args.max_length)
            return prepare_dataset(
                dataset,
                processing_class,
                block_length=self.block_length,
                max_length=args.max_length,
                caption_dropout=args.caption_dropout,
                image_dropout=args.image_dropout,
                seed=args.seed,
                model=self._data_model,
                editing_max_pixels=args.editing_max_pixels,
            )

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # Data for evaluation come here as they are, also through `evaluate`.
        if dataset is not self._training_data:
            dataset = self._tokenize(dataset, processing_class, args)
        with _without_bars():  # of what is soon done; tokenizing has one
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    # Loss

    def current_block_length(self) -> int:
        """Of the next training step; evaluation always has the final one."""
        if not self.model.training:
            return self.block_length
        state, schedule = self.state, (self.args.block_lengths, self.args.block_length_shares)
        return block_length_at(state.global_step, state.max_steps, self.block_length, *schedule)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # 1. The noise of this batch
        labels, block_length = inputs["labels"], self.current_block_length()
        document_ids = document_ids_of(labels, inputs.get("attention_mask"), inputs.get("position_ids"))
        generators = step_generators(self, labels.shape[0])
        masked, weights = self.noise.sample(labels, document_ids, block_length, generators)

        # 2. trl's loss is the mean of -log_probs; ours is the same of other log_probs. It also asks for the counts of
        #    tokens in `attention_mask` or `position_ids`.
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        noised = {"masked": masked, "weights": weights, "document_ids": document_ids, "block_length": block_length}
        if self._corruption is not None:

            def draft(blocks: torch.Tensor) -> torch.Tensor:
                # Only blocks that hold a token with a label take part in a pass.
                drafted = {"labels": labels.masked_fill(~blocks.any(dim=1), -100)}
                drafted |= {"masked": masked & blocks, "weights": weights * blocks}
                with torch.no_grad():
                    return model(**kept, **{**noised, **drafted}, predict=True, fused_lm_head=True).predicted_ids

            noised["shown_ids"], noised["masked"], noised["weights"] = self._corruption.corrupt(
                inputs["input_ids"],
                labels,
                masked,
                weights,
                self.noise.masked_share(labels),
                self._vocabulary,
                self._never_shown,
                document_ids,
                block_length,
                generators,
                draft,
            )
        statistics = torch.zeros(2, 5, device=labels.device)
        wrong = torch.zeros(2, device=labels.device)
        is_image = torch.zeros_like(labels, dtype=torch.bool)
        if self._image_token_offset is not None:
            is_image = labels >= self._image_token_offset
        loss_weights = torch.where(is_image, self.args.image_weight, self.args.text_weight)
        if self.args.length_weighting:
            # Evaluation sees one batch at a time.
            is_known = self.model.training and self._length_scale is not None
            scale = self._length_scale if is_known else self._scale_of_lengths([inputs], self.model.training)
            loss_weights = loss_weights * length_weights(masked, document_ids) * scale.to(labels.device)
        noised["keep_entropy"] = self.args.confidence_weight > 0

        def forward(**kwargs: Any) -> BlockDiffusionTerms:
            outputs = model(**kwargs)
            seen = noised["masked"].any(dim=1)
            terms = (-outputs.log_probs, outputs.is_top1, outputs.entropy, seen, outputs.label_mask)
            for row, modality in zip(statistics, (~is_image, is_image), strict=True):
                row += torch.stack([term.detach()[modality].float().sum() for term in terms])
            if outputs.num_wrong is not None:
                wrong.add_(torch.stack([outputs.num_wrong.sum(), outputs.num_repaired.sum()]).detach())
            if outputs.confidence_loss is not None:
                outputs.log_probs = outputs.log_probs - self.args.confidence_weight * outputs.confidence_loss
            outputs.log_probs = outputs.log_probs * loss_weights
            return outputs

        if self.model.training:
            _, _, is_token = tokens_of_pass(labels, document_ids, masked.shape[1], block_length)
            keep_logits = self.args.router_z_loss_coefficient > 0
            with self.router_balancing.recording(is_token, keep_logits):
                loss = super().compute_loss(
                    forward, {**kept, "labels": labels, **noised}, num_items_in_batch=num_items_in_batch
                )
            if keep_logits:
                loss = loss + self._weighted_z_loss(is_token, num_items_in_batch)
        else:
            loss = super().compute_loss(forward, {**kept, "labels": labels, **noised})
        self._report_statistics(statistics, block_length)
        if self._corruption is not None:
            num_wrong, num_repaired = self.accelerator.reduce(wrong, reduction="sum").tolist()
            self._report("repaired", num_repaired / max(num_wrong, 1))
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.args.length_weighting:
            # The model may still be in evaluation mode: before the first step, and after an evaluation.
            self._length_scale = self._scale_of_lengths(batches, of_all_processes=True)
        return batches, num_items

    def _scale_of_lengths(self, batches: list[dict[str, Any]], of_all_processes: bool) -> torch.Tensor:
        """What makes the mean of [`length_weights`] one over these batches."""
        sums = torch.zeros(2, device=self.args.device)  # nothing here waits for the device
        for batch in batches:
            labels = batch["labels"]
            document_ids = document_ids_of(labels, batch.get("attention_mask"), batch.get("position_ids"))
            sums += length_sums(labels, document_ids, self.noise.masked_share(labels)).to(sums.device)
        if of_all_processes:
            sums = self.accelerator.reduce(sums, reduction="sum")
        return sums[0] / sums[1].clamp(min=1e-6)

    def _weighted_z_loss(self, is_token: torch.BoolTensor, num_items_in_batch: Any) -> torch.Tensor:
        z_loss = self.router_balancing.z_loss(is_token)
        self._report("router_z_loss", self.accelerator.reduce(z_loss.detach(), reduction="mean").item())
        # A mean of each micro-batch. Where the loss is normalised by a count, Trainer leaves the accumulation to it.
        num_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        return self.args.router_z_loss_coefficient * z_loss / num_batches

    # Reports

    def _report(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _report_statistics(self, statistics: torch.Tensor, block_length: int) -> None:
        statistics = self.accelerator.reduce(statistics, reduction="sum")
        for name, (loss, correct, _, num_masked, num_labels) in zip(
            ("text", "image"), statistics.tolist(), strict=True
        ):
            if num_labels:
                self._report(f"{name}_loss", loss / num_labels)
            if num_masked:
                self._report(f"{name}_accuracy", correct / num_masked)
        self._report("block_length", block_length)
        # trl takes these two over all labels, of which some are not masked.
        _, correct, entropy, num_masked, _ = statistics.sum(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"][-1] = entropy / max(num_masked, 1)
        metrics["mean_token_accuracy"][-1] = correct / max(num_masked, 1)
