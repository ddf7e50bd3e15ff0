"""
How much memory the released shape takes, counted on meta tensors, and what of it is on a card at a time; and what
loading a backbone takes, measured.

    python benchmarks/memory.py                        # all
    python benchmarks/memory.py --layers 12            # a larger model to load

The last part writes a scaled-down backbone in the released layout (one tensor per expert, in shards), loads it in
fresh processes with `from_pretrained`, as it is and in four bits, and compares the peak of the process's own memory
with the model's size. Pages of the files that the system maps and can drop at any time are counted apart. Decoders in
float8 need torchao to be counted.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from own_process import in_own_process
from transformers import AutoModelForCausalLM
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel, GlmImageVQVAE
from transformers.utils import is_torchao_available
from watched_memory import watched_memory

from diffusers_llada_uni import LLaDAUniSemanticEmbedder
from diffusers_llada_uni.decoder_compilation import PRODUCTS
from transformers_llada_uni import GroupwiseQuantizationConfig, LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.loading.quantization_groupwise import replace_with_groupwise_modules


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

# Of the backbone: how it is quantised.
PRECISIONS = {
    "bfloat16": None,
    "8 bits, groups of 64": ("int8", 64),
    "4 bits, groups of 32": ("int4", 32),
    "4 bits, groups of 64": ("int4", 64),
}
# A card, how the backbone and the decoder (one of the two) are stored, and whether all is on the card or a component
# at a time.
PLANS = [
    ("80 GB", "bfloat16", "bfloat16", True),
    ("24 GB", "4 bits, groups of 64", "float8", True),
    ("24 GB", "8 bits, groups of 64", "bfloat16", False),
    ("24 GB", "4 bits, groups of 64", "bfloat16", False),
    ("16 GB", "4 bits, groups of 64", "float8", False),
]


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


def num_bytes(module: torch.nn.Module) -> int:
    """Of all parameters and buffers, those that torchao quantised included."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        parts = tensor.data.__tensor_flatten__()[0] if hasattr(tensor.data, "__tensor_flatten__") else None
        total += tensor.nbytes if parts is None else sum(getattr(tensor.data, part).nbytes for part in parts)
    return total


def print_plans() -> None:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        backbones, config = {}, LLaDA2MoeConfig()
        for precision, quantization in PRECISIONS.items():
            backbone = LLaDA2MoeForBlockDiffusion(config)
            if quantization is not None:
                replace_with_groupwise_modules(backbone, config, *quantization)
            backbones[precision] = num_bytes(backbone)
        decoder = ZImageTransformer2DModel(cap_feat_dim=4096)
        tokenizer = num_bytes(GlmImageVisionModel(GlmImageVisionConfig()))
        tokenizer += num_bytes(GlmImageVQVAE(GlmImageVQVAEConfig()))
        others = num_bytes(LLaDAUniSemanticEmbedder()), num_bytes(AutoencoderKL(**VAE))
    torch.set_default_dtype(torch.float32)
    decoders = {"bfloat16": num_bytes(decoder)}
    if is_torchao_available():
        from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, quantize_

        quantize_(decoder, FqnToConfig({PRODUCTS: Float8WeightOnlyConfig()}), filter_fn=None)
        decoders["float8"] = num_bytes(decoder)
    print("\n| stored in | GB |\n|---|---|")
    for name, sizes in (("backbone", backbones), ("decoder", decoders)):
        for precision, size in sizes.items():
            print(f"| {name}, {precision} | {size / 1e9:.2f} |")
    print("\n| card | backbone | decoder | on the card | weights on it at a time, GB |\n|---|---|---|---|---|")
    for card, precision, decoder_precision, is_resident in PLANS:
        if decoder_precision not in decoders:
            print(f"| {card} | {precision} | {decoder_precision} | torchao is not installed | |")
            continue
        components = [backbones[precision] + tokenizer, decoders[decoder_precision], *others]
        size = sum(components) if is_resident else max(components)
        place = "all" if is_resident else "one component at a time"
        print(f"| {card} | {precision} | {decoder_precision} | {place} | {size / 1e9:.1f} |")


def load(path: str, quantization_config: GroupwiseQuantizationConfig | None, results) -> None:
    """Loads in this process; a thread watches its memory."""
    with watched_memory() as growth:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=quantization_config
        )
    results.send((num_bytes(model), growth.own, growth.mapped))


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
        print("\n| a backbone loaded | its size, MB | peak of own memory, MB | mapped files, MB |\n|---|---|---|---|")
        for name, quantization_config in (("as it is", None), ("in four bits", GroupwiseQuantizationConfig())):
            size, peak, mapped = in_own_process(name, load, folder, quantization_config)
            print(f"| {name} | {size / 1e6:.0f} | {peak / 1e6:.0f} | {mapped / 1e6:.0f} |", flush=True)
    print(f"\n{len(shards)} shards of at most {max(shards) / 1e6:.0f} MB.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-megabytes", type=int, default=100)
    options = parser.parse_args()
    print_shape()
    print_plans()
    measure_load(options)


if __name__ == "__main__":
    main()
