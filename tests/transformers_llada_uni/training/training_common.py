"""What the tests of the language model's trainers share."""

import torch

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


BLOCK = 4
MASK, END = 60, 59


def tiny_model(seed=0, attn_implementation="sdpa", **settings) -> LLaDA2MoeForBlockDiffusion:
    torch.manual_seed(seed)
    config = LLaDA2MoeConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "block_length": BLOCK,
            "mask_token_id": MASK,
            "eos_token_id": END,
            "pad_token_id": END,
            "image_token_offset": None,
            "max_position_embeddings": 128,
            **settings,
        }
    )
    config._attn_implementation = attn_implementation
    return LLaDA2MoeForBlockDiffusion(config).eval()


# For runs of a few steps on a CPU.
RUN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
}
