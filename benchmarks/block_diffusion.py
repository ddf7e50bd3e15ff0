"""
Plain loop, exact cache and SPRINT side by side, in one run on one random mid-size model.

    python benchmarks/block_diffusion.py                    # text and image codes, 256 and 512 new tokens
    python benchmarks/block_diffusion.py --new-tokens 1024 --repeats 5

Every row is the median of alternating runs, so that a slow minute of the machine hits all of them alike. The exact
cache must give the tokens of the plain loop; the run checks that in float64 on a small model of the same shape.
"""

import argparse
import statistics
import time

import torch

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


MASK, EOS, PAD = 8189, 8190, 8191
PROMPT_LENGTH = 64
METHODS = {
    "plain loop": {"use_cache": False},
    "exact cache": {},
    "SPRINT": {"cache_implementation": "sprint"},
}


def make_model(hidden_size: int, num_layers: int, num_experts: int) -> LLaDA2MoeForBlockDiffusion:
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=8192,
        image_token_offset=6144,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        moe_intermediate_size=hidden_size // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden_size // 8,
        num_experts=num_experts,
        num_experts_per_tok=min(8, num_experts // 2),
        max_position_embeddings=4096,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LLaDA2MoeForBlockDiffusion(config).eval()


def make_call(model: LLaDA2MoeForBlockDiffusion, task: str, num_new_tokens: int):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 6000, (1, PROMPT_LENGTH), generator=generator)
    # A threshold of 1 is never met: all methods take the same number of steps, as an untrained model would not.
    settings = {"num_steps_per_block": 8, "threshold": 1.0, "return_dict_in_generate": True}
    if task == "text":
        return lambda **method: model.generate(
            prompt, max_new_tokens=num_new_tokens, eos_token_id=[], **settings, **method
        )
    companion = torch.randint(0, 6000, (1, PROMPT_LENGTH - 9), generator=generator)
    return lambda **method: model.generate_image_codes(
        prompt,
        (num_new_tokens // 32, 32),
        negative_input_ids=companion,
        guidance_scale=2.0,
        **settings,
        **method,
    )


def cache_megabytes(model: LLaDA2MoeForBlockDiffusion, task: str, num_new_tokens: int) -> float:
    config, branches = model.config, 1 if task == "text" else 2
    columns = PROMPT_LENGTH + num_new_tokens
    return branches * columns * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4 / 2**20


def check_exactness() -> None:
    small = make_model(64, 2, 16).double()
    small.set_experts_implementation("eager")  # grouped_mm knows no float64
    for task in ("text", "guided codes"):
        call = make_call(small, task, 128)
        assert torch.equal(call().sequences, call(use_cache=False).sequences), f"{task}: the cache changed a token"
    print("exact cache == plain loop in float64: checked for text and guided codes\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    arguments = parser.parse_args()

    check_exactness()
    model = make_model(arguments.hidden_size, arguments.layers, arguments.experts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, {arguments.layers} layers, {model.config.num_experts} experts, "
        f"float32, {torch.get_num_threads()} threads, blocks of 32, 8 steps a block, prompt of {PROMPT_LENGTH}\n"
    )
    print("| task | new tokens | method | seconds | tokens/s | forwards | tokens/forward | cache MB | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in ("text", "guided codes"):
        for num_new_tokens in arguments.new_tokens:
            call = make_call(model, task, num_new_tokens)
            seconds = {name: [] for name in METHODS}
            outputs = {}
            for _ in range(arguments.repeats):
                for name, method in METHODS.items():
                    start = time.perf_counter()
                    outputs[name] = call(**method)
                    seconds[name].append(time.perf_counter() - start)
            plain = statistics.median(seconds["plain loop"])
            for name, times in seconds.items():
                median, output = statistics.median(times), outputs[name]
                memory = 0.0 if name == "plain loop" else cache_megabytes(model, task, num_new_tokens)
                print(
                    f"| {task} | {num_new_tokens} | {name} | {median:.2f} | {num_new_tokens / median:.1f} "
                    f"| {output.num_forward_passes} | {output.tokens_per_forward:.2f} | {memory:.1f} "
                    f"| {plain / median:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
