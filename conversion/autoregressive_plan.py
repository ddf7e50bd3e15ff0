"""
An autoregressive checkpoint of the family (BailingMoeV2: Ling-mini-2.0, Ling-flash-2.0, Ring) -> a model of block
diffusion, from which training begins: what is to be written.

LLaDA2.0 was made of such a model (arXiv 2512.15745), and has its architecture, so every tensor keeps its name and its
values. Different are the attention, which is causal with `block_length=1` and block-causal with any other, and a mask
token, which Ling has not: its place among the unused ids is empty, where weight decay has left next to nothing for the
first norm to blow up, and gets a row such as those of the other tokens.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from llada_uni.conversion import llada_uni_layout as layout
from llada_uni.conversion import tensor_files as files
from llada_uni.conversion.config_files import check_keys, naming, read_json
from llada_uni.conversion.output_plan import Plan, by_source_file, main_dtype, plan_outputs
from transformers_llada_uni import BlockDiffusionGenerationConfig, LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.input_checks import check_integer


logger = logging.get_logger(__name__)

ARCHITECTURE = "BailingMoeV2ForCausalLM"
EMBEDDINGS = "model.word_embeddings.weight"
MASK_TOKEN, END_TOKEN = "<|mask|>", "<|endoftext|>"  # of LLaDA2's tokenizer
# Settings that must be as ours always are, where they are given: nothing in `LLaDA2MoeConfig` says another value.
FIXED: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "norm_topk_prob": (True,),
    "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "using_split_qkv_in_self_attention": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False,),
    "embedding_dropout": (0.0,),
    "output_dropout": (0.0,),
    "quantization_config": (None,),
}
EXTRA_LAYERS = "num_nextn_predict_layers"  # beyond `num_hidden_layers`; those predict the token after the next
# Settings with the same names and meanings in both
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "rope_parameters",  # where transformers 5 writes these two
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
)


def is_autoregressive(source: Path) -> bool:
    """Whether a folder holds a model of the family that writes from left to right."""
    file = source / "config.json"
    return file.is_file() and str(read_json(file).get("model_type")).startswith("bailing")


def plan_autoregressive(source: Path, mask_token: str | None, dtype: torch.dtype | None) -> Plan:
    """Args as in [`convert_autoregressive`]."""
    file = source / "config.json"
    raw = read_json(file)
    with naming(file):
        config = _config_of(raw)
    tokenizer = layout.load_tokenizer(source, PreTrainedTokenizerFast)  # Auto classes do not know the model type
    is_new = _choose_mask_token(tokenizer, mask_token, config.vocab_size, source)
    config.mask_token_id = tokenizer.mask_token_id
    config.eos_token_id = ends = _end_tokens(tokenizer, raw, source)
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    if config.mask_token_id in (*ends, config.pad_token_id):
        raise ValueError(f"`mask_token` {tokenizer.mask_token!r} ends or fills texts; it needs an id of its own.")

    refs = files.list_checkpoint(source, "model")
    num_extra = min(raw.get(EXTRA_LAYERS) or 0, len(refs))
    extra = tuple(f"model.layers.{config.num_hidden_layers + number}." for number in range(num_extra))
    backbone = {name: ref for name, ref in refs.items() if not name.startswith(extra)}
    if len(backbone) < len(refs):
        logger.warning(
            f"{len(refs) - len(backbone)} tensors are left out: layers that predict the token after the next "
            f"(`{EXTRA_LAYERS}`) have no place in block diffusion."
        )
    files.check_tensors("the model", backbone, layout.backbone_shapes(config, file, len(backbone)))
    fill = partial(_fill_row, row=config.mask_token_id, others=_rows_of(tokenizer)) if is_new else None
    outputs = plan_outputs(backbone, dtype, changes={EMBEDDINGS: fill})
    config.dtype = main_dtype(outputs)
    config.architectures = [LLaDA2MoeForBlockDiffusion.__name__]
    generation_config = BlockDiffusionGenerationConfig(
        eos_token_id=ends,
        pad_token_id=config.pad_token_id,
        mask_token_id=config.mask_token_id,
        block_length=config.block_length,
    )
    plan = Plan()
    plan.add_checkpoint("", "model", by_source_file(outputs))
    plan.small_files += [("", part.save_pretrained) for part in (config, generation_config, tokenizer)]
    return plan


def _config_of(raw: Mapping[str, Any]) -> LLaDA2MoeConfig:
    if raw.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"`architectures` is {raw.get('architectures')!r}; only [{ARCHITECTURE!r}] can be converted")
    for name, values in FIXED.items():
        if name in raw and raw[name] not in values:
            raise ValueError(f"`{name}` is {raw[name]!r}, for which the model of block diffusion has no place")
    check_keys(raw, LLaDA2MoeConfig)
    check_integer(EXTRA_LAYERS, raw.get(EXTRA_LAYERS) or 0, 0)
    config = LLaDA2MoeConfig(**{name: raw[name] for name in SHARED if name in raw})
    rope_type = dict(config.rope_parameters or {})["rope_type"]
    if rope_type != "default":
        raise ValueError(f"`rope_parameters` has the `rope_type` {rope_type!r}; only 'default' can be converted")
    width = config.moe_intermediate_size * config.num_shared_experts
    if raw.get("moe_shared_expert_intermediate_size", width) != width:
        raise ValueError(
            f"`moe_shared_expert_intermediate_size` is {raw['moe_shared_expert_intermediate_size']!r}; the shared "
            f"expert has {width} here, `moe_intermediate_size` for each of `num_shared_experts`"
        )
    return config


def _choose_mask_token(
    tokenizer: PreTrainedTokenizerBase, mask_token: str | None, vocab_size: int, source: Path
) -> bool:
    """Gives the tokenizer its mask token; whether the model's embedding of it is still to be made."""
    known = tokenizer.mask_token
    tokenizer.add_special_tokens({"mask_token": mask_token or known or MASK_TOKEN})
    if tokenizer.mask_token_id >= vocab_size:
        raise ValueError(
            f"`mask_token` {tokenizer.mask_token!r} would be token {tokenizer.mask_token_id}, but the `vocab_size` of "
            f"{source} is {vocab_size}; name a token of the tokenizer that is not used."
        )
    return tokenizer.mask_token != known


