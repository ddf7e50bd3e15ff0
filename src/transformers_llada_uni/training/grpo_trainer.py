"""Training by rewards: GRPO with block-diffusion rollouts, of texts and of images."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import global_then_local_main_first, is_async_callable, pad

from ..generation.best_of import numbers_of
from ..generation.configuration import BlockDiffusionGenerationConfig
from ..input_checks import check_grid
from ..processing_llada_uni import LLaDAUniProcessor
from ..unwrapping import unwrap
from .base_trainer import check_has_columns, check_settings
from .data.dataset_formats import CODES_COLUMN, check_text, refuse_row
from .data.dataset_loading import AnyDataset, only_dataset
from .data.preparation import prepare_prompts
from .grpo_config import LLaDAUniGRPOConfig
from .language_model_trainer import LanguageModelTrainer, Processing
from .objective.noise import step_generator
from .objective.rollout_likelihood import RolloutLikelihood, Rollouts
from .reference_model import make_reference


# What a prompt is made of, for which trl has ways of its own; rewards get them nevertheless.
IMAGE_COLUMNS = ("image", "images")


class LLaDAUniGRPOTrainer(LanguageModelTrainer, GRPOTrainer):
    r"""
    trl's [`~trl.GRPOTrainer`] with two differences.

    **Rollouts** come from the block-diffusion `generate` with its cache, or, for rows with a column `grid` (H, W),
    from `generate_image_codes`; the prompt is then the caption.

    **Log-probabilities**, whose ratio is clipped (`epsilon`, `epsilon_high`), are estimated, as a masked-diffusion
    model has no exact ones. Of `log_probability_estimate`, with p given the clean blocks before:

    - `"full_mask"`: log p of each token with all answer tokens of its block masked. This is the one-step estimate of
      diffu-GRPO (d1, arXiv 2504.12216) made block by block. The cheapest, without noise, but blind to what a block's
      tokens owe to one another: right where few steps decode a block.
    - `"elbo"`: EBPO's ratio of the whole answer y (LLaDA2.1, arXiv 2602.08676, eqs. 4 and 5),

          log rho(y | x) = 1/|y| sum_n w_n sum_b (log p_new(y^b | z_n, x) - log p_old(y^b | z_n, x)),

      the difference of two likelihood bounds. The sum over blocks b is one over their masked tokens, at
      `num_noise_samples` noise levels t_n, which share a pass. The paper names neither levels nor weights. Ours: t_n
      drawn from equal parts of `noise_range`, w_n = 1 / (N t_n), which makes it the bound; and 1/|y|, from ESPO (arXiv
      2512.03759), without which the ratio of a long answer is clipped at once. For images t_n are high, as in MaskGRPO
      (arXiv 2510.02880, section 3.2 and eq. 9: t from 0.8 to 1; its ratio is one of each level, ours of all together).
    - `"trace"`: TraceRL's (arXiv 2509.06949, the policy's objective): log p of each token given exactly the partly
      masked block that it was committed from in the rollout, which takes a noisy copy of a block for every step that
      decoded it. All steps weigh the same, and so do the tokens of a step. `trace_shrinkage` (the paper's s) takes
      neighbouring steps of a block for one, which is cheaper and less exact. The dearest, and the one that rewards
      what the decoder did: its probabilities are those that tokens were drawn with, but for `temperature`, `top_k`,
      `top_p` and guidance. Ours are the mean over an answer's steps, where the paper has the sum, and that there is no
      value model: advantages are GRPO's.

    The masks follow from the row's tokens, the seed and the step of the rollout (or from its trajectory): the policy
    that made it, the one that learns from it and the reference are compared under the same noise, and their ratio is
    exactly 1 before the first update. What comes after an answer in its last block stays masked, as it was when the
    block was begun, but for `"trace"`, which knows what stood there. Prompts are never masked (d1 masks some of theirs
    anew in each iteration, but trl computes the old log-probabilities once).

    Rewards are trl's: callables (or reward models) that get `prompts`, `completions`, `completion_ids` and the columns
    of the data, also those with the images of prompts, and give a list with a number for each completion, or `None`
    where they have none to give. For generated images they also get `image_codes`, tensors (H, W), and with
    `decode_images` `generated_images`.

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
        ValueError, TypeError: for settings or data that do not fit; in training, for a reward that gives something
            else.
    """

    _stage = "reward training (GRPO)"
    _columns = ("prompt",)
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
        self.check_columns("train_dataset", train_dataset)
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
        self._rollouts = {"train": Rollouts(), "eval": Rollouts()}
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
        self._likelihood = RolloutLikelihood(
            args.log_probability_estimate,
            args.make_noise(self.makes_images),
            self.block_length,
            self.mask_token_id,
            args.seed,
            args.trace_shrinkage,
            rollouts=lambda: self._rollouts[self._mode],
            keep_entropy=args.entropy_coef != 0 or args.use_adaptive_entropy,
        )

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
        self.reward_funcs = [
            checked_reward(*reward) for reward in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self.beta = args.beta = beta
        self.aux_loss_enabled = False  # whatever the model's configuration says: see `WITHOUT_MEANING`
        self.rollout_func = self._roll_out
        self._likelihood.attach(unwrap(self.model))
        if ref_model is not None:
            self._likelihood.attach(ref_model)
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
            return_dict_in_generate=True,
            output_trajectory=args.log_probability_estimate == "trace",
        )

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
        check_has_columns(name, dataset, needed)
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

    # Rows are seen before trl takes of them what it knows, and without what it has ways of its own for.

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, self._set_aside(inputs), num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, self._set_aside(inputs), prediction_loss_only, ignore_keys)

    def _set_aside(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._rows = rows
        own = ("prompt_ids", *IMAGE_COLUMNS)
        return [{name: value for name, value in row.items() if name not in own} for row in rows]

    # Rollouts

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """What trl calls a `rollout_func`. What it returns besides tokens, rewards get."""
        is_training = self._mode == "train"
        self._rollouts[self._mode] = rollouts = Rollouts(self.state.global_step if is_training else 0)
        checkpointing = self.args.activation_checkpointing_kwargs
        assert not isinstance(checkpointing, str)  # parsed by the configuration
        whole = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=checkpointing,
        )
        gather = self._dist.summon_full_params(self.model_wrapped, recurse=False)
        with self._seeded(), whole as model, torch.no_grad(), gather:
            if self.makes_images:
                prompt_ids, completion_ids = self._roll_out_images(model, prompts, rollouts)
            else:
                prompt_ids, completion_ids = self._roll_out_texts(model, rollouts)
        for_rewards = {name: [row[name] for row in self._rows] for name in IMAGE_COLUMNS if name in self._rows[0]}
        if self.makes_images:
            for_rewards |= self._images_of(completion_ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, **for_rewards}

    @contextmanager
    def _seeded(self):
        """`generate` draws from torch's own state, set from the run's seed and step, and leaves it as it was."""
        seed = step_generator(self).initial_seed()
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _padded(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts with padding in front, and where they are more than that."""
        padded = pad(ids, self._tokenizer.pad_token_id, padding_side="left")
        mask = pad([torch.ones_like(row) for row in ids], 0, padding_side="left")
        return padded.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _roll_out_texts(self, model: Any, rollouts: Rollouts) -> tuple[list[list[int]], list[list[int]]]:
        prompt_ids = [list(row["prompt_ids"]) for row in self._rows]
        input_ids, attention_mask = self._padded([torch.tensor(ids) for ids in prompt_ids])
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=self.generation_config
        )
        completion_ids = []
        end_ids = set(self.eos_token_ids)
        for row in output.sequences[:, input_ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in end_ids), len(row))
            completion_ids.append(row[: end + 1])
        whole_rows = [prompt + new for prompt, new in zip(prompt_ids, completion_ids, strict=True)]
        rollouts.record(whole_rows, output.trajectory)
        return prompt_ids, completion_ids

    def _roll_out_images(
        self, model: Any, captions: list[str], rollouts: Rollouts
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The codes of all rows as tokens; rows of one grid are generated together."""
        unit = self._processor.image_processor.pixels_per_code
        inputs_of_rows = [
            self._processor(text=caption, task="text_to_image", height=height * unit, width=width * unit)
            for caption, (height, width) in zip(captions, self._grids, strict=True)
        ]
        prompt_ids = [inputs["input_ids"][0].tolist() for inputs in inputs_of_rows]
        completion_ids: list[list[int]] = [[] for _ in prompt_ids]
        is_guided = self.args.guidance_scale != 1.0
        names = ["block_length", "threshold", "temperature", "top_k", "top_p", "mask_token_id", "do_sample"]
        names += ["return_dict_in_generate", "output_trajectory"]
        settings = {name: getattr(self.generation_config, name) for name in names}
        if is_guided:
            settings["guidance_scale"] = self.args.guidance_scale
        for grid in sorted(set(self._grids)):
            rows = [row for row, own in enumerate(self._grids) if own == grid]
            inputs: dict[str, torch.Tensor] = {}
            for name in ("input_ids", "negative_input_ids") if is_guided else ("input_ids",):
                ids = [inputs_of_rows[row][name][0] for row in rows]
                inputs[name], inputs[name.replace("input_ids", "attention_mask")] = self._padded(ids)
            output = model.generate_image_codes(
                **inputs,
                **settings,
                grid=grid,
                num_steps_per_block=self.args.num_steps_per_block,
            )
            for row, own in zip(rows, output.sequences, strict=True):
                completion_ids[row] = (own + self.image_token_offset).tolist()
            rollouts.record([prompt_ids[row] + completion_ids[row] for row in rows], output.trajectory)
        return prompt_ids, completion_ids

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return [tuple(row["grid"]) for row in self._rows]

    def _images_of(self, completion_ids: list[list[int]]) -> dict[str, list[Any]]:
        codes = [
            torch.tensor(ids).view(grid) - self.image_token_offset
            for ids, grid in zip(completion_ids, self._grids, strict=True)
        ]
        if self.decode_images is None:
            return {"image_codes": codes}
        with self._seeded():
            images = list(self.decode_images(codes))
        if len(images) != len(codes):
            raise ValueError(f"`decode_images` returned {len(images)} images for {len(codes)} grids.")
        return {"image_codes": codes, "generated_images": images}

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.log_probability_estimate == "trace":
            # TraceRL's mean over steps, as weights of the advantages: the clipping does not see them.
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, : inputs["prompt_ids"].shape[1]] = -100
            weights = self._likelihood.step_weights(ids, mask, labels)[:, inputs["prompt_ids"].shape[1] :]
            inputs = {**inputs, "advantages": inputs["advantages"][:, None] * weights}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def checked_reward(reward: Any, name: str) -> Any:
    """The reward, whose answers are seen before trl takes them for a list; one that is a model stays as it is."""
    if isinstance(reward, nn.Module):
        return reward
    if is_async_callable(reward):

        async def checked_later(**columns: Any) -> list[float | None]:
            return check_rewards(name, await reward(**columns), len(columns["completions"]))

        return checked_later

    def checked(**columns: Any) -> list[float | None]:
        return check_rewards(name, reward(**columns), len(columns["completions"]))

    return checked


def check_rewards(name: str, given: Any, count: int) -> list[float | None]:
    """Raises ValueError, naming the function, for what are not `count` finite numbers, or `None` among them."""
    rewards = numbers_of(given)
    if rewards is None or len(rewards) != count:
        raise ValueError(
            f"The reward function `{name}` must give a list of {count}, for each completion a finite number, or None "
            f"where it has none to give; it gave {given!r:.200}."
        )
    return rewards
