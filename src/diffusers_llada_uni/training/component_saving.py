"""How the decoder's trainers save: folders that the pipeline loads, of averaged weights if that was asked for."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback


AVERAGE_FILE = "moving_average.safetensors"


class MovingAverage(TrainerCallback):
    """Averages the weights after every optimiser step."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


class ComponentSavingMixin:
    """
    For trainers whose result is a part of the pipeline. Checkpoints hold the state of what is trained; `save_model`
    writes what [`components`] names, each to its folder.
    """

    moving_average: MovingAverage | None = None

    def average_weights(self: Trainer, decay: float | None) -> None:
        """Starts a moving average of the weights; nothing with `None`."""
        if decay is not None:
            self.moving_average = MovingAverage(self.model, decay)
            self.add_callback(self.moving_average)

    def trained_model(self: Trainer) -> torch.nn.Module:
        """What is worth saving: the average, where there is one."""
        if self.moving_average is not None:
            return self.moving_average.average.module
        return self.accelerator.unwrap_model(self.model)

    def components(self) -> dict[str, Any]:
        """What is saved, by the name of its folder; anything with `save_pretrained`."""
        raise NotImplementedError

    def _save(self: Trainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if getattr(self, "_is_saving_checkpoint", False):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        for name, component in self.components().items():
            target = Path(output_dir or self.args.output_dir, name)
            part = target.with_name(name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            component.save_pretrained(part)
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)

    def _save_optimizer_and_scheduler(self: Trainer, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.moving_average is not None and self.args.should_save:
            save_file(self.moving_average.average.state_dict(), os.path.join(output_dir, AVERAGE_FILE))

    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.moving_average is not None:
            self.moving_average.average.load_state_dict(load_file(os.path.join(checkpoint, AVERAGE_FILE)))
