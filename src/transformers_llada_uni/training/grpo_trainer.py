"""Training by rewards: GRPO with block-diffusion rollouts, of texts and of images."""

import zlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import global_then_local_main_first, pad

from ..generation.configuration import BlockDiffusionGenerationConfig
from ..image_sizes import UPSCALE
from ..input_checks import check_grid
from ..processing_llada_uni import LLaDAUniProcessor
from ..seeding import seeded_generator
from ..unwrapping import unwrap
from .base_trainer import check_settings
from .data.dataset_formats import CODES_COLUMN, check_text, refuse_row
from .data.dataset_loading import AnyDataset, only_dataset
from .data.preparation import prepare_prompts
from .grpo_config import LLaDAUniGRPOConfig
from .language_model_trainer import LanguageModelTrainer, Processing
from .objective.block_diffusion import add_block_diffusion_head
from .objective.noise import step_generator
from .reference_model import make_reference


# What a prompt is made of, for which trl has ways of its own; rewards get them nevertheless.
IMAGE_COLUMNS = ("image", "images")


class LLaDAUniGRPOTrainer(LanguageModelTrainer, GRPOTrainer):
    r"""
    trl's [`~trl.GRPOTrainer`] with two differences.

    **Rollouts** come from the block-diffusion `generate` with its cache, or, for rows with a column `grid` (H, W),
    from `generate_image_codes`; the prompt is then the caption.

    **Log-probabilities** of a token are estimated, as a masked-diffusion model has no exact ones: given the clean
    blocks before it,

    - `"full_mask"`: with all answer tokens of its block masked. This is the one-step estimate of diffu-GRPO (d1, arXiv
      2504.12216) made block by block. It has no noise.
    - `"complementary"`: the mean over `num_noise_samples` pairs of complementary masks: a token is predicted from a
      part of its block, and once in each pair. The pairs are those of coupled-GRPO (DiffuCoder, arXiv 2506.20639),
      which weighs their tokens by 1/t and averages with `"full_mask"`; here all tokens weigh the same.

    The masks follow from the row's tokens, the seed and the step of the rollout: the policy that made it, the one that
    learns from it and the reference are compared under the same noise, and their ratio is exactly 1 before the first
    update. What comes after an answer in its last block stays masked, as it was when the block was begun. Prompts are
    never masked (d1 masks some of theirs anew in each iteration, but trl computes the old log-probabilities once).

    Rewards are trl's: callables (or reward models) that get `prompts`, `completions`, `completion_ids` and the columns
    of the data, also those with the images of prompts. For generated images they also get `image_codes`, tensors
    (H, W), and with `decode_images` `generated_images`.

    Args:
        model: A model or the name of one.
        reward_funcs: One reward or a list of them.
        args ([`LLaDAUniGRPOConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with `prompt`, a text or a chat that ends with the user, and whatever the
            rewards need. Chats may have images, see [`prepare_prompts`]; rows with a `grid` have none.
        processing_class ([`LLaDAUniProcessor`], or a tokenizer for a text-only model, *optional*): Default: from where
            the model came.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter; see [`lora_config`].
        decode_images (`Callable`, *optional*): Turns a list of image codes (H, W) into a list of images, such as
            `pipe.decode_codes`, for rewards that look at them.
        **kwargs: Further arguments of [`~trl.GRPOTrainer`].

    Raises:
        ValueError, TypeError: for settings or data that do not fit.
    """

    _stage = "reward training (GRPO)"
    args: LLaDAUniGRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: LLaDAUniGRPOConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any | None = None,
        processing_class: Processing | None = None,
        peft_config: Any | None = None,
        decode_images: Callable[[list[torch.LongTensor]], list[Any]] | None = None,
        **kwargs: Any,
    ):
        # 1. Check what can be checked before any work
        args = check_settings(args, LLaDAUniGRPOConfig, "llada-uni-grpo")
        if not train_dataset:
            raise ValueError(f"`train_dataset` must hold prompts to train on, got {train_dataset!r}.")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is not supported: rollouts are single answers of `generate`.")
        if decode_images is not None and not callable(decode_images):
            raise TypeError(f"`decode_images` must be callable, got {type(decode_images).__name__}.")

        # 2. The model, and its reference
        train_dataset = only_dataset("train_dataset", train_dataset)
        model, processing_class = self._take_model(model, processing_class, args, kwargs)
        if getattr(unwrap(model), "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "`model` is sharded over processes by `distributed_config`, but rollouts of different processes take "
                "different numbers of passes, which would wait for one another forever. Load it whole on each process."
            )
        self.makes_images = "grid" in get_dataset_column_names(train_dataset)
        if self.makes_images:
            if not isinstance(processing_class, LLaDAUniProcessor):
                raise TypeError("`processing_class` must be a LLaDAUniProcessor for rows with a `grid`.")
            self._processor = processing_class
        self.decode_images = decode_images
        self._rollout_step = {"train": 0, "eval": 0}
        train_dataset = self._prepare_rows(train_dataset, "train_dataset", processing_class)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_rows(dataset, f"eval_dataset[{name!r}]", processing_class)
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset", processing_class)
        beta, ref_model = args.beta, None  # type: float, Any
        if beta != 0.0 and peft_config is None and not is_peft_model(model):
            ref_model = make_reference(model)
            args.beta = 0.0  # trl would load the reference by the name of a class of transformers
        text_config = model.config.get_text_config()
        self.mask_token_id, self.image_token_offset = text_config.mask_token_id, text_config.image_token_offset

        # 3. trl's trainer, with our objective and our way to generate
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self.beta = args.beta = beta
        self.aux_loss_enabled = False  # whatever the model's configuration says: see `WITHOUT_MEANING`
        add_block_diffusion_head(unwrap(self.model))
        if ref_model is not None:
            add_block_diffusion_head(ref_model)
            self.ref_model = self._prepare_reference(ref_model)
        self.generation_config = BlockDiffusionGenerationConfig(
            max_new_tokens=args.max_completion_length,
            block_length=self.block_length,
            num_steps_per_block=args.num_steps_per_block,
            threshold=args.threshold,
            do_sample=True,
            temperature=args.temperature,
            top_k=args.top_k or None,
            top_p=None if args.top_p == 1.0 else args.top_p,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self.generation_kwargs = {}

    def _prepare_reference(self, ref_model: PreTrainedModel) -> Any:
        """As trl does with the reference that it loads."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(ref_model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(ref_model, self.accelerator)
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    # Rows

    def _prepare_rows(self, dataset: AnyDataset, name: str, processing_class: Any) -> AnyDataset:
        """Rows for rollouts: with `prompt_ids`, or, for images, checked."""
        columns = get_dataset_column_names(dataset)
        needed = ("prompt", "grid") if self.makes_images else ("prompt",)
        for column in needed:
            if column not in columns:
                raise ValueError(f"`{name}` must have a column `{column}`, it has {sorted(columns)}.")
        if "prompt_ids" in columns:
            return dataset
        if not self.makes_images:
            with global_then_local_main_first():
                return prepare_prompts(dataset, processing_class, model=self._data_model)
        if found := sorted({*IMAGE_COLUMNS, CODES_COLUMN} & set(columns)):
            raise ValueError(f"`{name}` has `grid` and `{found[0]}`: rollouts of edited images are not supported.")

        def check(row: dict[str, Any], index: int) -> dict[str, Any]:
            check_text(row["prompt"], index, "prompt")
            try:
                check_grid(row["grid"])
            except ValueError as error:
                refuse_row(index, str(error))
            return row

        if isinstance(dataset, IterableDataset):
            return dataset.map(check, with_indices=True)
        for index, row in enumerate(dataset.select_columns(list(needed))):
            check(row, index)
        return dataset

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset", self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    # Rollouts

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        self._rollout_step[mode] = self.state.global_step if mode == "train" else 0
        # trl would handle images of prompts by itself; here they are codes in `prompt_ids`.
        self._rows = inputs
        own = ("prompt_ids", *IMAGE_COLUMNS)
        return super()._generate_and_score_completions(
            [{name: value for name, value in row.items() if name not in own} for row in inputs]
        )

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return [tuple(row["grid"]) for row in self._rows]

    def _tokenize_prompts(self, prompts: list):
        if not self.makes_images:
            return [row["prompt_ids"] for row in self._rows], None, {}
        self._image_inputs = []
        for caption, (height, width) in zip(prompts, self._grids, strict=True):
            unit = self._processor.image_processor.patch_size * UPSCALE
            self._image_inputs.append(
                self._processor(text=caption, task="text_to_image", height=height * unit, width=width * unit)
            )
        return [inputs["input_ids"][0].tolist() for inputs in self._image_inputs], None, {}

    @contextmanager
    def _seeded(self):
        """`generate` draws from torch's own state, set from the run's seed and step, and leaves it as it was."""
        seed = step_generator(self).initial_seed()
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        with self._seeded():
            if self.makes_images:
                return self._generate_images(), None
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )

    def _generate_images(self) -> list[list[int]]:
        """The codes of all rows as tokens; rows of one grid are generated together."""
        completions: list[list[int]] = [[] for _ in self._grids]
        checkpointing = self.args.activation_checkpointing_kwargs
        assert not isinstance(checkpointing, str)  # parsed by the configuration
        whole = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=checkpointing,
        )
        is_guided = self.args.guidance_scale != 1.0
        guidance = {"guidance_scale": self.args.guidance_scale} if is_guided else {}
        gather = self._dist.summon_full_params(self.model_wrapped, recurse=False)
        with whole as model, torch.no_grad(), gather:
            for grid in sorted(set(self._grids)):
                rows = [row for row, own in enumerate(self._grids) if own == grid]
                inputs: dict[str, torch.Tensor] = {}
                for name in ("input_ids", "negative_input_ids") if is_guided else ("input_ids",):
                    ids = [self._image_inputs[row][name][0] for row in rows]
                    mask_name = name.replace("input_ids", "attention_mask")
                    inputs[name] = pad(ids, self._tokenizer.pad_token_id, padding_side="left")
                    inputs[mask_name] = pad([torch.ones_like(row) for row in ids], 0, padding_side="left")
                settings = {
                    name: getattr(self.generation_config, name)
                    for name in ("block_length", "threshold", "temperature", "top_k", "top_p", "mask_token_id")
                }
                codes = model.generate_image_codes(
                    **{name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()},
                    **guidance,
                    grid=grid,
                    num_steps_per_block=self.args.num_steps_per_block,
                    do_sample=True,
                    **settings,
                )
                for row, own in zip(rows, codes, strict=True):
                    completions[row] = (own + self.image_token_offset).tolist()
        return completions

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        images = [{name: row[name] for name in IMAGE_COLUMNS if name in row} for row in self._rows]
        inputs = [{**row, **own} for row, own in zip(inputs, images, strict=True)]
        if self.makes_images:
            codes = [
                torch.tensor(ids).view(grid) - self.image_token_offset
                for ids, grid in zip(completion_ids_list, self._grids, strict=True)
            ]
            inputs = [{**row, "image_codes": own} for row, own in zip(inputs, codes, strict=True)]
            if self.decode_images is not None:
                with self._seeded():
                    images = list(self.decode_images(codes))
                if len(images) != len(codes):
                    raise ValueError(f"`decode_images` returned {len(images)} images for {len(codes)} grids.")
                inputs = [{**row, "generated_images": own} for row, own in zip(inputs, images, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    # Log-probabilities

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **unused,  # of models that read images in each pass
    ):
        batch_size = batch_size or len(input_ids)
        logps, entropies = [], []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            chunk = self._lay_out(input_ids[rows], attention_mask[rows], logits_to_keep)
            positions, is_answer = chunk.pop("answer_positions"), chunk.pop("is_answer")
            with self.accelerator.autocast():
                outputs = model(**chunk, block_length=self.block_length, fused_lm_head=True)
            logps.append(outputs.log_probs.gather(1, positions).masked_fill(~is_answer, 0.0))
            entropies.append(outputs.entropy.gather(1, positions).masked_fill(~is_answer, 0.0))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _lay_out(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, logits_to_keep: int
    ) -> dict[str, torch.Tensor]:
        """
        Rows without padding in front, extended by masks to whole blocks, and their noise.

        Returns:
            Inputs of the objective; `answer_positions` `(batch, logits_to_keep)`, where each answer token went;
            `is_answer`, which of them there are.
        """
        is_token = attention_mask.bool()
        num_tokens = is_token.sum(dim=1)
        length = int(num_tokens.max())
        length += -length % self.block_length
        batch_size, device = len(input_ids), input_ids.device

        # A stable sort moves the tokens to the front in their order.
        order = torch.sort((~is_token).to(torch.uint8), dim=1, stable=True).indices
        ids = torch.full((batch_size, length), self.mask_token_id, device=device)
        width = min(length, input_ids.shape[1])
        positions = torch.arange(length, device=device).expand(batch_size, length)
        is_kept = positions < num_tokens[:, None]
        ids[:, :width] = input_ids.gather(1, order)[:, :width]
        ids = ids.masked_fill(~is_kept, self.mask_token_id)

        is_answer = is_token[:, -logits_to_keep:]
        first_answer = num_tokens - is_answer.sum(dim=1)
        labels = ids.masked_fill(~is_kept | (positions < first_answer[:, None]), -100)
        end = num_tokens + (-num_tokens) % self.block_length
        document_ids = torch.where(positions < end[:, None], 0, -1)
        answer_positions = (first_answer[:, None] + torch.arange(logits_to_keep, device=device)).clamp(max=length - 1)

        step = self._rollout_step["train" if self.model.training else "eval"]
        generators = []
        for row, count in zip(ids.tolist(), num_tokens.tolist(), strict=True):
            content = zlib.crc32(np.array(row[:count]).tobytes())
            generators.append(seeded_generator(self.args.seed, step, content))
        masked, weights = self.noise.sample(labels, document_ids, self.block_length, generators)
        return {
            "input_ids": ids,
            "labels": labels,
            "document_ids": document_ids,
            "masked": masked,
            "weights": weights,
            "answer_positions": answer_positions,
            "is_answer": is_answer,
        }
