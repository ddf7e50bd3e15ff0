"""Training by rewards: GRPO with block-diffusion rollouts, of texts and of pictures."""

import copy
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from ..generation_configuration import BlockDiffusionGenerationConfig
from ..processing_llada_uni import UPSCALE
from .checkpointing import ResumableTrainerMixin
from .expert_checkpoints import FusedExpertsMixin
from .grpo_config import LLaDAUniGRPOConfig
from .model_card import TrainingCardMixin
from .model_loading import base_of, resolve_model
from .noise import step_generator
from .objective import add_block_diffusion_head


class LLaDAUniGRPOTrainer(TrainingCardMixin, ResumableTrainerMixin, FusedExpertsMixin, GRPOTrainer):
    r"""
    trl's [`~trl.GRPOTrainer`] with two differences.

    **Rollouts** come from the block-diffusion `generate` with its cache, or, for rows with a column `grid` (H, W),
    from `generate_image_codes`; the prompt is then the caption.

    **Log-probabilities** of a token are estimated, as a masked-diffusion model has no exact ones: given the clean
    blocks before it,

    - `"full_mask"`: with all answer tokens of its block masked. This is the one-step estimate of diffu-GRPO (d1, arXiv
      2504.12216) made block by block. It has no noise.
    - `"complementary"`: the mean over `num_noise_samples` pairs of complementary masks, as coupled-GRPO (DiffuCoder,
      arXiv 2506.20639): a token is predicted from a part of its block, and once in each pair.

    The masks follow from the row's tokens and the seed: the policy that made a rollout, the one that learns from it
    and the reference are compared under the same noise, and their ratio is exactly 1 before the first update. What
    comes after an answer in its last block stays masked.

    Rewards are trl's: callables (or reward models) that get `prompts`, `completions`, `completion_ids` and the columns
    of the data. For pictures they also get `image_codes`, tensors (H, W), and with `decode_images` `generated_images`.

    Args:
        model: A model or the name of one.
        reward_funcs: One reward or a list of them.
        args ([`LLaDAUniGRPOConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with `prompt`, a text or a chat that ends with the user, and whatever the
            rewards need. Pictures as in trl: a column `image` or `images`, or inside the messages.
        processing_class ([`LLaDAUniProcessor`], or a tokenizer for a text-only model, *optional*): Default: from where
            the model came.
        peft_config ([`~peft.PeftConfig`], *optional*): Train an adapter; see [`lora_config`].
        decode_images (`Callable`, *optional*): Turns a list of image codes (H, W) into a list of pictures, such as
            `pipe.decode_codes`, for rewards that look at them.
        **kwargs: Further arguments of [`~trl.GRPOTrainer`].

    Raises:
        ValueError, TypeError: for settings or data that do not fit.
    """

    _stage = "reward training (GRPO)"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: LLaDAUniGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any | None = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        decode_images: Callable[[list[torch.LongTensor]], list[Any]] | None = None,
        **kwargs: Any,
    ):
        # 1. Check what can be checked before any work
        args = LLaDAUniGRPOConfig("llada-uni-grpo") if args is None else args
        if not isinstance(args, LLaDAUniGRPOConfig):
            raise TypeError(f"`args` must be a LLaDAUniGRPOConfig, got {type(args).__name__}.")
        if not train_dataset:
            raise ValueError(f"`train_dataset` must hold prompts to train on, got {train_dataset!r}.")
        columns = get_dataset_column_names(train_dataset)
        if "prompt" not in columns:
            raise ValueError(f"`train_dataset` must have a column `prompt`, it has {sorted(columns)}.")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` is not supported: rollouts are single answers of `generate`.")
        if decode_images is not None and not callable(decode_images):
            raise TypeError(f"`decode_images` must be callable, got {type(decode_images).__name__}.")

        # 2. The model, and its reference
        model, processing_class, self.block_length = resolve_model(
            model, processing_class, args.model_init_kwargs, args.block_length
        )
        args.model_init_kwargs = None  # used up
        self.makes_pictures = "grid" in columns
        if self.makes_pictures and not hasattr(processing_class, "image_processor"):
            raise TypeError("`processing_class` must be a LLaDAUniProcessor for rows with a `grid`.")
        self.decode_images = decode_images
        trains_adapter = peft_config is not None or is_peft_model(model)
        # trl would load the reference by the name of a class of transformers.
        beta, args.beta = args.beta, 0.0
        ref_model = None
        if beta != 0.0 and not trains_adapter:
            ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        text_config = model.config.get_text_config()
        self.mask_token_id, self.image_token_offset = text_config.mask_token_id, text_config.image_token_offset
        self.noise = args.make_noise()

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
        add_block_diffusion_head(base_of(self.model))
        if ref_model is not None:
            add_block_diffusion_head(ref_model)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
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
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self.generation_kwargs = {}

    # Rollouts

    def _generate_and_score_completions(self, inputs):
        if self.makes_pictures:
            self._grids = [tuple(row["grid"]) for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list):
        if not self.makes_pictures:
            prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
            return [torch.as_tensor(ids).tolist() for ids in prompt_ids], images, multimodal_fields
        self._picture_inputs = []
        for caption, (height, width) in zip(prompts, self._grids, strict=True):
            unit = self.processing_class.image_processor.patch_size * UPSCALE
            self._picture_inputs.append(
                self.processing_class(
                    text=caption, task="text_to_image", height=height * unit, width=width * unit, return_tensors=None
                )
            )
        return [inputs["input_ids"][0] for inputs in self._picture_inputs], None, {}

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
            if self.makes_pictures:
                return self._generate_pictures(), None
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )

    def _generate_pictures(self) -> list[list[int]]:
        """The codes of all rows as tokens; rows of one grid are generated together."""
        completions: list[list[int]] = [[] for _ in self._grids]
        unwrap = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with unwrap as model, torch.no_grad():
            for grid in sorted(set(self._grids)):
                rows = [row for row, own in enumerate(self._grids) if own == grid]
                inputs = {}
                for name in ("input_ids", "negative_input_ids"):
                    ids = [torch.tensor(self._picture_inputs[row][name][0]) for row in rows]
                    mask_name = name.replace("input_ids", "attention_mask")
                    inputs[name] = pad(ids, self._tokenizer.pad_token_id, padding_side="left")
                    inputs[mask_name] = pad([torch.ones_like(row) for row in ids], 0, padding_side="left")
                if self.args.guidance_scale == 1.0:
                    inputs = {name: tensor for name, tensor in inputs.items() if "negative" not in name}
                else:
                    inputs["guidance_scale"] = self.args.guidance_scale
                settings = {
                    name: getattr(self.generation_config, name)
                    for name in ("block_length", "threshold", "temperature", "top_k", "top_p", "mask_token_id")
                }
                codes = model.generate_image_codes(
                    **{k: v.to(self.accelerator.device) if torch.is_tensor(v) else v for k, v in inputs.items()},
                    grid=grid,
                    num_steps_per_block=self.args.num_steps_per_block,
                    do_sample=True,
                    **settings,
                )
                for row, own in zip(rows, codes, strict=True):
                    completions[row] = (own + self.image_token_offset).tolist()
        return completions

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self.makes_pictures:
            codes = [
                torch.tensor(ids).view(grid) - self.image_token_offset
                for ids, grid in zip(completion_ids_list, self._grids, strict=True)
            ]
            inputs = [{**row, "image_codes": own} for row, own in zip(inputs, codes, strict=True)]
            if self.decode_images is not None:
                pictures = self.decode_images(codes)
                inputs = [{**row, "generated_images": own} for row, own in zip(inputs, pictures, strict=True)]
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
        compute_aux_loss=False,
        pixel_values=None,
        image_grid_thw=None,
        **unused,
    ):
        if compute_aux_loss:
            raise ValueError("`router_aux_loss_coef` has no meaning here: loads are balanced by the experts' biases.")
        base_model = base_of(self.accelerator.unwrap_model(model))
        if pixel_values is not None:
            codes = base_model.model.encode_images(pixel_values, image_grid_thw)
            input_ids = base_model.model.place_image_codes(input_ids, codes)
        batch_size = batch_size or len(input_ids)
        logps, entropies = [], []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            chunk = self._lay_out(input_ids[rows], attention_mask[rows], logits_to_keep)
            columns, is_answer = chunk.pop("columns"), chunk.pop("is_answer")
            with self.accelerator.autocast():
                outputs = model(**chunk, block_length=self.block_length, fused_lm_head=True)
            logps.append(outputs.log_probs.gather(1, columns).masked_fill(~is_answer, 0.0))
            entropies.append(outputs.entropy.gather(1, columns).masked_fill(~is_answer, 0.0))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _lay_out(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, logits_to_keep: int
    ) -> dict[str, torch.Tensor]:
        """
        Rows without padding in front, extended by masks to whole blocks, and their noise.

        Returns:
            Inputs of the objective; `columns` `(batch, logits_to_keep)`, where each answer token went; `is_answer`.
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
        places = torch.arange(length, device=device).expand(batch_size, length)
        is_kept = places < num_tokens[:, None]
        ids[:, :width] = input_ids.gather(1, order)[:, :width]
        ids = ids.masked_fill(~is_kept, self.mask_token_id)

        is_answer = is_token[:, -logits_to_keep:]
        first_answer = num_tokens - is_answer.sum(dim=1)
        labels = ids.masked_fill(~is_kept | (places < first_answer[:, None]), -100)
        end = num_tokens + (-num_tokens) % self.block_length
        document_ids = torch.where(places < end[:, None], 0, -1)
        columns = (first_answer[:, None] + torch.arange(logits_to_keep, device=device)).clamp(max=length - 1)

        generators = []
        for row, count in zip(ids.tolist(), num_tokens.tolist(), strict=True):
            content = zlib.crc32(torch.tensor(row[:count]).numpy().tobytes())
            generators.append(torch.Generator().manual_seed(content ^ self.args.seed))
        masked, weights = self.noise.sample(labels, document_ids, self.block_length, generators)
        return {
            "input_ids": ids,
            "labels": labels,
            "document_ids": document_ids,
            "masked": masked,
            "weights": weights,
            "columns": columns,
            "is_answer": is_answer,
        }


__all__ = ["LLaDAUniGRPOTrainer"]
