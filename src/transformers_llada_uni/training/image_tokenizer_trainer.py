"""Training of the image tokenizer against captions."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..loading.folder_writing import folder_at_once
from ..processing_llada_uni import LLaDAUniProcessor
from .base_trainer import BaseTrainer, check_class, check_has_columns, check_settings
from .data.dataset_formats import stored_image
from .image_tokenizer_config import LLaDAUniImageTokenizerConfig
from .image_tokenizer_loss import codebook_statistics, recall_at_one, sigmoid_contrastive_loss
from .image_tokenizer_model import ImageTokenizerWithText, image_tokenizer_to_train
from .image_tokenizer_saving import save_image_tokenizer
from .objective.noise import step_generator


SHARING_COLUMNS = ("content", "style")


class GroupSampler(Sampler[int]):
    """Rows in an order drawn anew each epoch in which rows of one group stay together, so that a batch holds both."""

    def __init__(self, groups: list[Any], seed: int):
        self._members: dict[Any, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            self._members[group].append(index)
        self._length, self._seed, self._epoch = len(groups), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        members = list(self._members.values())
        random.Random(f"{self._seed} {self._epoch}").shuffle(members)
        return itertools.chain.from_iterable(members)


class SamplerEpoch(TrainerCallback):
    """Tells a sampler its epoch: behind the wrappers of several processes and of a resumed epoch nobody else does."""

    def __init__(self, sampler: GroupSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def _numbered(names: Iterable[str]) -> list[int]:
    """Each name as a number, equal names alike."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