def _end_tokens(tokenizer: PreTrainedTokenizerBase, raw: Mapping[str, Any], source: Path) -> list[int]:
    """
    The tokens that end an answer: first that which closes a document and fills its last block, which the tokenizer is
    told of (LLaDA2's is `<|endoftext|>`), then those that Ling ends its turns with.
    """
    file = source / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    found = [raw.get("eos_token_id"), settings.get("eos_token_id"), tokenizer.eos_token_id]
    if END_TOKEN in tokenizer.get_vocab():
        tokenizer.eos_token = END_TOKEN
        found.insert(0, tokenizer.eos_token_id)
    ids = [index for entry in found for index in (entry if isinstance(entry, list) else [entry]) if index is not None]
    if not ids:
        raise ValueError(f"`eos_token_id` is known neither to the tokenizer of {source} nor to its configurations.")
    for index in ids:
        with naming(source):
            check_integer("eos_token_id", index, 0)
    return list(dict.fromkeys(ids))


def _rows_of(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The ids that the tokenizer writes, without its mask."""
    return torch.tensor(sorted(set(tokenizer.get_vocab().values()) - {tokenizer.mask_token_id}))


def _fill_row(weight: torch.Tensor, row: int, others: torch.Tensor) -> torch.Tensor:
    """An embedding with one row drawn anew, each of its channels with the mean and spread that others have there."""
    others = others[others < len(weight)]  # a tokenizer may know more
    spread, mean = torch.std_mean(weight[others].float(), dim=0)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    filled = weight.clone()
    filled[row] = mean + spread * noise
    return filled
