"""The frozen model that a policy is compared with."""

import copy

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..loading.model_loading import load_model


def make_reference(model: PreTrainedModel) -> PreTrainedModel:
    """
    A frozen copy of `model`. torch cannot copy one that is sharded over processes: it is loaded once more, from where
    it came.

    Raises:
        ValueError: if a sharded model is no longer what its checkpoint holds.
    """
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return copy.deepcopy(model).eval().requires_grad_(False)
    name = str(model.config.name_or_path)
    reference = load_model(
        name,
        dtype=model.dtype,
        attn_implementation=model.config.get_text_config()._attn_implementation,
        distributed_config=model.config.distributed_config,
    )
    tensors = reference.state_dict()
    differing = [key for key, tensor in model.state_dict().items() if not _equal(tensor, tensors.get(key))]
    if differing:
        raise ValueError(
            f"`model` is sharded over processes, and its reference was loaded again from {name!r}, but it differs "
            f"there in {len(differing)} tensors ({differing[0]!r}, ...). Save the model first and load it from there."
        )
    for setting in ("block_length", "mask_token_id"):  # settled by the trainer
        setattr(reference.config.get_text_config(), setting, getattr(model.config.get_text_config(), setting))
    return reference.eval().requires_grad_(False)


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Each process compares its own shards."""
    if other is None:
        return False
    shards = [part.to_local() if isinstance(part, DTensor) else part for part in (tensor, other)]
    return torch.equal(*shards)
