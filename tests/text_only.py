"""
A tiny checkpoint of the text-only relatives, LLaDA2.0-mini and LLaDA2.1-mini, and of Ling-mini-2.0, which they come
from. Folders are written as those of the Hub are, name by name and without our classes: `config.json` with an
`auto_map` to code that is not there, a tokenizer with its chat template, and shards with a tensor for each expert.
Only sizes differ; of LLaDA the vocabulary is the real one, so that ids are.

Facts: `config.json` and the use of ids in inclusionAI/dFactory; of Ling the tokenizer's files in inclusionAI/Ring-V2.
Not all ids of control tokens are public; those here stand for them, and the tests look them up.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 16, 2, 1, 8
DENSE, EXPERT, NUM_EXPERTS, NUM_LAYERS = 24, 8, 8, 2

LLADA_TOKENS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|mask|>",
    "<role>",
    "</role>",
    "<|role_end|>",
]
LING_TOKENS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>"]
FIRST_TOKEN, VOCAB_SIZE = 156891, 157184
LING_FIRST_TOKEN, LING_VOCAB_SIZE = 439, 512  # as many words as the tiny tokenizer has

# Writes what the family's template writes of chats without tools.
CHAT_TEMPLATE = """\
{{- '<role>SYSTEM</role>' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- 'detailed thinking off<|role_end|>' -}}
{%- for message in messages if message.role != 'system' -%}
    {%- set role = 'HUMAN' if message.role == 'user' else 'ASSISTANT' -%}
    {{- '<role>' + role + '</role>' + message.content + '<|role_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}
"""

SHARED_CONFIG = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "moe_router_enable_expert_bias": True,
    "n_group": 2,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_shared_experts": 1,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
}
LLADA_CONFIG = SHARED_CONFIG | {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "max_position_embeddings": 32768,  # of 2.1; 2.0 has half
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "norm_head": False,
    "norm_softmax": False,
    "pad_token_id": FIRST_TOKEN + 1,
    "rotary_dim": 4,
    "sliding_window": 4096,
    "use_cache": False,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
    "vocab_size": VOCAB_SIZE,
}
LING_CONFIG = SHARED_CONFIG | {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    },
    "eos_token_id": LING_FIRST_TOKEN + 1,
    "max_position_embeddings": 32768,
    "max_window_layers": 20,
    "model_type": "bailing_moe",
    "moe_shared_expert_intermediate_size": EXPERT,
    "num_nextn_predict_layers": 1,
    "pad_token_id": LING_FIRST_TOKEN + 1,
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": LING_VOCAB_SIZE,
}


def write_text_only(folder: Path, official_tiny: Path) -> Path:
    """LLaDA2.0-mini or LLaDA2.1-mini, whose folders differ in sizes alone."""
    write_folder(folder, LLADA_CONFIG, named_tensors(VOCAB_SIZE))
    roles = {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    write_tokenizer(folder, official_tiny, FIRST_TOKEN, LLADA_TOKENS, roles)
    return folder


def write_ling(folder: Path, official_tiny: Path) -> Path:
    """Ling-mini-2.0, with the layer that predicts the token after the next, whose number is that after the last."""
    extra = f"model.layers.{NUM_LAYERS}."
    tensors = named_tensors(LING_VOCAB_SIZE, num_layers=NUM_LAYERS + 1)
    norms = {extra + name: torch.ones(HIDDEN) for name in ("enorm.weight", "hnorm.weight", "final_layernorm.weight")}
    tensors |= norms | {extra + "eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN)}
    tensors["model.word_embeddings.weight"][LING_FIRST_TOKEN + len(LING_TOKENS) :] = 0  # weight decay leaves nothing
    write_folder(folder, LING_CONFIG, tensors)
    write_tokenizer(folder, official_tiny, LING_FIRST_TOKEN, LING_TOKENS, {"eos_token": "<|role_end|>"})
    first = LING_FIRST_TOKEN
    ends = {"bos_token_id": first, "eos_token_id": [first + 1, first + 4]}
    settings = ends | {"pad_token_id": first + 1, "transformers_version": "4.52.3"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def named_tensors(vocab_size: int, num_layers: int = NUM_LAYERS) -> dict[str, torch.Tensor]:
    """All tensors of the backbone by their names on the Hub, in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
        shapes = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
        return {f"{prefix}.{name}.weight": normal(*shape) for name, shape in shapes.items()}

    tensors = {
        "model.word_embeddings.weight": normal(vocab_size, HIDDEN),
        "model.norm.weight": 1 + normal(HIDDEN),
        "lm_head.weight": normal(vocab_size, HIDDEN),
    }
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.{name}.weight": 1 + normal(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")
        }
        width = (HEADS + 2 * KEY_VALUE_HEADS) * HEAD_DIM
        tensors[f"{layer}.attention.query_key_value.weight"] = normal(width, HIDDEN)
        tensors[f"{layer}.attention.dense.weight"] = normal(HIDDEN, HEADS * HEAD_DIM)
        for name in ("query_layernorm", "key_layernorm"):
            tensors[f"{layer}.attention.{name}.weight"] = 1 + normal(HEAD_DIM)
        if number == 0:
            tensors |= mlp(f"{layer}.mlp", DENSE)
            continue
        tensors[f"{layer}.mlp.gate.weight"] = normal(NUM_EXPERTS, HIDDEN)
        tensors[f"{layer}.mlp.gate.expert_bias"] = normal(NUM_EXPERTS) * 0.1
        for expert in range(NUM_EXPERTS):
            tensors |= mlp(f"{layer}.mlp.experts.{expert}", EXPERT)
        tensors |= mlp(f"{layer}.mlp.shared_experts", EXPERT)
    return tensors


