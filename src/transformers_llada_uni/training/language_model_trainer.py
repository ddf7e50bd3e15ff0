"""What the trainers of the language model have in common: the model they begin with, and its checkpoints."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    is_sharded_checkpoint,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from ..loading.model_loading import load_model, load_processor
from ..modeling_llada2_moe import LLaDA2MoePreTrainedModel
from ..unwrapping import unwrap
from .base_trainer import BaseTrainer
from .dpo_config import LLaDAUniDPOConfig
from .grpo_config import LLaDAUniGRPOConfig
from .lora import check_adapter
from .sft_config import LLaDAUniSFTConfig


LanguageModelConfig = LLaDAUniSFTConfig | LLaDAUniDPOConfig | LLaDAUniGRPOConfig
Processing = ProcessorMixin | PreTrainedTokenizerBase
SHARDED_OPTIMIZER_DIR = "optimizer_shards"
ADAPTER_SETTINGS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "target_parameters",
    "modules_to_save",
)


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Fills `model` with the weights that `save_pretrained` wrote to `folder`; raises where one is missing."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype, device_map="cpu")
    model.load_state_dict(loaded.state_dict())


def _comparable(value: Any) -> Any:
    """peft keeps some lists as sets, and `None` for those without an entry."""
    return sorted(value) if isinstance(value, list | set | tuple) and value else value or None


class LanguageModelTrainer(BaseTrainer):
    """
    First in the bases of a trainer of the language model, before trl's. transformers' Trainer does not know two things
    that its `from_pretrained` does:

    - that each expert is a tensor of its own on the disk: it would warn of missing keys, and go on with the experts
      the run began with;
    - a model that `from_pretrained(distributed_config=...)` sharded: it refuses to checkpoint the optimiser. Here each
      process writes its shards (weights as safetensors, the optimiser's state with torch's distributed checkpoints),
      and the run can be resumed on the same or on another number of processes.
    """

    model: PreTrainedModel
    block_length: int

    def __init__(self, *args: Any, **kwargs: Any):
        settings = kwargs["args"]
        # Trainer.__init__ stops at a sharded model unless only weights are to be saved; see the methods below.
        save_only_model, settings.save_only_model = settings.save_only_model, True
        try:
            super().__init__(*args, **kwargs)
        finally:
            settings.save_only_model = save_only_model
        if is_peft_model(self.model):
            check_adapter(self.model)

    def _take_model(
        self,
        model: str | PreTrainedModel,
        processing_class: Processing | None,
        args: LanguageModelConfig,
        further: dict[str, Any],
    ) -> tuple[PreTrainedModel, Processing]:
        """
        The model and its processor, loaded if need be, with the `quantization_config` among the `further` arguments of
        trl's trainer; sets the block length, which the model is given as well, since what it is trained with is what
        it generates with, and the noise.

        Raises:
            ValueError: if nobody knows the mask token.
        """
        if processing_class is None:
            processing_class = load_processor(model if isinstance(model, str) else str(model.config.name_or_path))
        if isinstance(model, str):
            assert not isinstance(args.model_init_kwargs, str)  # parsed by the configuration
            quantization = {name: further.pop(name) for name in ("quantization_config",) if name in further}
            model = load_model(model, **(args.model_init_kwargs or {}), **quantization)
            args.model_init_kwargs = None  # used up
        config = model.config.get_text_config()
        if config.mask_token_id is None:
            tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
            config.mask_token_id = tokenizer.mask_token_id
        if config.mask_token_id is None:
            raise ValueError("`mask_token_id` is known neither to the model's configuration nor to the tokenizer.")
        self.block_length = config.block_length if args.block_length is None else args.block_length
        config.block_length = self.block_length
        base = unwrap(model)
        base.generation_config.block_length = self.block_length  # type: ignore[union-attr, attr-defined]  # a field of ours
        name = Path(str(base.name_or_path))
        if base.name_or_path and name.is_dir():
            # An adapter says by this name what it belongs to, wherever it is used.
            part = name / "model" if (name / "model_index.json").is_file() else name
            base.name_or_path = base.config.name_or_path = str(part.absolute())
        self.noise = dataclasses.replace(args.make_noise(), image_token_offset=config.image_token_offset)
        if self.noise.image_noise != "linear" and config.image_token_offset is None:
            raise ValueError(f"`image_noise` is {self.noise.image_noise!r}, but the model has no image codes.")
        self._data_model = base
        return model, processing_class

    # Checkpoints

    def check_checkpoint(self, folder: str) -> None:
        if Path(folder, "adapter_config.json").is_file():
            self._check_adapter(folder)
        super().check_checkpoint(folder)

    def _check_adapter(self, folder: str) -> None:
        if not is_peft_model(self.model):
            raise ValueError(
                f"`resume_from_checkpoint`: {folder!r} holds an adapter, and this run trains the model itself."
            )
        from peft import PeftConfig

        configs: Any = self.model.peft_config
        saved, own = PeftConfig.from_pretrained(folder), configs["default"]
        for name in ADAPTER_SETTINGS:
            before, now = (_comparable(getattr(config, name, None)) for config in (saved, own))
            if before != now:
                raise ValueError(
                    f"`resume_from_checkpoint`: the adapter in {folder!r} has `{name}` {before}, this run {now}. "
                    "A run keeps its settings."
                )

    def _reads_by_itself(self, folder: str) -> bool:
        is_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded_checkpoint(folder)
        return not is_engine and not is_peft_model(self.model) and isinstance(self.model, LLaDA2MoePreTrainedModel)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._reads_by_itself(resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint)
        elif is_sharded_checkpoint(resume_from_checkpoint) and self.is_distributed_loading_by_transformers:
            _load_model_checkpoint_distributed(self.model, resume_from_checkpoint)
        else:
            with self._precision_kept():
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and self._reads_by_itself(best):
            load_weights(self.model, best)
        else:
            with self._precision_kept():
                super()._load_best_model()

    @contextmanager
    def _precision_kept(self) -> Iterator[None]:
        """peft loads an adapter in float32, whatever it was trained in: upon few bits trl takes bfloat16."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        yield
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if output_dir is None or not (self.is_distributed_loading_by_transformers and self._is_saving_checkpoint):
            super()._save(output_dir, state_dict)
            return
        # Every process writes its own shards; the rest is written once.
        self.model.save_pretrained(output_dir, distributed_checkpoint=True)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer_distributed(self.model, self.optimizer, os.path.join(output_dir, SHARDED_OPTIMIZER_DIR))
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_distributed(self.model, self.optimizer, os.path.join(checkpoint, SHARDED_OPTIMIZER_DIR))
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
