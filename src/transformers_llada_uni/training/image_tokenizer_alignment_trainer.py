"""Training of the image tokenizer on images whose codes are given."""

import sys
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE
from trl.data_utils import get_dataset_column_names

from ..image_codes import fetch_codes
from ..processing_llada_uni import LLaDAUniProcessor
from .base_trainer import BaseTrainer, check_class, check_has_columns, check_settings
from .data.dataset_formats import CODES_COLUMN, CODES_FORM, are_image_codes, image_codes_of, refuse_row, stored_image
from .data.dataset_loading import AnyDataset
from .image_tokenizer_alignment_config import LLaDAUniImageTokenizerAlignmentConfig
from .image_tokenizer_model import SHARING_TEMPERATURE, Towers, features_of, image_tokenizer_to_train
from .image_tokenizer_saving import save_image_tokenizer


class CodeClassifier(Towers):
    """
    The image tokenizer as a classifier of patches, whose classes are its codes.

    Args:
        visual: The vision tower (`model.visual`).
        vqmodel: The quantiser (`model.vqmodel`).
    """

    def __init__(self, visual: GlmImageVisionModel, vqmodel: GlmImageVQVAE):
        super().__init__()
        self.visual, self.vqmodel = visual, vqmodel

    def forward(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor, labels: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the share of patches, `labels` `(patches,)`, whose nearest code is the wanted one."""
        hidden_states = self.visual(pixel_values, grid_thw=image_grid_thw).last_hidden_state
        # Which code is nearest is a matter of small differences: mixed precision is for the tower alone.
        with torch.autocast(hidden_states.device.type, enabled=False):
            features = features_of(self.vqmodel, hidden_states.float())
            codebook = F.normalize(self.vqmodel.quantize.embedding.weight, dim=-1)
            similarity = features @ codebook.T
            loss = F.cross_entropy(similarity / SHARING_TEMPERATURE, labels)
        return loss, (similarity.argmax(dim=-1) == labels).float().mean()


class LLaDAUniImageTokenizerAlignmentTrainer(BaseTrainer):
    r"""
    transformers' [`~transformers.Trainer`] for an image tokenizer whose codes are settled, on images whose codes are
    known: other views of images it has codes for, images put together of several, and what the decoder draws of codes.
    Then it gives these images those codes, and what is drawn is read as what it was drawn from.

        L = - log softmax_k(cos(h, e_k) / 0.05)[wanted code]

    with the features h of a patch and all codes e_k, the mean over patches. The vision tower and the convolution
    before the codes are trained, in place, and with `train_codebook` the codes as well. Logged is the share of patches
    whose nearest code is the wanted one, `code_accuracy`.

    `save_model` writes `image_tokenizer/` in the released layout.

    Args:
        model ([`LLaDAUniForConditionalGeneration`] or [`LLaDAUniModel`]): Holds the image tokenizer.
        args ([`LLaDAUniImageTokenizerAlignmentConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with an `image` and `image_codes`, a list of one `{"grid": [H, W], "codes":
            [H * W]}`, as [`encode_images`] gives them; or with `image`, `grid` and `codes`, as `llada-uni encode`
            does.
        processing_class ([`LLaDAUniProcessor`]): Sizes the images.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "alignment of the image tokenizer"
    args: LLaDAUniImageTokenizerAlignmentConfig
    model: CodeClassifier

    def __init__(
        self,
        model: PreTrainedModel,
        args: LLaDAUniImageTokenizerAlignmentConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: LLaDAUniProcessor | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniImageTokenizerAlignmentConfig, "llada-uni-image-tokenizer-aligned")
        holder = image_tokenizer_to_train(model)
        check_class("processing_class", processing_class, LLaDAUniProcessor)
        assert processing_class is not None
        self._check_datasets(train_dataset, eval_dataset)
        self._image_processor = processing_class.image_processor
        self._num_codes = holder.vqmodel.quantize.embedding.num_embeddings
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            self._check_codes(name, dataset)
        classifier = CodeClassifier(holder.visual, holder.vqmodel)
        classifier.requires_grad_(False)
        classifier.visual.requires_grad_(True)
        classifier.vqmodel.quant_conv.requires_grad_(True)
        classifier.vqmodel.quantize.embedding.requires_grad_(args.train_codebook)
        super().__init__(
            model=classifier,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=self._collate,
            **kwargs,
        )
        self._accuracies: dict[str, list[torch.Tensor]] = defaultdict(list)

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        check_has_columns(argument, dataset, ("image",))
        columns = set(get_dataset_column_names(dataset))
        if CODES_COLUMN not in columns and not {"grid", "codes"} <= columns:
            raise ValueError(
                f"`{argument}` must have a column `{CODES_COLUMN}`, or `grid` and `codes`, it has {sorted(columns)}."
            )

    def _check_codes(self, name: str, dataset: Dataset | IterableDataset | None) -> None:
        """Of all rows before the training, of a stream as they come."""
        if dataset is None:
            return
        used = [CODES_COLUMN] if CODES_COLUMN in get_dataset_column_names(dataset) else ["grid", "codes"]
        if isinstance(dataset, Dataset):
            for index, row in enumerate(dataset.select_columns(used)):
                try:
                    self._wanted(row)
                except (TypeError, ValueError, RuntimeError) as error:
                    refuse_row(index, str(error))

    def _wanted(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Grid and codes of a row. Raises ValueError, naming the column, for what are no codes of this tokenizer."""
        images = image_codes_of(row)
        if not isinstance(images, (list, tuple)) or len(images) != 1 or not are_image_codes(images[0]):
            raise ValueError(f"`{CODES_COLUMN}` of a row must be [{CODES_FORM}], got {str(images)[:100]}.")
        fetch_codes(torch.tensor(images[0]["codes"]).view(*images[0]["grid"]), self._num_codes, sys.maxsize)
        return images[0]

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [[self._image_processor.fetch_images(stored_image(row["image"]))] for row in rows]
        batch = dict(self._image_processor(images, resize_mode=self.args.resize_mode, return_tensors="pt"))
        labels = []
        for row, (_, *grid) in zip(rows, batch["image_grid_thw"].tolist(), strict=True):
            wanted = self._wanted(row)
            if list(wanted["grid"]) != grid:
                raise ValueError(
                    f"`{CODES_COLUMN}` have the grid {list(wanted['grid'])}, but the image has {grid} by the rule of "
                    f"`resize_mode={self.args.resize_mode!r}`."
                )
            labels += wanted["codes"]
        return {**batch, "labels": torch.tensor(labels)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, accuracy = model(**inputs)
        self._accuracies["train" if self.model.training else "eval"].append(accuracy.detach())
        return (loss, {"code_accuracy": accuracy}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Patches of a batch are one row of them: there is nothing to gather but the loss.
        return super().prediction_step(model, inputs, True, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        kind, prefix = ("eval", "eval_") if "eval_loss" in logs else ("train", "")
        if accuracies := self._accuracies.pop(kind, None):
            logs = {**logs, f"{prefix}code_accuracy": torch.stack(accuracies).mean().item()}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._is_saving_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            classifier = self.accelerator.unwrap_model(self.model)
            folder = output_dir or str(self.args.output_dir)
            save_image_tokenizer(folder, classifier.visual, classifier.vqmodel, self._image_processor)
