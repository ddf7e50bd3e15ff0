"""The base of the trainers whose result is a part of the pipeline: the autoencoder, the decoder, its distillation."""

import functools
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import TrainerCallback

from transformers_llada_uni.loading.folder_writing import folder_at_once
from transformers_llada_uni.training.base_trainer import BaseTrainer

from .component_config import ComponentTrainingArguments


AVERAGE_FILE = "moving_average.safetensors"


class ComponentModule(nn.Module):
    """Models of diffusers as a module whose forward is the pass that is trained, so that it works inside DDP."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """
        As transformers' Trainer calls it.

        Args:
            activation_checkpointing_kwargs: For `torch.utils.checkpoint.checkpoint`.
            every_n_layers, offload: Not for models of diffusers, which recompute all layers.

        Raises:
            ValueError: for these two.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs`: models of diffusers take neither `every_n_layers` nor `offload`."
            )
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for model in self.children():
            if isinstance(model, ModelMixin) and model._supports_gradient_checkpointing:
                model.enable_gradient_checkpointing(functools.partial(recomputed, **settings))


ModuleT = TypeVar("ModuleT", bound=ComponentModule)


class Savable(Protocol):
    def save_pretrained(self, save_directory: Path) -> Any: ...


class MovingAverage(TrainerCallback):
    """Averages the weights after every optimiser step."""

    def __init__(self, model: nn.Module, decay: float):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


class ComponentTrainer(BaseTrainer, Generic[ModuleT]):
    """
    transformers' [`~transformers.Trainer`] of a [`ComponentModule`]. Checkpoints hold the state of what is trained;
    `save_model` writes what [`components`] names, each to its folder: all of them are written before the first takes
    the place of an old one.

    Args:
        model: What is trained.
        args: Settings.
        **kwargs: Further arguments of [`~transformers.Trainer`].
    """

    model: ModuleT
    args: ComponentTrainingArguments

    def __init__(self, model: ModuleT, args: ComponentTrainingArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.moving_average = None if args.ema_decay is None else MovingAverage(self.model, args.ema_decay)
        if self.moving_average is not None:
            self.add_callback(self.moving_average)

    def loss(self, model: ModuleT, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss `()` of what the collator made; `model` may be wrapped for several processes."""
        raise NotImplementedError

    def components(self) -> Mapping[str, Savable]:
        """What is saved, by the name of its folder."""
        raise NotImplementedError

    def trained_model(self) -> ModuleT:
        """What is worth saving: the average, where there is one."""
        if self.moving_average is not None:
            return cast(ModuleT, self.moving_average.average.module)
        return self.accelerator.unwrap_model(self.model)

    # What transformers calls

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._is_saving_checkpoint:
            super()._save(output_dir, state_dict)
            if self.moving_average is not None and self.args.should_save:
                assert output_dir is not None
                save_file(self.moving_average.average.state_dict(), os.path.join(output_dir, AVERAGE_FILE))
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        with ExitStack() as complete:
            for name, component in self.components().items():
                component.save_pretrained(complete.enter_context(folder_at_once(folder / name, replace=True)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.moving_average is not None:
            self.moving_average.average.load_state_dict(load_file(os.path.join(checkpoint, AVERAGE_FILE)))