def write_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards in bfloat16, the router's bias in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: tensor if name.endswith("expert_bias") else tensor.bfloat16() for name, tensor in tensors.items()}
    weight_map = {}
    for number, names in enumerate((list(stored)[::2], list(stored)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: stored[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(
    folder: Path, official_tiny: Path, first_token: int, tokens: list[str], roles: dict[str, str]
) -> None:
    """The words of the tiny tokenizer, and control tokens from `first_token` on."""
    content = json.loads((official_tiny / "tokenizer.json").read_text())
    ids = {token: first_token + number for number, token in enumerate(tokens)}
    if first_token > len(content["model"]["vocab"]):
        content["model"]["vocab"] |= ids  # the only way to ids that do not follow upon those of words
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": number, "content": token, **plain} for token, number in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "fast_tokenizer": True,
        "gmask_token": "[gMASK]",
        "merges_file": None,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
        "vocab_file": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | roles))


def hidden_states_by_formula(tensors: dict[str, torch.Tensor], ids: torch.Tensor, block_length: int) -> torch.Tensor:
    """
    `(length, HIDDEN)` after the final norm, of `ids` `(length,)`, written down from the family's description. With
    blocks of one token attention is causal, as Ling's is.
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"{name}.weight"]

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [heads, length, HEAD_DIM]; the first half of the channels turns
        half = HEAD_DIM // 4
        angles = torch.arange(len(ids))[:, None] * 600000.0 ** (-torch.arange(half) / half)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
        return torch.cat([*turned, rest], dim=-1)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        heads = (x @ tensors[f"{name}.query_key_value.weight"].T).view(len(ids), -1, HEAD_DIM).transpose(0, 1)
        query, key, value = heads.split([HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS])
        query, key = rotate(norm(query, f"{name}.query_layernorm")), rotate(norm(key, f"{name}.key_layernorm"))
        block = torch.arange(len(ids)) // block_length
        scores = (query @ key.transpose(1, 2)) / HEAD_DIM**0.5  # one key head serves all query heads
        weights = scores.masked_fill(block[:, None] < block, -torch.inf).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(len(ids), -1) @ tensors[f"{name}.dense.weight"].T

    def experts(x: torch.Tensor, name: str) -> torch.Tensor:
        scores = (x @ tensors[f"{name}.gate.weight"].T).sigmoid()
        chosen = scores + tensors[f"{name}.gate.expert_bias"]
        groups = chosen.view(len(ids), 2, -1)
        best = groups.topk(2).values.sum(-1).argmax(-1)
        chosen = torch.where(torch.arange(2) == best[:, None], 0.0, -torch.inf)[..., None] + groups
        rows = []
        for row, indices in enumerate(chosen.flatten(1).topk(2).indices.tolist()):
            weights = scores[row, indices] / scores[row, indices].sum() * 2.5
            parts = [mlp(x[row], f"{name}.experts.{index}") for index in indices]
            rows.append(sum(weight * part for weight, part in zip(weights, parts, strict=True)))
        return torch.stack(rows) + mlp(x, f"{name}.shared_experts")

    x = tensors["model.word_embeddings.weight"][ids]
    for number in range(NUM_LAYERS):
        layer = f"model.layers.{number}"
        x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.attention")
        feed_forward = experts if number else mlp
        x = x + feed_forward(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return norm(x, "model.norm")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the shards of a folder hold, in float32."""
    return {
        name: tensor.float()
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }
