"""Checkpoints that survive a kill at any moment, also of models that are sharded over processes."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    is_sharded_checkpoint,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


SHARDED_OPTIMIZER_DIR = "optimizer_shards"


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest checkpoint of a run that was written to its end, or `None`.

    A kill while a checkpoint is being written leaves a folder without a readable `trainer_state.json`, which is
    written last; such folders are passed over.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            numbered.append((int(match.group(1)), folder))
    for _, folder in sorted(numbered, reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


class ResumableTrainerMixin:
    """
    For trainers of every stage, before [`~transformers.Trainer`] in the bases:

    - `train(resume_from_checkpoint=True)` goes on from the newest *complete* checkpoint, and begins anew where a run
      was stopped before its first one;
    - a model that `from_pretrained(distributed_config=...)` sharded is checkpointed in shards (weights as
      safetensors, the optimiser's state with torch's distributed checkpoints) and can be resumed, on the same or on
      another number of processes. transformers itself refuses to checkpoint the optimiser of such a model.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        if settings is None:
            super().__init__(*args, **kwargs)
            return
        # Trainer.__init__ stops at a sharded model unless only weights are to be saved; see the methods below.
        save_only_model, settings.save_only_model = settings.save_only_model, True
        try:
            super().__init__(*args, **kwargs)
        finally:
            settings.save_only_model = save_only_model
        self.args.save_only_model = save_only_model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self: Trainer, model: torch.nn.Module, trial: Any) -> None:
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving_checkpoint = False

    def _save(self: Trainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not (self.is_distributed_loading_by_transformers and getattr(self, "_is_saving_checkpoint", False)):
            super()._save(output_dir, state_dict)
            return
        # Every process writes its own shards; the rest is written once.
        self.model.save_pretrained(output_dir, distributed_checkpoint=True)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: torch.nn.Module | None = None):
        if is_sharded_checkpoint(resume_from_checkpoint) and self.is_distributed_loading_by_transformers:
            _load_model_checkpoint_distributed(self.model, resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self: Trainer, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer_distributed(self.model, self.optimizer, os.path.join(output_dir, SHARDED_OPTIMIZER_DIR))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_distributed(self.model, self.optimizer, os.path.join(checkpoint, SHARDED_OPTIMIZER_DIR))
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
