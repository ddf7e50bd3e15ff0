"""The released shape with random weights, made on the device in seconds; experts it uses, and bytes a step reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.initialization import no_init_weights
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.kernels.expert_weights import quantize_experts
from transformers_llada_uni.kernels.groupwise_modules import GroupwiseWeights
from transformers_llada_uni.loading.quantization_groupwise import KINDS, replace_with_groupwise_modules
from transformers_llada_uni.modeling_llada2_moe import LLaDA2MoeTopkRouter


RELEASED = {"image_token_offset": 157_184}
TINY = {
    "vocab_size": 1024,
    "image_token_offset": 768,
    "mask_token_id": 767,
    "eos_token_id": 766,
    "pad_token_id": 766,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
}
# Masks are alike but for their positions. With weights as a model is initialised they all see the mean of the prefix,
# and choose the same experts. Queries this long look at a few keys each, so masks part, as they do in a trained model.
QUERY_NORM = 3.0
# Standard deviations times the square root of the width that a matrix reads; the first that matches. Routed experts
# speak softly: what bfloat16 rounds would otherwise choose other experts and so grow from layer to layer. The head is
# loud enough that some tokens are sure.
GAINS = {"mlp.experts.down_proj": 0.1, "lm_head": 10.0, "": 1.0}
EMBEDDING_STD = 0.3
FLOAT8_BLOCK = (128, 128)


@torch.no_grad()
def make_model(shape: dict[str, Any], device: str, dtype: torch.dtype, **overrides: Any) -> LLaDA2MoeForBlockDiffusion:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            model = LLaDA2MoeForBlockDiffusion(LLaDA2MoeConfig(**shape | overrides))
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(QUERY_NORM if "query_layernorm" in name else 1.0)
        elif "word_embeddings" in name:
            parameter.normal_(std=EMBEDDING_STD)
        else:
            gain = next(gain for words, gain in GAINS.items() if words in name)
            parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
    return model.eval()


def size_of(model: torch.nn.Module) -> int:
    """Bytes of weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


@dataclass
class UsedExperts:
    """Means over layers and forwards: experts used, what uniform choice would use, and tokens that chose."""

    used: float
    uniform: float
    tokens: float


@torch.no_grad()
def count_used_experts(model: LLaDA2MoeForBlockDiffusion, call: Callable[[], Any], most_tokens: int) -> UsedExperts:
    """
    Looks at the routers during an eager call.

    Args:
        most_tokens: Forwards of more tokens take in a prompt, and do not count.
    """
    num_experts, num_chosen = model.config.num_experts, model.config.num_experts_per_tok
    counts: list[tuple[int, torch.Tensor]] = []

    def look(router, arguments, outputs) -> None:
        index = outputs[2]
        is_used = torch.zeros(num_experts, device=index.device).index_fill_(0, index.flatten(), 1.0)
        counts.append((len(index), is_used.sum()))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, LLaDA2MoeTopkRouter)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    steps = [(tokens, float(used)) for tokens, used in counts if tokens <= most_tokens]
    unused = 1 - num_chosen / num_experts
    return UsedExperts(
        used=sum(used for _, used in steps) / len(steps),
        uniform=sum(num_experts * (1 - unused**tokens) for tokens, _ in steps) / len(steps),
        tokens=sum(tokens for tokens, _ in steps) / len(steps),
    )


def bytes_of_step(
    model: LLaDA2MoeForBlockDiffusion, used_experts: float, num_rows: int, num_columns: float, num_predictable: int
) -> float:
    """
    What a denoising step cannot but read.

    Args:
        used_experts: Experts used in a layer, on average. They are read in the format they have.
        num_rows: Rows of all branches.
        num_columns: Keys and values a row attends to, on average.
        num_predictable: Rows of the head that are needed.
    """
    config = model.config
    experts = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    experts_size = sum(size_of(module) for module in experts)
    embeddings_size = size_of(model.model.word_embeddings)  # of which a step takes a few rows
    head_size = size_of(model.lm_head)
    others = size_of(model) - experts_size - embeddings_size - head_size
    head = head_size * num_predictable / config.vocab_size
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return others + head + experts_size * used_experts / config.num_experts + num_rows * num_columns * column


@torch.no_grad()
def use_float8_experts(model: LLaDA2MoeForBlockDiffusion) -> None:
    """Puts the routed experts, in place, into float8 with a scale for each block of weights, as in the FP8 release."""
    experts_class = use_experts_implementation(
        experts_class=FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=True
    )
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        with torch.device("meta"):
            experts = experts_class(config=model.config, block_size=FLOAT8_BLOCK)
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            plain = getattr(layer.mlp.experts, name)
            weights = quantize_experts(plain, "float8", block_size=FLOAT8_BLOCK, parts=parts)
            for suffix, tensor in (("", weights.data), ("_scale_inv", weights.scales)):
                setattr(experts, name + suffix, torch.nn.Parameter(tensor, requires_grad=False))
        layer.mlp.experts = experts.eval()


@torch.no_grad()
def use_few_bits(model: LLaDA2MoeForBlockDiffusion, bits: int, group_size: int) -> None:
    """In place what `GroupwiseQuantizationConfig(bits, group_size)` does to a model that is loaded."""
    plain = dict(model.named_parameters())
    with torch.device("meta"):
        replace_with_groupwise_modules(model, model.config, KINDS[bits], group_size)
    for name, module in model.named_modules():
        if isinstance(module, GroupwiseWeights):
            for own_name in module.weight_names:
                for part, tensor in module.quantize(own_name, plain.pop(f"{name}.{own_name}")).items():
                    setattr(module, part, torch.nn.Parameter(tensor, requires_grad=False))
