"""The model under what peft, parallelism and compilation put around it."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel


def unwrap(model: Any) -> PreTrainedModel:
    """The model itself, also of a `PeftModel`, a compiled module or `DistributedDataParallel`."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
