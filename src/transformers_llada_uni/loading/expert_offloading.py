"""A device map that keeps the routed experts, nine tenths of the weights, elsewhere than the rest of the model."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from .model_loading import AUTO_CLASSES


def expert_offload_device_map(
    config: PreTrainedConfig, device: int | str, experts_device: str
) -> dict[str, int | str]:
    r"""
    For `from_pretrained(..., device_map=...)` of the models with a head: accelerate then brings the experts of a layer
    to the device when the layer is computed. All of them, in every forward: this is for memory, not for speed. A model
    whose weights travel cannot be compiled.

        config = AutoConfig.from_pretrained(path)
        device_map = expert_offload_device_map(config, device=0, experts_device="cpu")  # experts in main memory
        device_map = expert_offload_device_map(config, device="cpu", experts_device="disk")

    Args:
        config ([`LLaDAUniConfig`] or [`LLaDA2MoeConfig`]): Of the model.
        device: Where all else is, and where everything is computed.
        experts_device: Where the routed experts are kept: `"cpu"`, or `"disk"` (in the `offload_folder` of
            `from_pretrained`).

    Raises:
        TypeError: if `config` is another model's.
        ValueError: if `experts_device` is neither, or is `device`: then there is nothing to bring.
    """
    if not isinstance(config, PreTrainedConfig) or config.model_type not in AUTO_CLASSES:
        raise TypeError(
            f"`config` should be a LLaDAUniConfig or a LLaDA2MoeConfig (AutoConfig.from_pretrained gives it), "
            f"got {type(config).__name__}."
        )
    if experts_device not in ("cpu", "disk"):
        raise ValueError(f"`experts_device` should be 'cpu' or 'disk', got {experts_device!r}.")
    if experts_device == str(device):
        raise ValueError(f"`experts_device` is {experts_device!r}, as is `device`: no `device_map` is needed.")
    with torch.device("meta"):
        model = AUTO_CLASSES[config.model_type].from_config(config)
    return _place(model, "", device, experts_device)


def _place(module: nn.Module, name: str, device: int | str, experts_device: int | str) -> dict[str, int | str]:
    if isinstance(module, Glm4MoeExperts):
        return {name: experts_device}
    if not any(isinstance(part, Glm4MoeExperts) for part in module.modules()):
        return {name: device}
    prefix = f"{name}." if name else ""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    places = {f"{prefix}{child}": device for child, _ in own}
    for child, part in module.named_children():
        places |= _place(part, f"{prefix}{child}", device, experts_device)
    return places
