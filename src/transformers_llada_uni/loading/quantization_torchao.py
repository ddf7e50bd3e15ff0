"""Which weights of the model torchao quantises: transformers' own rule knows linear layers, not stacked experts."""

from typing import TYPE_CHECKING

from transformers import PreTrainedModel, TorchAoConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts


if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


QUANTIZED = (
    r"re:(.*\.)?layers\.\d+\.attention\.(query_key_value|dense)",
    r"re:.*\.mlp\.experts\.(gate_up_proj|down_proj)",
    r"re:.*\.mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)",
)


def backbone_quantization_config(weights: "AOBaseConfig") -> TorchAoConfig:
    """
    For `from_pretrained(..., quantization_config=...)`: the backbone's attention and all its experts, which hold nine
    tenths of the weights. Routers, embeddings, head and the image tokenizer stay as they are, as small changes there
    change which expert, token or code is chosen.

    Experts are then computed one after the other (`experts_implementation="eager"`, which `from_pretrained` sets
    in place of the default and raises a `ValueError` for others): no other implementation knows quantised weights.

    Args:
        weights: How, for example `torchao.quantization.Int8WeightOnlyConfig()`.

    Raises:
        ImportError: without torchao.
    """
    from torchao.quantization import FqnToConfig

    return TorchAoConfig(FqnToConfig(dict.fromkeys(QUANTIZED, weights)))


def compute_torchao_experts_eagerly(model: PreTrainedModel) -> None:
    """
    Sets the only implementation that experts which torchao quantises go through; other models stay as they are.

    Raises:
        ValueError: if another one than the default was asked for.
    """
    if getattr(model, "quantization_method", None) != "torchao":
        return
    from torchao.utils import TorchAOBaseTensor

    experts = (module for module in model.modules() if isinstance(module, Glm4MoeExperts))
    if not any(isinstance(weight.data, TorchAOBaseTensor) for module in experts for weight in module.parameters()):
        return
    experts_implementation = model.config.get_text_config()._experts_implementation
    if experts_implementation not in ("eager", "grouped_mm", "triton"):  # the latter two are defaults
        raise ValueError(
            f"`experts_implementation` {experts_implementation!r} cannot compute with the experts that "
            "`quantization_config` quantises; leave it out, or quantise attention only."
        )
    model.set_experts_implementation("eager")
