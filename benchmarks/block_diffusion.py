r"""
The released loop, the exact caches and SPRINT side by side, in one run on one random mid-size model.

    python benchmarks/block_diffusion.py                                 # text, 8,192 ids, batch 1, no guidance
    python benchmarks/block_diffusion.py --vocabulary released --guidance --new-tokens 256 --batch-sizes 1 4
    python benchmarks/block_diffusion.py --prompt-length 4096 --new-tokens 128 \
        --methods "exact cache, fused experts" "SPRINT, fused experts"               # pictures stand before

The small vocabulary (8,192 ids) writes text, the released one (173,568 ids, 16,384 of them codes) writes image codes.
Weights are random, and large enough that masks do not all choose the same few experts: a step uses two thirds of them.

Every row is the median of alternating runs, so that a slow minute of the machine hits all methods alike; first
runs, untimed, count floating-point operations and watch the process's memory. The tokens of the exact cache
are compared with the loop's: in float64 on a small model, where they must be equal, and in the rows themselves, where
float32 may round two equal experts apart.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from released_loop import released_loop
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from watched_memory import watched_memory

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


# All ids, and the first of the codes, which are the last
VOCABULARIES = {"small": (8_192, 6_144), "released": (173_568, 157_184)}
STEPS = 8


@dataclass
class Method:
    """Arguments of `generate` (`None`: the loop), implementation of the experts, whether the backbone is compiled."""

    arguments: dict[str, Any] | None
    experts: str = "grouped_mm"
    is_compiled: bool = False


METHODS = {
    "released loop": Method(None),
    "exact cache": Method({}),
    "exact cache, fused experts": Method({}, "fused_gather"),
    "exact cache, compiled": Method({}, "fused_gather", is_compiled=True),
    "SPRINT, fused experts": Method({"cache_implementation": "sprint"}, "fused_gather"),
    "SPRINT, compiled": Method({"cache_implementation": "sprint"}, "fused_gather", is_compiled=True),
}


def make_model(vocabulary: str, hidden_size: int, num_layers: int, num_experts: int) -> LLaDA2MoeForBlockDiffusion:
    torch.manual_seed(0)
    vocab_size, image_token_offset = VOCABULARIES[vocabulary]
    config = LLaDA2MoeConfig(
        vocab_size=vocab_size,
        image_token_offset=image_token_offset,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        moe_intermediate_size=hidden_size // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden_size // 8,
        num_experts=num_experts,
        num_experts_per_tok=min(8, num_experts // 2),
        max_position_embeddings=65_536,
        initializer_range=0.2,
        mask_token_id=image_token_offset - 3,
        eos_token_id=image_token_offset - 2,
        pad_token_id=image_token_offset - 1,
    )
    return LLaDA2MoeForBlockDiffusion(config).eval()


def make_call(
    model: LLaDA2MoeForBlockDiffusion,
    vocabulary: str,
    batch_size: int,
    prompt_length: int,
    num_new_tokens: int,
    is_guided: bool,
) -> Callable[..., torch.LongTensor]:
    """
    From a method, and a list for the times at which forwards of the backbone begin, to the new tokens. A threshold of
    1 is never met, so that all methods take the same steps.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 6000, (1 + is_guided, batch_size, prompt_length), generator=generator)
    vocab_size, offset = VOCABULARIES[vocabulary]
    scales = {"guidance_scale": 2.0, "guidance_rescale": 0.7} if is_guided else {}
    writes_codes = vocabulary == "released"

    def call(method: Method, times: list[float] | None = None) -> torch.LongTensor:
        model.set_experts_implementation(method.experts)
        forward = compiled_call(model) if method.is_compiled else model.model._call_impl

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if times is not None:
                times.append(time.perf_counter())
            return forward(*args, **kwargs)

        model.model._compiled_call_impl = clocked  # what a module calls in place of its own, if there is one
        if method.arguments is None:
            allowed = (offset, vocab_size) if writes_codes else None
            return released_loop(model, prompts, num_new_tokens, STEPS, allowed=allowed, **scales)
        settings = {"num_steps_per_block": STEPS, "threshold": 1.0} | method.arguments
        if not writes_codes:
            sequences = model.generate(prompts[0], max_new_tokens=num_new_tokens, eos_token_id=[], **settings)
            return sequences[:, prompt_length:]
        companions = {"negative_input_ids": prompts[1]} if is_guided else {}
        grid = (num_new_tokens // 32, 32)
        return offset + model.generate_image_codes(prompts[0], grid, **companions, **scales, **settings)

    return call


@functools.cache
def compiled_call(model: LLaDA2MoeForBlockDiffusion) -> Callable:
    model.model.compile(fullgraph=True, isolate_recompiles=True, recompile_limit=64)
    return model.model._compiled_call_impl


def grouped_mm_flops(tokens_shape, weights_shape, *args, **kwargs) -> int:
    """Each token passes the weights of one group."""
    return 2 * tokens_shape[0] * weights_shape[-1] * weights_shape[-2]


def counter_of_flops() -> FlopCounterMode:
    """torch's own knows neither the grouped product of the experts nor attention on CPU."""
    custom = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    custom[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = lambda query, key, value, *args, **kwargs: (
        sdpa_flop_count(query, (*query[:2], *key[2:]), (*query[:2], *value[2:]))
    )
    return FlopCounterMode(display=False, custom_mapping=custom)


def gemm_peak() -> float:
    """Operations a second of a large product of matrices, the best of ten."""
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def growth(times: list[float], num_blocks: int) -> float:
    """Time of the last tenth of the blocks by that of the first, without the block that takes in the prompt."""
    blocks = [times[index * STEPS] for index in range(num_blocks)] + [times[-1]]
    spans = [later - earlier for earlier, later in zip(blocks[1:-2], blocks[2:-1], strict=True)]
    some = max(1, len(spans) // 10)
    return statistics.median(spans[-some:]) / statistics.median(spans[:some])


def milliseconds_of_a_step(times: list[float]) -> float:
    """The median of all forwards, the one that takes in the prompt among them."""
    return 1e3 * statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def check_exactness() -> None:
    for vocabulary, is_guided in (("small", False), ("released", False), ("released", True)):
        model = make_model(vocabulary, 64, 2, 16).double()
        call = make_call(model, vocabulary, 2, 64, 128, is_guided)
        plain = call(Method(None, "eager"))  # grouped_mm knows no float64
        methods = [Method({}, "eager"), Method({}, "fused_gather")]
        if is_guided:  # one case, as compiling takes its time
            methods.append(Method({}, "fused_gather", is_compiled=True))
        for method in methods:
            is_same = torch.equal(plain, call(method))
            assert is_same, f"{vocabulary}, guided {is_guided}: {method} changed a token"
    print("exact caches == released loop in float64, 2 rows of 128: checked for text, codes and guided codes\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="small")
    parser.add_argument("--guidance", action="store_true", help="With a companion; needs image codes.")
    parser.add_argument(
        "--new-tokens", type=int, nargs="+", default=[256, 512, 1024], help="Multiples of 32, from 96 on."
    )
    parser.add_argument("--prompt-length", type=int, default=64, help="A multiple of 32.")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="The first is what others are compared to.",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.guidance and arguments.vocabulary != "released":
        parser.error("--guidance needs --vocabulary released: only image codes are guided.")
    if any(count < 96 or count % 32 for count in arguments.new_tokens):
        parser.error(f"--new-tokens: multiples of 32, from 96 on, are needed, got {arguments.new_tokens}.")
    if arguments.prompt_length < 32 or arguments.prompt_length % 32:
        parser.error(f"--prompt-length: a multiple of 32 is needed, got {arguments.prompt_length}.")

    methods = {name: METHODS[name] for name in arguments.methods}
    first = arguments.methods[0]
    check_exactness()
    model = make_model(arguments.vocabulary, arguments.hidden_size, arguments.layers, arguments.experts)
    parameters, peak = sum(parameter.numel() for parameter in model.parameters()), gemm_peak()
    written = "text" if arguments.vocabulary == "small" else "image codes"
    written = f"guided {written}" if arguments.guidance else written
    print(
        f"{parameters / 1e6:.0f}M parameters, {arguments.layers} layers, {model.config.num_experts} experts, "
        f"{model.config.vocab_size:,} ids, {written}, float32, {torch.get_num_threads()} threads, "
        f"blocks of 32, {STEPS} steps a block, prompt of {arguments.prompt_length}; large products of matrices reach "
        f"{peak / 1e9:.0f} GFLOP/s\n"
    )
    names = ["batch", "new tokens", "method", "seconds", "tokens/s", "forwards", "GFLOP", "of the peak", "memory MB"]
    names += ["ms a step", "last blocks / first", "same tokens", "speed-up"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for batch_size in arguments.batch_sizes:
        for num_new_tokens in arguments.new_tokens:
            call = make_call(
                model, arguments.vocabulary, batch_size, arguments.prompt_length, num_new_tokens, arguments.guidance
            )
            tokens, operations, memory, forwards, seconds, steps, growths = {}, {}, {}, {}, {}, {}, {}
            for name, method in methods.items():
                counted = Method(method.arguments)  # the counter sees nothing of compiled kernels
                with watched_memory() as growth_of_memory, counter_of_flops() as counter:
                    tokens[name] = call(counted)
                if method != counted:
                    with watched_memory() as growth_of_memory:
                        tokens[name] = call(method)
                memory[name], operations[name] = growth_of_memory.own / 2**20, counter.get_total_flops()
                seconds[name], steps[name], growths[name] = [], [], []
            for _ in range(arguments.repeats):
                for name, method in methods.items():
                    times = []
                    start = time.perf_counter()
                    call(method, times)
                    seconds[name].append(time.perf_counter() - start)
                    forwards[name] = len(times)
                    steps[name].append(milliseconds_of_a_step(times))
                    growths[name].append(growth(times, num_new_tokens // 32))
            slowest = statistics.median(seconds[first])
            for name in methods:
                median = statistics.median(seconds[name])
                same = (tokens[name] == tokens[first]).float().mean().item()
                cells = [
                    str(batch_size),
                    str(num_new_tokens),
                    name,
                    f"{median:.2f}",
                    f"{batch_size * num_new_tokens / median:.1f}",
                    str(forwards[name]),
                    f"{operations[name] / 1e9:.0f}",
                    f"{100 * operations[name] / median / peak:.0f}%",
                    f"{memory[name]:.0f}",
                    f"{statistics.median(steps[name]):.1f}",
                    f"{statistics.median(growths[name]):.2f}",
                    f"{100 * same:.1f}%",
                    f"{slowest / median:.2f}x",
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