class LLaDAUniImageTokenizerTrainer(BaseTrainer):
    r"""
    transformers' [`~transformers.Trainer`] for the image tokenizer (SigLIP-VQ), the `visual` and `vqmodel` of a
    LLaDA-Uni model, which are trained in place:

        L = sigmoid contrastive loss + commitment_weight * |h - sg(e)|^2 + reconstruction_weight * mean |f(e) - x|^2
            (+ codebook_weight * |sg(h) - e|^2)

    with features h and codes e of length one (arXiv 1711.00937), and f(e) the pixels x of a patch as its code tells
    them (or all codes of the image, with `reconstruction_layers`). With `num_style_codes` images share codes, and
    two losses of [`ImageTokenizerWithText`] are added by `sharing_weight` and `group_weight`. The term in brackets is
    there for `codebook_update="gradient"`; with `"ema"` codes are moving averages of their features. Codes that nobody
    uses are set to features of the batch. Logged are the terms, and the codebook's usage and perplexity since the last
    log; evaluation adds the recall of captions and images.

    `save_model` writes `image_tokenizer/` in the released layout and `text_model/`. `model.save_pretrained` of the
    model that was given saves the whole.

    Args:
        model ([`LLaDAUniForConditionalGeneration`] or [`LLaDAUniModel`]): Holds the image tokenizer.
        text_model ([`~transformers.PreTrainedModel`]): A text encoder, such as the text tower of SigLIP. Trained too.
        args ([`LLaDAUniImageTokenizerConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with an `image` and a `caption`; with `num_style_codes` also with a
            `content`, a name, and a `style`, a name or a list of `num_style_codes` of them.
        processing_class ([`LLaDAUniProcessor`]): Sizes the images.
        text_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of `text_model`. Default: the
            processor's.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "training of the image tokenizer"
    _columns = ("image", "caption")
    args: LLaDAUniImageTokenizerConfig
    model: ImageTokenizerWithText

    def __init__(
        self,
        model: PreTrainedModel,
        text_model: PreTrainedModel,
        args: LLaDAUniImageTokenizerConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: LLaDAUniProcessor | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniImageTokenizerConfig, "llada-uni-image-tokenizer")
        holder = image_tokenizer_to_train(model)
        check_class("processing_class", processing_class, LLaDAUniProcessor)
        assert processing_class is not None
        self._check_datasets(train_dataset, eval_dataset)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if args.num_style_codes and dataset is not None:
                check_has_columns(name, dataset, SHARING_COLUMNS)
        self._holder = holder
        self._text_tokenizer = processing_class.tokenizer if text_tokenizer is None else text_tokenizer
        self._image_processor = processing_class.image_processor
        tokenizer = ImageTokenizerWithText(
            holder.visual, holder.vqmodel, text_model, args.num_style_codes, args.reconstruction_layers
        ).requires_grad_(True)
        # The gradient of the codebook is either a loss of its own or, with moving averages, not wanted at all.
        holder.vqmodel.quantize.embedding.requires_grad_(args.codebook_update == "gradient")
        super().__init__(
            model=tokenizer,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=self._collate,
            **kwargs,
        )
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._counts: torch.Tensor | None = None

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [[self._image_processor.fetch_images(stored_image(row["image"]))] for row in rows]
        texts = self._text_tokenizer(
            [row["caption"] for row in rows],
            padding=True,
            truncation=True,
            max_length=self.args.max_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        batch = dict(self._image_processor(images, resize_mode=self.args.resize_mode, return_tensors="pt"))
        batch |= {name: texts[name] for name in ("input_ids", "attention_mask")}
        has_one_size = len(batch["image_grid_thw"].unique(dim=0)) == 1
        for name in ("num_style_codes", "reconstruction_layers"):
            if getattr(self.args, name) and not has_one_size:
                raise ValueError(f"`{name}`: the images of a batch must have one size.")
        if self.args.num_style_codes:
            batch["content_ids"] = torch.tensor(_numbered([row["content"] for row in rows]))
            styles = zip(*(self._styles(row["style"]) for row in rows), strict=True)
            batch["style_ids"] = torch.tensor([_numbered(names) for names in styles]).T
        return batch

    def _styles(self, style: str | list[str]) -> list[str]:
        """One name for all style codes, or a list with one for each."""
        if isinstance(style, str):
            return [style]
        if len(style) != self.args.num_style_codes:
            raise ValueError(
                f"`style` must be a name or a list of {self.args.num_style_codes} (`num_style_codes`), got {style!r}."
            )
        return style

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.num_style_codes or isinstance(dataset, IterableDataset):
            return super()._get_train_sampler(train_dataset)
        assert dataset is not None
        sampler = GroupSampler(dataset["content"][:], self.args.seed)
        self.remove_callback(SamplerEpoch)  # of a run before, or of data for evaluation
        self.add_callback(SamplerEpoch(sampler))
        return sampler

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, tokenizer = self.args, self.accelerator.unwrap_model(model)
        outputs = model(**inputs)
        terms = {
            "contrastive_loss": sigmoid_contrastive_loss(
                outputs.image_embeds, outputs.text_embeds, tokenizer.logit_scale, tokenizer.logit_bias
            ),
            "commitment_loss": outputs.commitment_loss,
            "codebook_loss": outputs.codebook_loss,
            "reconstruction_loss": outputs.reconstruction_loss,
        }
        weights = {
            "contrastive_loss": 1.0,
            "commitment_loss": args.commitment_weight,
            "reconstruction_loss": args.reconstruction_weight,
        }
        if args.codebook_update == "gradient":
            weights["codebook_loss"] = args.codebook_weight
        if args.num_style_codes:
            terms |= {"sharing_loss": outputs.sharing_loss, "group_loss": outputs.group_loss}
            weights |= {"sharing_loss": args.sharing_weight, "group_loss": args.group_weight}
        loss = sum(weight * terms[name] for name, weight in weights.items())
        if self.model.training:
            self._last_outputs = outputs
            reported = {**terms, "sharing_agreement": outputs.sharing_agreement} if args.num_style_codes else terms
            for name, term in reported.items():
                self._sums[name].append(term.detach().item())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # After the backward pass, which needs the codebook as it was.
        self._follow_codebook(self.accelerator.unwrap_model(self.model), self._last_outputs)
        self._last_outputs = None
        return loss

    def _follow_codebook(self, tokenizer: ImageTokenizerWithText, outputs: Any) -> None:
        args = self.args
        counts = tokenizer.update_codebook(
            outputs.features, outputs.codes, args.codebook_decay, args.codebook_update == "ema"
        )
        self._counts = counts if self._counts is None else self._counts + counts
        step = self.state.global_step
        if args.revival_threshold and step % args.revival_interval == args.revival_interval - 1:
            generator = step_generator(self)
            num_revived = tokenizer.revive_dead_codes(outputs.features, args.revival_threshold, generator)
            self._sums["revived_codes"].append(num_revived)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._counts is not None:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._sums.items()}}
            logs |= codebook_statistics(self._counts)
            self._sums.clear()
            self._counts = None
        super().log(logs, start_time)

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        The loss, recall at one among all rows in both directions, and usage and perplexity of the codebook.
        """
        was_training = self.model.training
        self.model.eval()
        losses, images, texts, counts = [], [], [], torch.zeros_like(self.model.code_counts)
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            losses.append(self.accelerator.gather_for_metrics(loss[None]))
            images.append(self.accelerator.gather_for_metrics(outputs.image_embeds))
            texts.append(self.accelerator.gather_for_metrics(outputs.text_embeds))
            counts += torch.bincount(outputs.codes, minlength=len(counts))
        metrics = {"loss": torch.cat(losses).mean().item(), **recall_at_one(torch.cat(images), torch.cat(texts))}
        metrics |= codebook_statistics(self.accelerator.reduce(counts, reduction="sum"))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        return metrics

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._is_saving_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_image_tokenizer(folder, self._holder.visual, self._holder.vqmodel, self._image_processor)
            with folder_at_once(folder / "text_model", replace=True) as part:
                self.accelerator.unwrap_model(self.model).text_model.save_pretrained(part)
                self._text_tokenizer.save_pretrained(part)
