"""Which weights of the model torchao quantises: transformers' own rule knows linear layers, not stacked experts."""

from typing import TYPE_CHECKING

from transformers import TorchAoConfig


if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


QUANTIZED = (
    r"re:.*\.layers\.\d+\.attention\.(query_key_value|dense)",
    r"re:.*\.mlp\.experts\.(gate_up_proj|down_proj)",
    r"re:.*\.mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)",
)


def backbone_quantization_config(weights: "AOBaseConfig") -> TorchAoConfig:
    """
    For `from_pretrained(..., quantization_config=...)`: the backbone's attention and all its experts, which hold nine
    tenths of the weights. Routers, embeddings, head and the image tokenizer stay as they are, as small changes there
    change which expert, token or code is chosen.

    Experts are then computed one after the other (`experts_implementation="eager"`): no other implementation knows
    quantised weights.

    Args:
        weights: How, for example `torchao.quantization.Int8WeightOnlyConfig()`.

    Raises:
        ImportError: without torchao.
    """
    from torchao.quantization import FqnToConfig

    return TorchAoConfig(FqnToConfig(dict.fromkeys(QUANTIZED, weights)))


__all__ = ["backbone_quantization_config"]
