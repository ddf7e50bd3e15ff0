"""Random settings under which generation with and without cache must agree; shared by a test and a benchmark."""

import random

import torch

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


def tiny_backbone(seed: int = 0, num_hidden_layers: int = 2, **settings) -> LLaDA2MoeForBlockDiffusion:
    """A backbone in float64 with weights large enough that predictions differ from position to position."""
    torch.manual_seed(seed)
    config = LLaDA2MoeConfig(
        vocab_size=96,
        image_token_offset=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        mask_token_id=63,
        pad_token_id=62,
        eos_token_id=61,
        **settings,
    )
    model = LLaDA2MoeForBlockDiffusion(config).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm knows no float64
    return model


def _prompts(rng: random.Random, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Left-padded random prompts; the padding is whatever the longest row makes it, seldom a whole block."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), 62)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.tensor([rng.randrange(0, 60) for _ in range(length)])
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def random_case(seed: int) -> tuple[str, dict]:
    """A method's name and its arguments."""
    rng = random.Random(seed)
    batch = rng.choice([1, 1, 2, 3])
    lengths = [rng.randint(1, 40) for _ in range(batch)]
    arguments = _prompts(rng, lengths)
    arguments["block_length"] = rng.choice([1, 2, 3, 5, 8, 16, 32, 64, rng.randint(1, 64)])
    arguments["num_steps_per_block"] = rng.choice([1, 2, 3, 4, 8, rng.randint(1, 70)])
    arguments["threshold"] = rng.choice([0.0, 0.05, 0.3, 0.6, 0.95, 1.0])
    arguments["editing_threshold"] = rng.choice([None, None, None, 0.1, 0.5])
    if arguments["editing_threshold"] is None and seed % 3 == 0:
        arguments["remasking_threshold"] = 0.5
    if rng.random() < 0.5:
        arguments["max_new_tokens"] = rng.randint(1, 80)
        if rng.random() < 0.4:  # gaps to fill in the prompt
            ids, mask = arguments["input_ids"], arguments["attention_mask"]
            ids[(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.2) & (mask == 1)] = 63
        return "generate", arguments
    arguments["grid"] = (rng.randint(1, 7), rng.randint(1, 7))
    guidance = rng.choice(["none", "text", "text and image"])
    if guidance != "none":
        for name in ("negative", "negative_image"):
            negative = _prompts(rng, [rng.randint(1, 40) for _ in range(batch)])
            arguments[f"{name}_input_ids"] = negative["input_ids"]
            arguments[f"{name}_attention_mask"] = negative["attention_mask"]
        arguments["guidance_scale"] = rng.choice([1.5, 3.0])
        arguments["guidance_rescale"] = rng.choice([0.0, 0.7])
        if guidance == "text and image":
            arguments["image_guidance_scale"] = 1.5
    return "generate_image_codes", arguments
