"""
How much memory the released shape takes, counted on meta tensors; and what loading a backbone takes, measured.

    python benchmarks/memory.py                        # both
    python benchmarks/memory.py --layers 12            # a larger model to load

The second part writes a scaled-down backbone in the released layout (one tensor per expert, in shards), loads it in a
fresh process with `from_pretrained`, and compares the peak of the process's own memory with the model's size. Pages of
the files that the system maps and can drop at any time are counted apart.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import AutoModelForCausalLM
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE
from watched_memory import watched_memory

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


# What a name of the backbone's belongs to; the first that matches.
BACKBONE_PARTS = {
    "routed experts": ".mlp.experts.",
    "shared experts, dense layers, routers": ".mlp.",
    "attention": ".attention.",
    "embeddings, head, norms": "",
}
VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def count_parameters() -> dict[str, int]:
    """Of each part of the released model, in the shape that our defaults have."""
    with torch.device("meta"):
        backbone = LLaDA2MoeForBlockDiffusion(LLaDA2MoeConfig())
        others = {
            "image tokenizer": torch.nn.ModuleList(
                [GlmImageVisionModel(GlmImageVisionConfig()), GlmImageVQVAE(GlmImageVQVAEConfig())]
            ),
            "semantic embedder": LLaDAUniSemanticEmbedder(),
            "decoder": ZImageTransformer2DModel(cap_feat_dim=4096),
            "autoencoder": AutoencoderKL(**VAE),
        }
    counts = dict.fromkeys(BACKBONE_PARTS, 0)
    for name, parameter in backbone.named_parameters():
        counts[next(part for part, words in BACKBONE_PARTS.items() if words in name)] += parameter.numel()
    return counts | {name: sum(p.numel() for p in part.parameters()) for name, part in others.items()}


def print_shape() -> None:
    counts = count_parameters()
    print("| part | parameters (million) | bfloat16, GB | 8 bit, GB |\n|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count / 1e6:,.0f} | {2 * count / 1e9:.2f} | {count / 1e9:.2f} |")
    total = sum(counts.values())
    print(f"| all | {total / 1e6:,.0f} | {2 * total / 1e9:.2f} | {total / 1e9:.2f} |")
    config = LLaDA2MoeConfig()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    print(f"\nCache: {cache / 1e6:.3f} MB a token in bfloat16, {1024 * cache / 1e6:.0f} MB for 1,024 tokens a branch.")


def load(path: str, results) -> None:
    """Loads in this process; a thread watches its memory."""
    with watched_memory() as growth:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    results.put((size, growth.own, growth.mapped))


def measure_load(options: argparse.Namespace) -> None:
    config = LLaDA2MoeConfig(
        vocab_size=32_768,
        num_hidden_layers=options.layers,
        num_experts=64,
        moe_intermediate_size=256,
        hidden_size=1024,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = LLaDA2MoeForBlockDiffusion(config).to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=f"{options.shard_megabytes}MB")
        del model
        shards = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=load, args=(folder, results))
        process.start()
        size, peak, mapped = results.get()
        process.join()
    print(
        f"\nA backbone of {size / 1e6:.0f} MB in {len(shards)} shards of at most {max(shards) / 1e6:.0f} MB: loading "
        f"took {peak / 1e6:.0f} MB ({peak / size:.2f} times its size; its size and a shard: "
        f"{(size + max(shards)) / size:.2f}), and mapped files of up to {mapped / 1e6:.0f} MB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-megabytes", type=int, default=100)
    options = parser.parse_args()
    print_shape()
    measure_load(options)


if __name__ == "__main__":
    main()
