"""A device map that keeps the routed experts, nine tenths of the weights, elsewhere than the rest of the model."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from .configuration_llada_uni import LLaDAUniConfig


def expert_offload_device_map(
    config: PreTrainedConfig, device: int | str = "cpu", experts_device: int | str = "cpu"
) -> dict[str, int | str]:
    r"""
    For `from_pretrained(..., device_map=...)`: accelerate then brings the experts of a layer to the device when the
    layer is computed. All of them, in every forward: this is for memory, not for speed.

        device_map = expert_offload_device_map(AutoConfig.from_pretrained(path), device=0)  # experts in main memory
        device_map = expert_offload_device_map(AutoConfig.from_pretrained(path), experts_device="disk")  # on a CPU

    Args:
        config ([`LLaDAUniConfig`] or [`LLaDA2MoeConfig`]): Of the model.
        device: Where all else is, and where everything is computed.
        experts_device: Where the routed experts are kept: `"cpu"`, or `"disk"` (in the `offload_folder` of
            `from_pretrained`).

    Raises:
        ValueError: if `experts_device` is `device`: then there is nothing to bring.
    """
    if experts_device == device:
        raise ValueError(f"`experts_device` is {experts_device!r}, as is `device`: no `device_map` is needed.")
    auto_class = AutoModelForImageTextToText if isinstance(config, LLaDAUniConfig) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
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


__all__ = ["expert_offload_device_map"]
