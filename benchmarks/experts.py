"""
The experts of one layer by the number of tokens: `fused_gather` against the implementations of transformers, on a CPU.

    python benchmarks/experts.py

Milliseconds, the median of alternating runs. Weights of several layers are used in turn, so that they come from
memory, as in a model. `fused_gather` is forced here for any number of tokens, to show where it stops paying.
"""

import argparse
import math
import statistics
import time

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from transformers_llada_uni import LLaDA2MoeConfig, experts_fused_gather


NUM_LAYERS, EXPERTS_PER_TOKEN = 8, 8
IMPLEMENTATIONS = {
    "eager": Glm4MoeExperts.forward.__wrapped__,
    "grouped_mm": grouped_mm_experts_forward,
    "batched_mm": batched_mm_experts_forward,
    "fused_gather": experts_fused_gather.fused_gather_experts_forward,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=128)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="How much some experts are preferred; at 0.5 a third of 64 is idle."
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    experts_fused_gather.MAX_TOKENS_PER_EXPERT[dtype] = math.inf
    config = LLaDA2MoeConfig(
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=arguments.intermediate_size,
        num_experts=arguments.experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
    )
    layers = [Glm4MoeExperts(config).to(dtype) for _ in range(NUM_LAYERS)]
    for layer in layers:
        for weight in layer.parameters():
            weight.normal_(std=0.02)
    print(
        f"{arguments.experts} experts of {arguments.intermediate_size}, {EXPERTS_PER_TOKEN} a token, hidden size "
        f"{arguments.hidden_size}, {arguments.dtype}, skew {arguments.skew}, {torch.get_num_threads()} threads\n"
    )
    names = ["tokens", "tokens an expert", *IMPLEMENTATIONS, "fused_gather by grouped_mm"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for num_tokens in arguments.tokens:
        states = torch.randn(num_tokens, arguments.hidden_size, dtype=dtype)
        preference = arguments.skew * torch.rand(NUM_LAYERS, 1, arguments.experts)
        scores = preference + torch.rand(NUM_LAYERS, num_tokens, arguments.experts)
        weights, indices = scores.topk(EXPERTS_PER_TOKEN)
        weights = weights.to(dtype)
        seconds = {name: [] for name in IMPLEMENTATIONS}
        for repeat in range(arguments.repeats + 1):
            for name, forward in IMPLEMENTATIONS.items():
                # batched_mm copies an expert for every pair
                if name == "batched_mm" and num_tokens > 64:
                    continue
                start = time.perf_counter()
                for layer, index, weight in zip(layers, indices, weights, strict=True):
                    forward(layer, states, index, weight)
                if repeat:  # the first run compiles
                    seconds[name].append((time.perf_counter() - start) / NUM_LAYERS)
        medians = {name: statistics.median(found) for name, found in seconds.items() if found}
        cells = [str(num_tokens), f"{num_tokens * EXPERTS_PER_TOKEN / arguments.experts:g}"]
        cells += [f"{1e3 * medians[name]:.2f}" if name in medians else "" for name in IMPLEMENTATIONS]
        cells.append(f"{medians['grouped_mm'] / medians['fused_gather']:.2f}x")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
