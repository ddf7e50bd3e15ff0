"""Low-rank adapters for the language model (LoRA, arXiv 2106.09685), and how to leave them behind."""

from typing import TYPE_CHECKING, Any

from ..input_checks import check_integer, check_number
from ..kernels.groupwise_modules import NOT_ADAPTED, GroupwiseExperts
from ..optional_dependencies import require_extra


if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# Linear layers by the end of their name: attention, and the dense MLPs and shared experts.
ATTENTION = ("query_key_value", "dense")
MLPS = ("gate_proj", "up_proj", "down_proj")
# The routed experts of a layer are two tensors, no modules.
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def lora_config(
    r: int = 16,
    lora_alpha: float = 32,
    *,
    attention: bool = True,
    mlps: bool = True,
    experts: bool = True,
    **kwargs: Any,
) -> "LoraConfig":
    """
    The [`~peft.LoraConfig`] that reaches all of the language model's layers; peft's `"all-linear"` misses the routed
    experts and takes in the vision tower. Give it to a trainer as `peft_config`, then

        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(folder)                # one tensor per expert, as in the release

    and, with `folder` in the place of a pipeline's `model/`, `conversion/convert_llada_uni_checkpoint.py PIPELINE DST
    --to-released` writes the released layout.

    On a quantised base model (QLoRA, arXiv 2305.14314), with [`GroupwiseQuantizationConfig`]: `experts=False`, as
    routed experts in few bits cannot be adapted. Steps run also with bitsandbytes (8 bits, and 4 where widths are
    multiples of 64) and torchao (int8), which by themselves quantise linear layers only, and not the routed experts,
    most of the weights. All that was tried on a CPU with a tiny model. Merge such an adapter into the model as it was
    before quantisation: into ours nothing can be merged, and merging into 4 bits moves the outputs.

    Args:
        r (`int`, defaults to 16): Rank. Every expert has its own adapter of this rank.
        lora_alpha (`float`, defaults to 32): The update is scaled by `lora_alpha / r`.
        attention (`bool`, defaults to `True`): Adapt queries, keys, values and the projection after them.
        mlps (`bool`, defaults to `True`): Adapt dense MLPs and shared experts.
        experts (`bool`, defaults to `True`): Adapt the routed experts: most of the adapter's memory.
        **kwargs: Further settings of [`~peft.LoraConfig`]. `lora_dropout` has to stay 0 with `experts`: peft cannot
            drop out the input of a tensor.

    Raises:
        ValueError: if nothing is adapted, or for `lora_dropout` or `use_dora` with `experts`.
    """
    require_extra("train", "peft")
    from peft import LoraConfig

    check_integer("r", r, 1)
    check_number("lora_alpha", lora_alpha, 0.0, exclude_minimum=True)
    if not (attention or mlps or experts):
        raise ValueError("`attention`, `mlps` and `experts` are all False: there is nothing to adapt.")
    if experts and kwargs.get("lora_dropout"):
        raise ValueError(f"`lora_dropout` must be 0 with `experts=True`, got {kwargs['lora_dropout']!r}.")
    if experts and kwargs.get("use_dora"):
        raise ValueError("`use_dora` is not for routed experts: give `experts=False`, or name `target_modules`.")
    layers = "|".join((*ATTENTION * attention, *MLPS * mlps))
    settings: dict[str, Any] = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": 0.0}
    settings["target_modules"] = rf".*layers\.\d+\.(attention|mlp|mlp\.shared_experts)\.({layers})" if layers else []
    settings["target_parameters"] = list(FUSED_EXPERTS) if experts else None
    return LoraConfig(**settings | kwargs)


def check_adapter(model: "PreTrainedModel") -> None:
    """Raises ValueError if the adapter of a model reaches experts in few bits, or is of prompts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            kind = config.peft_type.value
            raise ValueError(f"`peft_config`: {kind} learns a prompt, which is not read here; use LoRA.")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), GroupwiseExperts):
            raise ValueError(NOT_ADAPTED)
