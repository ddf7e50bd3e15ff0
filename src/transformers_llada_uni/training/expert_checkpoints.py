"""Reads a checkpoint's experts, one tensor each on the disk, back into the fused tensors of the model."""

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, Trainer
from transformers.distributed.checkpoint import is_sharded_checkpoint

from ..modeling_llada2_moe import LLaDA2MoePreTrainedModel


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Fills `model` with the weights that `save_pretrained` wrote to `folder`; raises where one is missing."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype, device_map="cpu")
    model.load_state_dict(loaded.state_dict())


class FusedExpertsMixin:
    """
    For trainers of the language model. transformers' Trainer fills the model from a checkpoint without the conversion
    that `from_pretrained` does: it would warn of missing keys, and go on with the experts the run began with.
    """

    def _reads_by_itself(self: Trainer, folder: str) -> bool:
        is_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded_checkpoint(folder)
        return not is_engine and not is_peft_model(self.model) and isinstance(self.model, LLaDA2MoePreTrainedModel)

    def _load_from_checkpoint(
        self: Trainer, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if self._reads_by_itself(resume_from_checkpoint):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self: Trainer) -> None:
        if self._reads_by_itself(self.state.best_model_checkpoint):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
