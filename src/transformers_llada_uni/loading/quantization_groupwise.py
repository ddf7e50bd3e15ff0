"""
The backbone in four or eight bits with a scale for each group of weights, as a quantisation method of transformers.

Transformers knows it once this module is imported, which the modeling files do: a model that was saved quantised is
loaded like any other.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.expert_weights import MIN_GROUP, Kind
from ..kernels.groupwise_modules import GroupwiseExperts, GroupwiseLinear, GroupwiseWeights


METHOD = "llada_uni_groupwise"
DECODER_LAYER = "LLaDA2MoeDecoderLayer"  # by its name, as in `_no_split_modules`: the modeling files import this one
KINDS: dict[int, Kind] = {4: "int4", 8: "int8"}
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "triton")  # the latter two are defaults


@register_quantization_config(METHOD)
class GroupwiseQuantizationConfig(QuantizationConfigMixin):
    r"""
    For `from_pretrained(..., quantization_config=...)`: attention, routed and shared experts and dense MLPs, which
    hold nineteen twentieths of the weights, in four or eight bits. Routers, embeddings, head, norms and the image
    tokenizer stay as they are, as small changes there change which expert, token or code is chosen.

        config = GroupwiseQuantizationConfig(bits=4)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="bfloat16", quantization_config=config)
        model.save_pretrained(folder)  # from there it is loaded without a `quantization_config`

    Weights are quantised as they are read, so that a whole model in full precision is never in memory. Each group
    has a scale of the model's dtype; with four bits it is the one, of six, with the least squared error. Works on any
    device; on GPUs from Ampere on Triton's kernels read the weights as they are stored.

    Args:
        bits (`int`, defaults to 4): 4 or 8.
        group_size (`int`, defaults to 64): Neighbouring weights of a row that share a scale: a power of two, at least
            16, that divides the columns of all weights, for 4 bits half of them. A smaller one is more accurate, and
            costs `16 / group_size` bits a weight.

    Raises:
        ValueError: for other `bits` or a `group_size` that is none of these.
    """

    def __init__(self, bits: int = 4, group_size: int = 64):
        if bits not in KINDS:
            raise ValueError(f"`bits` must be 4 or 8, got {bits!r}.")
        is_power = type(group_size) is int and group_size >= MIN_GROUP and group_size & (group_size - 1) == 0
        if not is_power:
            raise ValueError(f"`group_size` must be a power of two of at least {MIN_GROUP}, got {group_size!r}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # registered names are no QuantizationMethod
        self.bits = bits
        self.group_size = group_size

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "GroupwiseQuantizationConfig":
        own = {name: value for name, value in config_dict.items() if name != "quant_method"}
        return super().from_dict(own, return_unused_kwargs=return_unused_kwargs, **kwargs)


def replace_with_groupwise_modules(model: nn.Module, config: PreTrainedConfig, kind: Kind, group_size: int) -> None:
    """
    Puts modules without values in the place of all linear layers and routed experts in the backbone's layers: those of
    attention, dense MLPs and shared experts. Routers, norms, embeddings and the head stay.

    Args:
        model: With a backbone in it, or one.
        config: Of the backbone.

    Raises:
        ValueError: if there is no backbone, or the groups do not divide the columns of a weight, which is named.
    """
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == DECODER_LAYER}
    if not layers:
        raise ValueError(
            f"`quantization_config` is for LLaDA2 backbones; {type(model).__name__} has no layer of them."
        )
    for layer_name, layer in layers.items():
        for name, module in list(layer.named_modules()):
            try:
                if isinstance(module, Glm4MoeExperts):
                    layer.set_submodule(name, GroupwiseExperts(config, kind, group_size))
                elif type(module) is nn.Linear and module.bias is None:
                    made = GroupwiseLinear(module.in_features, module.out_features, kind, group_size)
                    layer.set_submodule(name, made)
            except ValueError as error:
                raise ValueError(f"{layer_name}.{name} cannot be quantised: {error}") from error


class QuantizeGroupwise(ConversionOps):
    """A weight, as it was read, to what the module that it belongs to stores."""

    def convert(  # type: ignore[override]  # tensors, as transformers' own quantisers return, not lists of them
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        stored: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, own_name = get_module_from_name(model, name)
            prefix = name.removesuffix(own_name)
            stored |= {prefix + part: tensor for part, tensor in module.quantize(own_name, weight).items()}
        return stored


@register_quantizer(METHOD)
class GroupwiseHfQuantizer(HfQuantizer):
    """Makes room for the quantised weights before a model is loaded, and says which weights are to be quantised."""

    quantization_config: GroupwiseQuantizationConfig

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "`device_map` leaves weights on the disk, where they are not quantised: quantise and save the model "
                "first, then load it from there."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        text_config = model.config.get_text_config()
        implementation = text_config._experts_implementation
        if implementation not in EXPERTS_IMPLEMENTATIONS:
            raise ValueError(
                f"`experts_implementation` {implementation!r} cannot compute with the experts that "
                "`quantization_config` quantises; leave it out."
            )
        kind, group_size = KINDS[self.quantization_config.bits], self.quantization_config.group_size
        replace_with_groupwise_modules(model, text_config, kind, group_size)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, own_name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, GroupwiseWeights) and own_name in module.weight_names

    def get_quantize_ops(self) -> QuantizeGroupwise:
        return QuantizeGroupwise()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, GroupwiseWeights):
                nn.Module.requires_grad_(module, False)  # what transformers loads takes gradients if it can
        # Saving would turn round what was done to the experts in loading; but quantised they stay together.
        conversions: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            kept = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
            model._weight_conversions = kept  # type: ignore[assignment]  # torch declares attributes of modules only

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Through adapters; the quantised weights themselves take no gradient."""
        return True
