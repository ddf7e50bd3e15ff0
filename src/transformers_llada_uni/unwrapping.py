"""The model under what peft, parallelism, compilation and offloading put around it."""

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel


def unwrap(model: Any) -> PreTrainedModel:
    """The model itself, also of a `PeftModel`, a compiled module or `DistributedDataParallel`."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go. Of one whose weights travel the CPU: accelerate's hooks take inputs along."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
